"""uvicorn in a thread beside the engine's, and its end."""

from __future__ import annotations

import asyncio
import socket
import threading
from asyncio import TimerHandle
from functools import partial
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mmdist.config import UserError
from mmdist.task_config import ServerConfig

BACKLOG = 2048
KEEP_ALIVE_S = 75  # nginx's; with uvicorn's 5 a client's next request often meets a connection that is being closed


class PatientProtocol(HttpToolsProtocol):
    """uvicorn's, that closes a connection whose headers do not come within patience_s (slow loris)."""

    def __init__(self, *args: Any, patience_s: float, **options: Any):
        super().__init__(*args, **options)
        self.patience_s = patience_s
        self.alarm: TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.alarm = self.loop.call_later(self.patience_s, transport.close)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self.alarm is None:  # a later request on the same connection
            self.alarm = self.loop.call_later(self.patience_s, self.transport.close)

    def on_headers_complete(self) -> None:
        self._calm()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._calm()
        super().connection_lost(exc)

    def _calm(self) -> None:
        if self.alarm is not None:
            self.alarm.cancel()
            self.alarm = None


def listen(server: ServerConfig) -> socket.socket:
    """A socket bound to server.host and server.port; UserError where it cannot be."""
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((server.host, server.port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise UserError(
            f"server.host={server.host} server.port={server.port}: cannot listen there ({error}); "
            "choose another server.port="
        ) from error
    listener.listen(BACKLOG)
    return listener


class HttpThread:
    """Serves an app on a listening socket until close()."""

    def __init__(self, app: FastAPI, listener: socket.socket, server: ServerConfig):
        options: dict[str, Any] = {"ssl_certfile": server.ssl_certfile, "ssl_keyfile": server.ssl_keyfile}
        self.server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=cast(Any, partial(PatientProtocol, patience_s=server.body_timeout_s)),
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=1,
                **options,
            )
        )
        self.listener = listener
        self.thread = threading.Thread(target=self._run, name="http", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def _run(self) -> None:
        asyncio.run(self.server.serve([self.listener]))

    def close(self) -> None:
        """Answers that are being sent are sent; then nothing listens any more."""
        self.server.should_exit = True
        self.thread.join()
