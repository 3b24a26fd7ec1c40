"""Collectives that are watched: how often, how many bytes, and how long; only there when someone measures."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import TypeVar

import torch

from mmdist.collectives.distributed import Collectives

T = TypeVar("T")


class CountedCollectives:
    """Those of `inner`. bytes: of the tensors that calls leave on this rank (what is reduced, gathered, broadcast), not
    what a network sends for them. Time on a rank has its waiting for the others in it."""

    def __init__(self, inner: Collectives):
        self.inner, self.name = inner, inner.name
        self.reset()

    def reset(self) -> None:
        self.calls = self.bytes = 0
        self.seconds = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def time_s(self) -> float:
        """Inside collectives since reset()."""
        if self.events:
            torch.cuda.synchronize()
        return self.seconds + sum(first.elapsed_time(last) for first, last in self.events) / 1000

    def all_sum(self, x: torch.Tensor) -> None:
        self._run(lambda: self.inner.all_sum(x), x.is_cuda)
        self.bytes += x.nbytes

    def all_max(self, x: torch.Tensor) -> None:
        self._run(lambda: self.inner.all_max(x), x.is_cuda)
        self.bytes += x.nbytes

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        gathered = self._run(lambda: self.inner.all_gather(x), x.is_cuda)
        self.bytes += gathered.nbytes
        return gathered

    def broadcast(self, x: torch.Tensor) -> None:
        self._run(lambda: self.inner.broadcast(x), x.is_cuda)
        self.bytes += x.nbytes

    def broadcast_bytes(self, data: bytes) -> bytes:
        received = self._run(lambda: self.inner.broadcast_bytes(data), False)
        self.bytes += len(received)
        return received

    def _run(self, call: Callable[[], T], on_device: bool) -> T:
        self.calls += 1
        if on_device:  # waiting for the device at every call would change what is measured
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            result = call()
            last.record()
            self.events.append((first, last))
            return result
        start = perf_counter()
        result = call()
        self.seconds += perf_counter() - start
        return result
