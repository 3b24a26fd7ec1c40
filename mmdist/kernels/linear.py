"""y = x W^T + b over a weight that was made ready once after loading: packed, or kept in integers."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from mmdist.kernels import packed
from mmdist.quant import Quantized

# From this many rows on, a product over integers turned back costs less than the one over integers themselves.
MANY_ROWS = 12
# torch's int8 product reads beyond the weight when a row does not fill its vectors (torch 2.13, bfloat16).
INT8_COLUMNS = 16


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
    """int8 in memory, turned back for each product: right for every weight and device."""

    def __init__(self, weight: Quantized):
        self.weight = weight

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, self.weight.dequantize().to(x.dtype), bias)


class Int8Linear:
    """One scale a row of the weight: it comes after the product. On a CPU few rows go through torch's int8 product."""

    def __init__(self, weight: Quantized):
        self.q, self.scale = weight.q, weight.scale.flatten()
        self.fits_product = weight.q.device.type == "cpu" and weight.q.shape[1] % INT8_COLUMNS == 0

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = x.flatten(0, -2)
        if self.fits_product and len(rows) < MANY_ROWS:
            y = torch._weight_int8pack_mm(rows, self.q, self.scale.to(x.dtype))
        else:
            y = (F.linear(rows, self.q.to(x.dtype)) * self.scale).to(x.dtype)
        y = y.view(*x.shape[:-1], -1)
        return y if bias is None else y + bias


class Int4Linear:
    """Two values a byte; turned back for each product."""

    def __init__(self, weight: Quantized):
        low, high = weight.q.unflatten(1, (-1, 2)).unbind(-1)
        self.packed = (low & 15) | (high << 4)
        self.scale = weight.scale

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        low = (self.packed << 4) >> 4  # the shifts carry the sign
        q = torch.stack((low, self.packed >> 4), dim=-1).flatten(1)
        return F.linear(x, Quantized(4, q, self.scale).dequantize().to(x.dtype), bias)


def quantized_linear(weight: Quantized) -> Linear:
    if weight.offset is not None:
        return QuantizedLinear(weight)
    if weight.bits == 4:
        return Int4Linear(weight)
    return Int8Linear(weight) if weight.scale.shape[1] == 1 else QuantizedLinear(weight)
