"""Where a rank's seconds go, phase by phase; passed in to whoever has phases, never looked up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any

from torch.profiler import record_function

# LLaMA-Adapter's timers and what lies between them, in the order of a request.
PHASES = ("preprocess", "vision", "broadcast", "prefill", "decode", "sample", "detokenise")
NOTHING: AbstractContextManager[Any] = nullcontext()


class Spans:
    """`with spans("prefill"):` does nothing; what an engine has that is not measured."""

    def __call__(self, name: str) -> AbstractContextManager[Any]:
        return NOTHING


class TimedSpans(Spans):
    """Adds up. seconds: of each name, without the spans inside it; entered: of each time it was entered, with them.

    synchronize: waits for the device, so that a span has what was begun in it and nothing else. traced: the spans are
    ranges of a running torch.profiler, too.
    """

    def __init__(self, synchronize: Callable[[], None], *, traced: bool = False):
        self.synchronize, self.traced = synchronize, traced
        self.open: list[tuple[str, float]] = []
        self.reset()

    def reset(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.entered: dict[str, list[float]] = defaultdict(list)
        self.since = perf_counter()

    def __call__(self, name: str) -> AbstractContextManager[Any]:
        return TracedSpan(self, name) if self.traced else Span(self, name)

    def enter(self, name: str) -> None:
        now = self._count()
        self.open.append((name, now))

    def leave(self) -> None:
        now = self._count()
        name, began = self.open.pop()
        self.entered[name].append(now - began)

    def _count(self) -> float:
        """The time since the last border belongs to the innermost span."""
        self.synchronize()
        now = perf_counter()
        if self.open:
            self.seconds[self.open[-1][0]] += now - self.since
        self.since = now
        return now


class Span:
    def __init__(self, spans: TimedSpans, name: str):
        self.spans, self.name = spans, name

    def __enter__(self) -> None:
        self.spans.enter(self.name)

    def __exit__(self, *_: Any) -> None:
        self.spans.leave()


class TracedSpan(Span):
    def __enter__(self) -> None:
        super().__enter__()
        self.range = record_function(self.name)
        self.range.__enter__()

    def __exit__(self, *_: Any) -> None:
        self.range.__exit__(None, None, None)
        super().__exit__()


def cost_s(count: int = 20_000) -> float:
    """Seconds that one span of a host takes, on this machine, now."""
    spans = TimedSpans(lambda: None)
    start = perf_counter()
    for _ in range(count):
        with spans("span"):
            pass
    return (perf_counter() - start) / count
