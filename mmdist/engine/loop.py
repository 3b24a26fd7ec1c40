"""The engine at the service of other threads: they submit requests, its own thread steps."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from mmdist.config import UserError
from mmdist.engine.load import AnyEngine
from mmdist.engine.request import Output, Request, failed

KEEP_ALIVE_S = 30  # how often the other ranks hear from rank 0 while there is nothing to do
T = TypeVar("T")


class EngineLoop:
    """run() belongs to the thread that loaded the engine; every other method may be called from any thread.

    deliver: called in the engine's thread with each step's outputs. A request's last output has a finish_reason.
    """

    def __init__(self, engine: AnyEngine, deliver: Callable[[list[Output]], None]):
        self.engine, self.deliver = engine, deliver
        self.inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.calls: deque[Future] = deque()  # not answered yet
        self.running = True
        self.step_began: float | None = None  # time.monotonic() of the step that is being computed

    def submit(self, request: Request) -> None:
        self.inbox.put(lambda: self._add(request))

    def abort(self, request_id: str) -> None:
        """Forget a request; nothing of it is delivered any more, except what is being computed."""
        self.inbox.put(lambda: self.engine.abort(request_id))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run something between two steps, in the engine's thread."""
        future: Future[T] = Future()
        self.calls.append(future)

        def run() -> None:
            self.calls.remove(future)
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)
                    if not isinstance(error, UserError):
                        raise

        self.inbox.put(run)
        return future

    def stop(self) -> None:
        self.inbox.put(self._stop)

    def run(self) -> None:
        """Step until stop(); what a step raises ends it, as the ranks are then no longer together."""
        try:
            while self.running:
                self._take_messages()
                if self.running and self.engine.has_work:
                    self.step_began = time.monotonic()
                    self.deliver(self.engine.step())
                    self.step_began = None
        finally:
            self.step_began = None
            for future in list(self.calls):
                future.cancel()

    def _take_messages(self) -> None:
        """All there are; waits for one when there is nothing to compute."""
        try:
            self.inbox.get(block=not self.engine.has_work, timeout=KEEP_ALIVE_S)()
            while True:
                self.inbox.get_nowait()()
        except queue.Empty:
            if not self.engine.has_work and self.inbox.empty():
                self.engine.keep_alive()

    def _add(self, request: Request) -> None:
        try:
            self.engine.add(request)
        except UserError as error:
            self.deliver([failed(request.id, request.prompt.token_ids, str(error))])

    def _stop(self) -> None:
        self.running = False
