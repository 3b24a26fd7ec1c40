"""Collectives that are watched: how often, how many bytes, and how long; only there when someone measures."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any, TypeVar

import torch

from mmdist.collectives.distributed import Collectives

T = TypeVar("T")
HOST = torch.device("cpu")


class CountedCollectives:
    """Those of `inner`. bytes: of the tensors that calls leave on this rank (what is reduced, gathered, broadcast), not
    what a network sends for them. Time on a rank has its waiting for the others in it. What a captured graph repeats is
    not seen."""

    def __init__(self, inner: Collectives):
        self.inner, self.name = inner, inner.name
        self.reset()

    def reset(self) -> None:
        self.calls = self.bytes = 0
        self.seconds = 0.0
        self.events: list[tuple[Any, Any]] = []  # before and after each call on a card

    def time_s(self) -> float:
        """Inside collectives since reset()."""
        for _, last in self.events[-1:]:
            last.synchronize()
        return self.seconds + sum(first.elapsed_time(last) for first, last in self.events) / 1000

    def all_sum(self, x: torch.Tensor) -> None:
        self._run(lambda: self.inner.all_sum(x), x.device)
        self.bytes += x.nbytes

    def all_max(self, x: torch.Tensor) -> None:
        self._run(lambda: self.inner.all_max(x), x.device)
        self.bytes += x.nbytes

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        gathered = self._run(lambda: self.inner.all_gather(x), x.device)
        self.bytes += gathered.nbytes
        return gathered

    def broadcast(self, x: torch.Tensor) -> None:
        self._run(lambda: self.inner.broadcast(x), x.device)
        self.bytes += x.nbytes

    def broadcast_bytes(self, data: bytes) -> bytes:
        received = self._run(lambda: self.inner.broadcast_bytes(data), HOST)
        self.bytes += len(received)
        return received

    def device_group(self, device: torch.device) -> str | None:
        """What a kernel reduces by itself is not seen here."""
        return self.inner.device_group(device)

    def _run(self, call: Callable[[], T], device: torch.device) -> T:
        self.calls += 1
        if device.type != "cpu":  # waiting for the device at every call would change what is measured
            if getattr(torch, device.type).is_current_stream_capturing():  # an event there would be the graph's
                return call()
            first, last = (getattr(torch, device.type).Event(enable_timing=True) for _ in range(2))
            first.record()
            result = call()
            last.record()
            self.events.append((first, last))
            return result
        start = perf_counter()
        result = call()
        self.seconds += perf_counter() - start
        return result
