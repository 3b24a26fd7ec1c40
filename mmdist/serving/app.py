"""The FastAPI application: the formats' routes, and what stands in front of all of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from mmdist.config import UserError
from mmdist.serving import health
from mmdist.serving.access import RequestId
from mmdist.serving.errors import ServeError
from mmdist.serving.formats import mindie, openai, tgi, triton, vlmo
from mmdist.serving.guard import Guard
from mmdist.serving.page import routes as page
from mmdist.serving.service import Service

TITLE = "mmdist"
# The first shows the errors of paths that are nobody's.
FORMATS: tuple[ModuleType, ...] = (openai, vlmo, tgi, triton, mindie)


def create_app(service: Service, api_keys: list[str]) -> FastAPI:
    """Every format module has: router; render_error(ServeError) -> Response in the format's shape."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.event_loop = asyncio.get_running_loop()
        yield

    app = FastAPI(title=TITLE, lifespan=lifespan, docs_url=None, redoc_url=None)  # their pages load from elsewhere
    app.state.service = service
    for module in (health, page, *FORMATS):
        app.include_router(module.router)
    server = service.config.server
    for kind in (ServeError, UserError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, lambda request, error: show(request, as_serve_error(error)))
    app.add_middleware(Guard, server=server, api_keys=api_keys, show=show)
    if server.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=server.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    app.add_middleware(RequestId, logs=server.access_log)
    return app


def show(request: Request, error: ServeError) -> Response:
    """In the shape of the format whose path was asked, or that a route has found out itself (state.render_error)."""
    render = getattr(request.state, "render_error", None) or find_format(request.url.path).render_error
    response = render(error)
    response.headers.update(error.headers)
    return response


def find_format(path: str) -> ModuleType:
    """The module that has a route at `path`, whatever the method."""
    for module in FORMATS:
        if any(route.path_regex.match(path) for route in module.router.routes):
            return module
    return FORMATS[0] if FORMATS else health


def as_serve_error(error: Exception) -> ServeError:
    """What is not known is a mistake of ours, which the log shows and the client does not."""
    match error:
        case ServeError():
            return error
        case UserError():
            return ServeError(422, str(error))
        case RequestValidationError():
            return validation(error)
        case HTTPException():
            return ServeError(error.status_code, str(error.detail))
    return ServeError(500, "internal error")


def validation(error: RequestValidationError) -> ServeError:
    """The first thing wrong with a body, in one line."""
    if isinstance(error.body, bytes) and error.body:
        return ServeError(422, "expected JSON, sent with Content-Type: application/json")
    first = error.errors()[0]
    where = ".".join(find_place(first["loc"], error.body, missing=first["type"] == "missing"))
    if first["type"] == "json_invalid":
        return ServeError(400, f"the body is not JSON: {first['ctx']['error']}")
    return ServeError(422, f"{where}: {first['msg']}" if where else first["msg"], param=where or None)


def find_place(loc: Sequence[int | str], body: Any, *, missing: bool) -> list[str]:
    """An error's place as the client wrote it: without the names that pydantic gives to the members of unions."""
    if loc[0] != "body":
        return [str(part) for part in loc[1:]]
    found, value = [], body
    for number, part in enumerate(loc[1:], 2):
        inside = part in value if isinstance(value, dict) else isinstance(part, int) and isinstance(value, list)
        if inside:
            value = value[part]
        if inside or (missing and number == len(loc)):
            found.append(str(part))
    return found
