"""y = x W^T + b by native/linear.c over a packed weight, in memory of its own or still in a file."""

from __future__ import annotations

import logging
import mmap
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from threading import Thread, get_native_id

import torch
import torch.nn.functional as F

from mmdist.blocks import COLUMNS, ROWS

log = logging.getLogger("mmdist.kernels")
# As block.h numbers them; BF12 is bfloat16 without loss in 12 bits (pack.c).
BF16, INT8, INT4, BF12 = range(4)
BITS = {BF16: 16, INT8: 8, INT4: 4, BF12: 12}
NICE = 10  # of the thread that moves weights, behind the products that wait for a core


@dataclass(frozen=True)
class Packed:
    """A weight as mmdist_linear takes it. side: beside its words, integers' scales or what BF12 leaves over."""

    kind: int
    words: torch.Tensor
    side: torch.Tensor | None = None
    groups: int = 1

    @cached_property
    def arguments(self) -> tuple[int, int, int, int]:
        side = 0 if self.side is None else self.side.data_ptr()
        return self.kind, self.words.data_ptr(), side, self.groups


class NativeLinear:
    def __init__(self, run: Callable, packed: Packed, shape: tuple[int, ...]):
        """run: mmdist_linear. packed: the weight of `shape` (out, in)."""
        self.run, self.packed, (self.out, self.columns) = run, packed, shape

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        missing = -self.columns % COLUMNS
        x = F.pad(x, (0, missing)) if missing else x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.out)
        bias_address = 0 if bias is None else bias.data_ptr()
        packed = self.packed  # one look: a thread may put another form in its place meanwhile
        self.run(
            *packed.arguments, bias_address, x.data_ptr(), y.data_ptr(), y.numel() // self.out, self.out,
            self.columns + missing,
        )  # fmt: skip
        return y


class Mover:
    """Moves weights out of files behind what else goes on: a file's small pages slow the stream of weights down, and
    filling fresh memory takes seconds that no one is to wait for."""

    def __init__(self, move: Callable[[NativeLinear], Packed]) -> None:
        self.move = move
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
                linear = self.waiting.popleft()
                linear.packed = self.move(linear)
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
