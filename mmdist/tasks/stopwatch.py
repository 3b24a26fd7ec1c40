"""How long each request is in the engine, seen from outside it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from mmdist.engine.request import Output, Request


class Stopwatch:
    """Runs while the engine has the word; stands while requests are read and answers are written."""

    def __init__(self) -> None:
        self.begin = self.resumed = time.perf_counter()
        self.elapsed = 0.0
        self.started: dict[str, float] = {}

    def requests(self, requests: Iterable[Request]) -> Iterator[Request]:
        source = iter(requests)
        while True:
            self._pause()
            request = next(source, None)
            self._resume()
            if request is None:
                return
            self.started[request.id] = self.elapsed
            yield request

    def outputs(self, outputs: Iterable[Output]) -> Iterator[Output]:
        source = iter(outputs)
        while True:
            self._resume()
            output = next(source, None)
            self._pause()
            if output is None:
                return
            yield output

    def timing(self, request_id: str) -> dict[str, float]:
        """seconds: of a request that has just ended, in the engine; since_start_s: of the run, reading included."""
        seconds = self.elapsed - self.started.pop(request_id)
        return {"seconds": seconds, "since_start_s": time.perf_counter() - self.begin}

    def _resume(self) -> None:
        self.resumed = time.perf_counter()

    def _pause(self) -> None:
        self.elapsed += time.perf_counter() - self.resumed
