"""`ApiError`: what a client did wrong or must wait for, in OpenAI's shape. No torch here."""

from __future__ import annotations

import math
from typing import Any

from flextron.errors import FlextronError
from flextron.serving.engine import CannotMeetError, RefusedError, StoppedError

_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_SERVER_FAULT = 500
RETRY_SECONDS = 5
"""When to come back to a server that stops or starts: another one may have taken its place by then."""


class ApiError(FlextronError):
    """An answer with a status of 400 or more."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """Return the error as OpenAI's API writes it."""
        fallback = "server_error" if self.status >= _SERVER_FAULT else "invalid_request_error"
        kind = _KINDS.get(self.status, fallback)
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return the headers that tell a client whether and when to try again."""
        if self.retry_after is not None:
            return {"retry-after": str(max(1, math.ceil(self.retry_after)))}
        if self.status == 429:
            return {"x-should-retry": "false"}
        return {}


def of_engine(error: RefusedError | ValueError) -> ApiError:
    """Return what to answer where the engine did not take a request."""
    if isinstance(error, StoppedError):
        return ApiError(str(error), status=503, code="stopped", retry_after=error.retry_after or RETRY_SECONDS)
    if isinstance(error, CannotMeetError):
        return ApiError(str(error), status=429, code="slo_not_met", retry_after=error.retry_after)
    if isinstance(error, RefusedError):
        return ApiError(str(error), status=429, code="queue_full", retry_after=error.retry_after or 1)
    return ApiError(str(error), code="invalid_value")
