"""How long each request is in the engine, seen from outside it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from mmdist.engine.request import Output


class Stopwatch:
    """Runs while the engine has the word; stands while requests are read and answers are written."""

    def __init__(self) -> None:
        self.begin = self.resumed = time.perf_counter()
        self.elapsed = 0.0
        self.started: dict[str, float] = {}

    @contextmanager
    def reading(self, request_id: str) -> Iterator[None]:
        """Around what makes a request, which is in the engine from then on."""
        self._pause()
        try:
            yield
            self.started[request_id] = self.elapsed
        finally:
            self._resume()

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
