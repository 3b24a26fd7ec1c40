"""bfloat16 linear over weights that oneDNN has packed once: on a CPU twice as fast at few rows as over plain ones.

The operators are those that torch's own compiler uses (torch/_inductor/mkldnn_lowerings.py).
"""

from __future__ import annotations

import torch


def can_pack(weight: torch.Tensor) -> bool:
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return on_cpu and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack(weight: torch.Tensor) -> torch.Tensor:
    """(out, in) -> the same numbers in oneDNN's order; the caller lets the plain one go."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def packed_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(..., in) -> (..., out)"""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
