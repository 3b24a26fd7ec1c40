"""One JSON line a request, with the id that the client sent or that is given to it."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from datetime import UTC, datetime
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("mmdist.access")
LEGAL_ID = re.compile(r"[\w.:-]{1,256}", re.ASCII)


def init_access_log() -> None:
    """On stdout, beside nothing else."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False


class RequestId:
    """Gives every request an id (X-Request-Id, the client's own where it is a sound one), and logs its end."""

    def __init__(self, app: ASGIApp, logs: bool):
        self.app, self.logs = app, logs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if LEGAL_ID.fullmatch(given) else uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        start, status, size = time.perf_counter(), 499, 0  # 499: the client left before there was an answer

        async def note(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            else:
                size += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, note)
        finally:
            if self.logs:
                self.write(scope, request_id, status, size, time.perf_counter() - start)

    def write(self, scope: Scope, request_id: str, status: int, size: int, seconds: float) -> None:
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": request_id,
            "client": (scope.get("client") or ("", 0))[0],
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "bytes": size,
            "seconds": round(seconds, 4),
        }
        log.info(json.dumps(line))
