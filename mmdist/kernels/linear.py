"""y = x W^T + b over a weight that was made ready once after loading: packed, or kept in integers."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from mmdist.kernels import packed
from mmdist.quant import Quantized

# From this many rows on, a product over integers turned back costs less than the one over integers themselves.
MANY_ROWS = 12


class Linear(Protocol):
    """(..., in), bias or None -> (..., out)"""

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor: ...


class PackedLinear:
    """bfloat16 on a CPU, in oneDNN's order."""

    def __init__(self, weight: torch.Tensor):
        self.weight = packed.pack(weight)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return packed.packed_linear(x, self.weight, bias)


class QuantizedLinear:
    """Integers stay integers in memory. Few rows on a CPU go through torch's int8 product where each row of the weight
    has one scale; else the weight is turned back for the product."""

    def __init__(self, weight: Quantized):
        self.weight = weight
        self.by_row = weight.offset is None and weight.scale.shape[1] == 1
        self.on_cpu = weight.q.device.type == "cpu"

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if not self.by_row:
            return F.linear(x, self.weight.dequantize().to(x.dtype), bias)
        scale = self.weight.scale.flatten()
        rows = x.flatten(0, -2)
        if self.on_cpu and len(rows) < MANY_ROWS:
            y = torch._weight_int8pack_mm(rows, self.weight.q, scale.to(x.dtype))
        else:
            y = (F.linear(rows, self.weight.q.to(x.dtype)) * scale).to(x.dtype)
        y = y.view(*x.shape[:-1], -1)
        return y if bias is None else y + bias
