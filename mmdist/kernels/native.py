"""The kernels compiled from mmdist/native, for bfloat16 on a CPU; one runs at a time, on all threads of one pool."""

from __future__ import annotations

import mmap
from ctypes import c_int, c_long, c_void_p

import torch
import torch.nn.functional as F

from mmdist.kernels.kernels import Kernels
from mmdist.kernels.linear import Linear
from mmdist.native.build import Native, load_library
from mmdist.quant import Quantized

# As linear.c numbers and lays them out.
BF16, INT8, INT4 = range(3)
BITS = {BF16: 16, INT8: 8, INT4: 4}
ROWS, COLUMNS = 32, 8


def find_kernels(level: str, device: torch.device, dtype: torch.dtype) -> Kernels:
    """hardware.kernels for a model of `dtype`; plain torch's where no others are for it."""
    native = load_library(level) if device.type == "cpu" and dtype == torch.bfloat16 else None
    return Kernels(device) if native is None else NativeKernels(device, native)


class NativeKernels(Kernels):
    def __init__(self, device: torch.device, native: Native):
        super().__init__(device)
        self.level = native.level
        native.declare("mmdist_pool_init", None, c_int)(torch.get_num_threads())
        self._pack = native.declare("mmdist_pack", None, c_int, c_void_p, c_void_p, c_long, c_long)
        addresses, sizes = [c_void_p, c_void_p, c_long, c_void_p, c_void_p, c_void_p], [c_long] * 3
        self._linear = native.declare("mmdist_linear", None, c_int, *addresses, *sizes)

    def linear(self, weight: torch.Tensor) -> Linear | None:
        return NativeLinear(self, BF16, weight)

    def quantized_linear(self, weight: Quantized) -> Linear:
        columns, groups = weight.q.shape[1], weight.scale.shape[1]
        if weight.offset is not None or (groups > 1 and columns // groups % COLUMNS):
            return super().quantized_linear(weight)
        return NativeLinear(self, INT8 if weight.bits == 8 else INT4, weight.q, weight.scale)

    def pack(self, kind: int, weight: torch.Tensor) -> torch.Tensor:
        """(out, in) bfloat16 or int8 -> uint8 in blocks, as linear.c reads them."""
        rows, columns = weight.shape
        packed = huge_pages(round_up(rows, ROWS) * round_up(columns, COLUMNS) * BITS[kind] // 8)
        self._pack(kind, weight.contiguous().data_ptr(), packed.data_ptr(), rows, columns)
        return packed


class NativeLinear:
    def __init__(self, kernels: NativeKernels, kind: int, weight: torch.Tensor, scale: torch.Tensor | None = None):
        """weight: (out, in); scale: (out, groups) for integers."""
        self.run, self.kind, (self.out, self.columns) = kernels._linear, kind, weight.shape
        self.weight = kernels.pack(kind, weight)
        self.scales = None if scale is None else blocked(scale)
        self.groups = 1 if scale is None else scale.shape[1]
        self.addresses = self.weight.data_ptr(), 0 if self.scales is None else self.scales.data_ptr()

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        missing = -self.columns % COLUMNS
        x = F.pad(x, (0, missing)) if missing else x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.out)
        bias_address = 0 if bias is None else bias.data_ptr()
        rows = y.numel() // self.out
        self.run(
            self.kind, *self.addresses, self.groups, bias_address, x.data_ptr(), y.data_ptr(), rows, self.out,
            self.columns + missing,
        )  # fmt: skip
        return y


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
