"""Which chip a reference kernel stands for, and how it refuses what that chip would refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

ND, FRACTAL_NZ = 2, 29  # aclFormat
TILE = 16  # of FRACTAL_NZ, in numbers of 16 bits
HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32)


class ChipLimit(RuntimeError):
    """An operation called outside what its chip can do; the message names the operation, the chip and the limit."""


@dataclass(frozen=True)
class Chip:
    """all_reduce: (partial sums, name of the communicator) -> how many ranks; sums in place. None: not in a job."""

    soc: str
    all_reduce: Callable[[torch.Tensor, str], int] | None = None

    @property
    def is_310p(self) -> bool:
        return self.soc.startswith("Ascend310P")


@dataclass(frozen=True)
class Op:
    """What a reference kernel checks its arguments with."""

    name: str
    chip: Chip

    def require(self, legal: bool, limit: str) -> None:
        if not legal:
            raise ChipLimit(f"{self.name} on {self.chip.soc}: {limit}")

    def only_on_a2(self) -> None:
        self.require(not self.chip.is_310p, "the chip has no such operation")

    def dtype(self, legal: tuple[torch.dtype, ...] = HALVES, **tensors: torch.Tensor | None) -> None:
        """Each of them in `legal`, and all the same; a 310P knows no bfloat16."""
        given = {name: x.dtype for name, x in tensors.items() if x is not None}
        for name, dtype in given.items():
            self.require(not (self.chip.is_310p and dtype == torch.bfloat16), f"{name} is bfloat16")
            self.require(dtype in legal, f"{name} is {dtype}, not {' or '.join(map(str, legal))}")
        self.require(len(set(given.values())) <= 1, f"dtypes differ: {given}")

    def contiguous(self, **tensors: torch.Tensor | None) -> None:
        for name, x in tensors.items():
            self.require(x is None or x.is_contiguous(), f"{name} is not contiguous")

    def shape(self, x: torch.Tensor, wanted: tuple[int, ...], what: str) -> None:
        self.require(tuple(x.shape) == wanted, f"{what} is {tuple(x.shape)}, not {wanted}")

    def none(self, **arguments: Any) -> None:
        """Arguments the chip, or this emulation, does not take."""
        for name, value in arguments.items():
            self.require(value is None, f"{name} is not supported here")

    def format(self, wanted: int, **tensors: torch.Tensor) -> None:
        """ND or FRACTAL_NZ, where the emulator has noted it (see Emulator.host)."""
        for name, x in tensors.items():
            found = getattr(x, "npu_format", wanted)
            self.require(found == wanted, f"{name} is in format {found}, not {wanted} (2: ND, 29: FRACTAL_NZ)")

    def place(self, wanted: str, **tensors: torch.Tensor) -> None:
        """cpu or npu, where the emulator has noted it."""
        for name, x in tensors.items():
            found = getattr(x, "npu_place", wanted)
            self.require(found == wanted, f"{name} is on the {found}, not the {wanted}")


Kernel = Callable[..., Any]
KERNELS: dict[str, Kernel] = {}  # by the schema's name, e.g. "npu::npu_rms_norm"


def kernel(name: str) -> Callable[[Kernel], Kernel]:
    """Register the reference kernel of an operation: (Op, *the schema's arguments) -> what the schema returns."""

    def register(function: Kernel) -> Kernel:
        KERNELS[name] = function
        return function

    return register
