"""Levels over vLLM's HTTP server: `--middleware flextron.vllm_plugin.middleware.LevelMiddleware`. Plain ASGI, no vLLM.

A request names its level, in this order of precedence, as `budget` or `vllm_xargs: {"flextron": ...}` in its body, in
its model's name (`smol:0.6x`), or in the header `x-flextron-budget`. The middleware checks it, and passes it on as
`vllm_xargs` with a `cache_salt` of the level's own. Without that salt, vLLM's prefix cache would give a request keys
and values of other levels. Every answer has the header `x-flextron-level`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeAlias

from flextron.errors import BudgetError
from flextron.serving.saved import Levels
from flextron.vllm_plugin.runners import ARGUMENT

HEADER = b"x-flextron-budget"
ANSWERED = b"x-flextron-level"
PATHS = (
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/completions",
    "/v1/messages",
    "/v1/responses",
)
"""Where vLLM's requests have both `vllm_xargs` and `cache_salt`."""
REFUSED = ("/invocations", "/inference/v1/generate", "/cohere/v2/chat", "/v1/systemone", "/generative_scoring")
"""Other paths that write or score text: requests that name a level there are refused, all others run the full model."""
LARGEST_BYTES = 64 * 2**20
"""Bytes of a body, which is read whole."""
FOLDER = "FLEXTRON_LEVELS"
"""Environment variable: the folder with levels.json, where it is not the model's."""

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]


class _RefusedError(Exception):
    """A request that is answered with an error."""

    def __init__(self, message: str, *, param: str | None, code: str, status: int = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status

    def body(self) -> bytes:
        kind = "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()


@dataclass(frozen=True)
class _Asked:
    """A budget, and where the request names it."""

    budget: Any
    param: str


class LevelMiddleware:
    """Lets the requests of vLLM's server name their levels."""

    def __init__(self, app: Any, levels: Levels | None = None, names: tuple[str, ...] | None = None) -> None:
        """Wrap an ASGI application.

        Args:
            levels: by default those in the folder of vLLM's model.
            names: that the model is served under; by default vLLM's `--served-model-name`.
        """
        self.app = app
        self._levels, self._names = levels, names

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on with its level, or refuse it."""
        path = str(scope.get("path", "")).removeprefix(str(scope.get("root_path", "")))
        if scope["type"] != "http" or scope["method"] != "POST" or path not in PATHS + REFUSED:
            await self.app(scope, receive, send)
            return
        try:
            body = await _read(receive)
            if body is None:  # the client has gone
                return
            level, body = self.changed(path, body, dict(scope["headers"]), scope)
        except _RefusedError as error:
            await _answer(send, error)
            return
        length = (b"content-length", str(len(body)).encode())
        kept = [pair for pair in scope["headers"] if pair[0] not in (b"content-length", b"transfer-encoding")]
        await self.app({**scope, "headers": [*kept, length]}, _replayed(body, receive), _with_header(send, level))

    def changed(self, path: str, body: bytes, headers: dict[bytes, bytes], scope: Message) -> tuple[str | None, bytes]:
        """Return the name of a request's level, and its body as vLLM takes it; what vLLM will refuse stays."""
        try:
            data = json.loads(body)
        except (ValueError, RecursionError):
            return None, body
        if not isinstance(data, dict) or not isinstance(data.get("vllm_xargs") or {}, dict):
            return None, body
        levels, names = self._served(scope)
        asked = _asked(data, headers, names)
        if path in REFUSED:
            if asked is not None:
                known = ", ".join(PATHS)
                raise _RefusedError(
                    f"{path} runs the full model only; levels are served at {known}.",
                    param=asked.param,
                    code="no_levels",
                )
            return None, body
        level = levels[_find(levels, asked)]
        data.pop("budget", None)
        base, _, _ = str(data.get("model")).rpartition(":")
        if base in names and data["model"] not in names:
            data["model"] = base
        data["vllm_xargs"] = {**(data.get("vllm_xargs") or {}), ARGUMENT: levels.names.index(level.name)}
        data["cache_salt"] = salt(levels, level.name, data.get("cache_salt"))
        return level.name, json.dumps(data).encode()

    def _served(self, scope: Message) -> tuple[Levels, tuple[str, ...]]:
        """The levels, and the names that the model is served under."""
        if self._levels is None or self._names is None:
            args = scope["app"].state.args
            self._levels = self._levels or Levels.load(os.environ.get(FOLDER) or args.model)
            self._names = self._names or tuple(args.served_model_name or [args.model])
        return self._levels, self._names


def salt(levels: Levels, name: str, users: Any = None) -> str:
    """Return the `cache_salt` of a level, of its weights and widths alone, mixed with a user's own.

    vLLM takes at most 128 characters, and few that are no letters.
    """
    subnet = levels[levels.names.index(name)].subnet
    text = json.dumps([levels.fingerprint, subnet.to_json(), users])
    return f"{ARGUMENT}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _asked(data: dict[str, Any], headers: dict[bytes, bytes], names: tuple[str, ...]) -> _Asked | None:
    """The budget that a request names; None where it names none."""
    extra = data.get("vllm_xargs") or {}
    inner = data.get("sampling_params")
    hidden = inner.get("extra_args") if isinstance(inner, dict) else None
    base, _, alias = str(data.get("model")).rpartition(":")
    if data.get("budget") is not None:
        return _Asked(data["budget"], "budget")
    for place, found in (("vllm_xargs", extra), ("sampling_params", hidden)):
        if isinstance(found, dict) and ARGUMENT in found:
            return _Asked(found[ARGUMENT], place)
    if base in names:
        return _Asked(alias, "model")
    if HEADER in headers:
        return _Asked(headers[HEADER].decode("latin1"), HEADER.decode())
    return None


def _find(levels: Levels, asked: _Asked | None) -> int:
    """The index of the level for a budget; of the full model without one.

    Raises:
        _RefusedError: there is none.
    """
    if asked is None:
        return len(levels) - 1
    try:
        if not isinstance(asked.budget, str | int):
            raise BudgetError(
                f"a budget is a text such as {levels[0].name}, not {json.dumps(asked.budget)[:60]}; here a request "
                "runs at one level from beginning to end."
            )
        return levels.find(asked.budget)
    except BudgetError as error:
        if asked.param == "model":
            status, code = HTTPStatus.NOT_FOUND, "model_not_found"
        else:
            status, code = HTTPStatus.BAD_REQUEST, "unknown_budget"
        raise _RefusedError(str(error), param=asked.param, code=code, status=status) from None


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None where the client has gone.

    Raises:
        _RefusedError: it is too large.
    """
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > LARGEST_BYTES:
            raise _RefusedError(
                f"the body has more than {LARGEST_BYTES} bytes.",
                param=None,
                code="too_large",
                status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            )
    return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Give the body once, then what comes next, such as that the client has gone."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


def _with_header(send: Send, level: str | None) -> Send:
    if level is None:
        return send
    named = level.encode()

    async def send_named(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), (ANSWERED, named)]}
        await send(message)

    return send_named


async def _answer(send: Send, error: _RefusedError) -> None:
    body = error.body()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": int(error.status), "headers": headers})
    await send({"type": "http.response.body", "body": body})
