"""The web application: routes of OpenAI's API, of flextron's own, and the page."""

from __future__ import annotations

import time
from dataclasses import asdict
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from flextron.serving.api.answers import to_json
from flextron.serving.api.asking import Kind
from flextron.serving.api.guard import Guard, read_body
from flextron.serving.api.options import Access
from flextron.serving.api.refusal import RETRY_SECONDS, ApiError
from flextron.serving.api.service import Service
from flextron.serving.api.streaming import refused
from flextron.serving.api.wishes import TPOT_HEADER, TTFT_HEADER

_STARTED = int(time.time())
_PAGE = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_EXPOSED = ("asked", "level", "levels", "ttft-ms", "tpot-ms", "queue-ms", "met-ttft", "met-tpot", "ignored")


def make_app(service: Service | None = None, access: Access | None = None) -> Starlette:
    """Return the application. Without a service it says that it loads, until `app.state.service` is set."""
    access = access or Access()
    guards = [Middleware(Guard, access=access)]
    if access.cors:
        guards.insert(0, Middleware(CORSMiddleware, **_cors(access)))
    app = Starlette(routes=_ROUTES, middleware=guards, exception_handlers=_HANDLERS)
    app.state.service = service
    return app


def _cors(access: Access) -> dict[str, Any]:
    return {
        "allow_origins": access.cors,
        "allow_methods": ["GET", "POST"],
        "allow_headers": ["authorization", "content-type", TTFT_HEADER, TPOT_HEADER],
        "expose_headers": ["x-request-id", "retry-after", *(f"x-flextron-{name}" for name in _EXPOSED)],
    }


def _service(request: Request) -> Service:
    service: Service | None = request.app.state.service
    if service is None:
        raise ApiError("the model is being loaded.", status=503, code="loading", retry_after=RETRY_SECONDS)
    return service


def _json(value: Any, status: int = 200) -> Response:
    return Response(to_json(value), status, media_type="application/json")


async def _answer(request: Request, kind: Kind) -> Response:
    service = _service(request)
    body = await read_body(request, service.options.limits)
    return await service.answer(kind, body, request.headers, request.receive)


async def _chat(request: Request) -> Response:
    return await _answer(request, "chat")


async def _completions(request: Request) -> Response:
    return await _answer(request, "completion")


async def _health(request: Request) -> Response:
    service: Service | None = request.app.state.service
    state = "loading" if service is None else service.state
    answer = _json({"status": state}, 200 if state == "ok" else 503)
    if state != "ok":
        answer.headers["retry-after"] = str(RETRY_SECONDS)
    return answer


async def _metrics(request: Request) -> Response:
    return Response(_service(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _models_of(service: Service) -> list[dict[str, Any]]:
    name = service.options.name
    names = [name, *(f"{name}:{level.name}" for level in reversed(service.engine.levels))]
    return [{"id": each, "object": "model", "created": _STARTED, "owned_by": "flextron"} for each in names]


async def _models(request: Request) -> Response:
    return _json({"object": "list", "data": _models_of(_service(request))})


async def _model(request: Request) -> Response:
    name = request.path_params["name"]
    found = next((model for model in _models_of(_service(request)) if model["id"] == name), None)
    if found is None:
        raise ApiError("there is no such model; /v1/models lists them.", status=404, code="model_not_found")
    return _json(found)


async def _levels(request: Request) -> Response:
    service = _service(request)
    policy, engine = service.options.policy, service.engine
    levels = [
        {
            "name": level.name,
            "share": level.share,
            "loss": level.loss,
            "step_ms": level.step_ms,
            "prefill_ms_per_token": level.prefill_ms_per_token,
        }
        for level in engine.levels
    ]
    stats = asdict(engine.stats())
    defaults = {"budget": policy.default.text, "adaptive": policy.adaptive, "floor": engine.levels[policy.floor].name}
    named = {"model": service.options.name, "losses": service.options.losses}
    return _json({**named, "levels": levels, "default": defaults, "stats": stats})


async def _page(request: Request) -> Response:
    name = request.path_params.get("name", "index.html")
    if name not in _PAGE:
        raise HTTPException(404)
    file = resources.files("flextron.serving.api") / "page" / name
    return Response(file.read_bytes(), media_type=_PAGE[name], headers=_PAGE_HEADERS)


async def _refuse(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)  # noqa: S101 - as registered
    return refused(error)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101
    said = {404: "there is nothing at", 405: f"{request.method} is not for"}.get(error.status_code, error.detail)
    answer = refused(
        ApiError(f"{said} {ascii(request.url.path)[:100]}; see /v1/models.", status=error.status_code, code="no_route")
    )
    answer.headers.update(error.headers or {})
    return answer


async def _bug(_request: Request, _error: Exception) -> Response:
    return refused(ApiError("this is a bug in flextron; the server's output has more.", status=500, code="bug"))


async def _left(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # no one reads it


_HANDLERS: dict[Any, Any] = {ApiError: _refuse, HTTPException: _no_route, ClientDisconnect: _left, Exception: _bug}
_ROUTES = [
    Route("/v1/chat/completions", _chat, methods=["POST"]),
    Route("/v1/completions", _completions, methods=["POST"]),
    Route("/v1/models", _models),
    Route("/v1/models/{name:path}", _model),
    Route("/v1/flextron/levels", _levels),
    Route("/health", _health),
    Route("/metrics", _metrics),
    Route("/", _page),
    Route("/page/{name}", _page),
]
