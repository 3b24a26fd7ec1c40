"""y = x W^T + b by native/linear.c over a packed weight, in memory of its own or still in a file."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from collections import deque
from collections.abc import Callable
from threading import Thread, get_native_id

import torch
import torch.nn.functional as F

from mmdist.blocks import COLUMNS, ROWS

log = logging.getLogger("mmdist.kernels")
# As linear.c numbers them.
BF16, INT8, INT4 = range(3)
BITS = {BF16: 16, INT8: 8, INT4: 4}
NICE = 10  # of the thread that moves weights, behind the products that wait for a core


class NativeLinear:
    def __init__(
        self,
        run: Callable,
        kind: int,
        packed: torch.Tensor,
        shape: tuple[int, ...],
        scale: torch.Tensor | None = None,
    ):
        """run: mmdist_linear. packed: the weight of `shape` (out, in) in blocks; scale: (out, groups) for integers."""
        self.run, self.kind, (self.out, self.columns) = run, kind, shape
        self.scales = None if scale is None else blocked(scale)
        self.groups = 1 if scale is None else scale.shape[1]
        self.hold(packed)

    def hold(self, packed: torch.Tensor) -> None:
        """In one assignment: a product in another thread has the old memory or the new, and keeps it to its end."""
        self.held = packed, packed.data_ptr(), 0 if self.scales is None else self.scales.data_ptr()

    def move(self) -> None:
        """The same bytes to memory of their own, in large pages."""
        packed, address, _ = self.held
        memory = huge_pages(packed.nbytes)
        ctypes.memmove(memory.data_ptr(), address, packed.nbytes)  # leaves Python's lock, and takes one thread
        self.hold(memory)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        missing = -self.columns % COLUMNS
        x = F.pad(x, (0, missing)) if missing else x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.out)
        bias_address = 0 if bias is None else bias.data_ptr()
        rows = y.numel() // self.out
        _held, *addresses = self.held
        self.run(
            self.kind, *addresses, self.groups, bias_address, x.data_ptr(), y.data_ptr(), rows, self.out,
            self.columns + missing,
        )  # fmt: skip
        return y


class Mover:
    """Moves weights out of files behind what else goes on: a file's small pages slow the stream of weights down, and
    filling fresh memory takes seconds that no one is to wait for."""

    def __init__(self) -> None:
        self.waiting: deque[NativeLinear] = deque()
        self.thread: Thread | None = None

    def start(self) -> None:
        """Once for all that are waiting; a process that ends does not wait for it."""
        if self.waiting and self.thread is None:
            self.thread = Thread(target=self._move_all, name="move-weights", daemon=True)
            self.thread.start()

    def _move_all(self) -> None:
        if hasattr(os, "PRIO_PROCESS") and os.name == "posix":
            os.setpriority(os.PRIO_PROCESS, get_native_id(), NICE)  # Linux: of this thread alone
        try:
            while self.waiting:
                self.waiting.popleft().move()
        except OSError as error:  # no memory: it works where it is
            log.warning("weights are used in their file from now on, which is slower: %s", error)


def blocked(scale: torch.Tensor) -> torch.Tensor:
    """(out, groups) -> float32 (blocks, groups, ROWS)"""
    filled = F.pad(scale.float(), (0, 0, 0, -len(scale) % ROWS))
    return filled.unflatten(0, (-1, ROWS)).transpose(1, 2).contiguous()


def huge_pages(size: int) -> torch.Tensor:
    """Zeros, uint8 (size,), in few large pages where the system has them: the stream of weights then runs faster."""
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared ones stay small
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def round_up(count: int, step: int) -> int:
    return -(-count // step) * step
