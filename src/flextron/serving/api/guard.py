"""What stands before the routes: keys, names of this machine, and bodies of a bounded size."""

from __future__ import annotations

import hashlib
import hmac
from urllib.parse import urlsplit

import anyio
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from flextron.serving.api.address import is_loopback
from flextron.serving.api.options import Access, Limits
from flextron.serving.api.refusal import ApiError
from flextron.serving.api.streaming import refused

OPEN = ("/", "/health")
"""Paths that need no key: they tell nothing about requests."""
_DISCARDED = 8
"""How many times the limit of a body is read and thrown away, so that the client gets to the answer."""


class Guard:
    """Lets requests through that have the key and, without one, name this machine as their host."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access
        self._key = None if access.api_key is None else _digest(access.api_key)
        self._hosts = {"", *(urlsplit(origin).hostname or "" for origin in access.cors)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 or 403, or pass on."""
        if scope["type"] == "http":
            try:
                self._check(Request(scope))
            except ApiError as error:
                await refused(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, request: Request) -> None:
        path = request.url.path
        if self._key is None:
            if self._access.only_local_names and not self._is_local(request.headers.get("host", "")):
                raise ApiError(
                    "this server answers on localhost only; name it so, or start it with --api-key.",
                    status=403,
                    code="host_not_allowed",
                )
        elif path not in OPEN and not path.startswith("/page/") and request.method != "OPTIONS":
            given = request.headers.get("authorization", "")
            scheme, _, key = given.partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(_digest(key.strip()), self._key):
                said = "is wrong" if given else "is missing"
                raise ApiError(
                    f"the API key {said}; send the header Authorization: Bearer KEY.",
                    status=401,
                    code="invalid_api_key",
                )

    def _is_local(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self._hosts or name.endswith(".localhost") or is_loopback(name)


def _digest(key: str) -> bytes:
    """Return what is compared instead of a key: equally long for all keys."""
    return hashlib.sha256(key.encode("utf8", "surrogateescape")).digest()


async def read_body(request: Request, limits: Limits) -> bytes:
    """Return the body of a request.

    Raises:
        ApiError: 408, 413 or 415, it comes too slowly, is too long, or is not said to be JSON.
        ClientDisconnect: the client has left.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which a page of another origin may send only where CORS lets it
        raise ApiError(
            f"the content type is {kind!a}; send JSON with the header Content-Type: application/json.",
            status=415,
            code="unsupported_media_type",
        )
    try:
        with anyio.fail_after(limits.read_seconds):
            return await _read(request, limits.body_bytes)
    except TimeoutError:
        raise ApiError(
            f"the body did not come within {limits.read_seconds:g} s; send it faster.", status=408, code="timeout"
        ) from None


async def _read(request: Request, most: int) -> bytes:
    kept, size = bytearray(), 0
    async for piece in request.stream():
        size += len(piece)
        if size <= most:
            kept += piece
        elif size > _DISCARDED * most:
            break
    if size > most:
        raise ApiError(
            f"the body is longer than {most} bytes, the limit of this server; send less.",
            status=413,
            code="body_too_large",
        )
    return bytes(kept)
