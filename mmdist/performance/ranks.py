"""What all ranks do at once while rank 0 leads: measure the limits, run a batch, trace one.

The others wait in follow() for rank 0's orders, which end as an engine's batches do, with the engine's stop().
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from mmdist.backend import GIB, peak_memory, reset_peak_memory
from mmdist.collectives.counted import CountedCollectives
from mmdist.engine.load import AnyEngine
from mmdist.performance.limits import Limits, Work, find_work, measure_limits
from mmdist.spans import TimedSpans

T = TypeVar("T")
LIMITS, RUN, TRACE, WORK = "limits", "run", "trace", "work"


@dataclass(frozen=True)
class Order:
    """file: of a trace, with {rank} in its name."""

    what: str
    file: str = ""


@dataclass(frozen=True)
class RankReport:
    """What one rank saw of a run; peak_memory_gib is None where it cannot be asked."""

    collective_ms: float
    collective_bytes: int
    collective_calls: int
    peak_memory_gib: float | None


class Ranks:
    """This rank's part in what all do. engine: whose tp is counted and whose spans are timed."""

    def __init__(self, engine: AnyEngine):
        assert isinstance(engine.spans, TimedSpans), "open_engine() of task=performance makes them"
        self.engine, self.tp, self.device, self.spans = engine, engine.tp, engine.device, engine.spans

    def limits(self) -> Limits:
        """Rank 0's call, as are work(), run() and trace()."""
        self.tp.broadcast_object(Order(LIMITS))
        return self._limits()

    def work(self) -> Work | None:
        self.tp.broadcast_object(Order(WORK))
        return find_work(self.engine)

    def run(self, lead: Callable[[], T]) -> tuple[T, list[RankReport]]:
        """lead() gives the engine its requests; the other ranks follow it. Its result, and every rank's report."""
        self.tp.broadcast_object(Order(RUN))
        return self._run(lambda: self._leading(lead))

    def trace(self, file: Path, lead: Callable[[], T]) -> T:
        """A run under torch's profiler; each rank writes its own file."""
        order = Order(TRACE, str(file))
        self.tp.broadcast_object(order)
        return self._trace(order, lambda: self._leading(lead))

    def follow(self) -> int:
        """The other ranks' life, until rank 0's engine stops; returns the exit code 0."""
        while (order := self.tp.broadcast_object(None)) is not None:
            if order.what == LIMITS:
                self._limits()
            elif order.what == WORK:
                find_work(self.engine)
            elif order.what == RUN:
                self._run(self.engine.follow)
            else:
                self._trace(order, self.engine.follow)
        return 0

    def _leading(self, lead: Callable[[], T]) -> T:
        result = lead()
        self.engine.stop()
        return result

    def _limits(self) -> Limits:
        return measure_limits(self.tp, self.device, self.engine.model.dtype)

    def _run(self, part: Callable[[], T]) -> tuple[T, list[RankReport]]:
        counted, can_reset = self.tp.group, reset_peak_memory(self.device)
        self.spans.reset()
        if isinstance(counted, CountedCollectives):
            counted.reset()
        result = part()
        row = [0.0] * 3
        if isinstance(counted, CountedCollectives):
            row = [counted.time_s() * 1000, counted.bytes, counted.calls]
        row.append(peak_memory(self.device) / GIB if can_reset else torch.nan)
        rows = self.tp.all_gather(torch.tensor(row, dtype=torch.float64)).view(-1, len(row)).tolist()
        return result, [
            RankReport(ms, int(size), int(calls), None if gib != gib else gib) for ms, size, calls, gib in rows
        ]

    def _trace(self, order: Order, part: Callable[[], T]) -> T:
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as traced:
            result = part()
        traced.export_chrome_trace(order.file.format(rank=self.tp.rank))
        return result
