"""What stands before every route: API keys, the size of a body and the time it takes to arrive."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Callable

from fastapi import Request
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmdist.serving.errors import ServeError
from mmdist.task_config import ServerConfig

MB = 10**6
OPEN_PATHS = ("/health", "/v2/health", "/metrics")  # for probes and scrapers, which have no key
OPEN_PAGE = ("/page",)  # the chat page, which asks for the key itself


class Guard:
    """show: from an error to the format's answer."""

    def __init__(
        self, app: ASGIApp, server: ServerConfig, api_keys: list[str], show: Callable[[Request, ServeError], Response]
    ):
        self.app, self.server, self.show = app, server, show
        self.api_keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self.check_key(scope)
            body = await self.read_body(scope, receive)
            check_text(body)
        except ServeError as error:
            response = self.show(Request(scope), error)
            response.headers["Connection"] = "close"  # what is left of the body is not read
            await response(scope, receive, send)
            return
        await self.app(scope, replay(body, receive), send)

    def check_key(self, scope: Scope) -> None:
        """ServeError 401, in constant time whatever keys there are."""
        if not self.api_keys or is_open(scope):
            return
        headers = Headers(scope=scope)
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = (bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")).encode()
        matches = [hmac.compare_digest(given, key) for key in self.api_keys]
        if not any(matches):
            found = "that is not one of them" if given else "there was none"
            raise ServeError(401, f"send an API key as Authorization: Bearer KEY; {found}")

    async def read_body(self, scope: Scope, receive: Receive) -> bytes:
        """ServeError 413 as soon as it is too large, 408 when it does not come in time."""
        limit = self.server.max_body_mb * MB
        too_large = ServeError(413, f"the body is larger than {self.server.max_body_mb:g} MB (server.max_body_mb)")
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdigit() and int(length) > limit:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.server.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise ServeError(400, "the client left")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ServeError(
                408, f"the request did not arrive within {self.server.body_timeout_s:g} s (server.body_timeout_s)"
            ) from None


def check_text(body: bytes) -> None:
    """ServeError 400 for halves of surrogate pairs, which JSON can name and no tokenizer takes."""
    if b"\\ud" not in body and b"\\uD" not in body:
        return
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ServeError(400, "the body has half of a surrogate pair in a text") from error
    except (ValueError, RecursionError):
        return  # no JSON, as its reader will say


def is_open(scope: Scope) -> bool:
    path = scope["path"]
    if path == "/" or any(path.startswith(f"{name}/") for name in OPEN_PAGE):
        return scope["method"] in ("GET", "HEAD")
    return any(path == name or path.startswith(f"{name}/") for name in OPEN_PATHS)


def replay(body: bytes, receive: Receive) -> Receive:
    """The body that was read, then what the client does next (it may leave)."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again
