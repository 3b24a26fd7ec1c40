"""What both Ascend chips compute with fused operations of torch_npu, by keyword as their schemas have it.

Which operation serves which job, and what does it where the chip has none, is in npu_plan.py; the rest is torch's own
operations, each of which torch_npu runs on the chip (TORCH_NPU_FALLBACK_CPU_DISABLE=1: or refuses). Limits are the
vendor's documents': Ascend/op-plugin docs/context, and the docstrings of torch_npu.op_plugin.atb.
"""

from __future__ import annotations

from importlib import import_module

import torch
import torch.nn.functional as F

from mmdist.ascend import CHIPS
from mmdist.config import UserError
from mmdist.kernels.kernels import Kernels
from mmdist.kernels.linear import Linear
from mmdist.kernels.pages import Int8Pages, Pages, Size
from mmdist.quant import Quantized

MIN_BYTES = 32  # of a row that is normed
SWIGLU_COLUMNS = 32  # swiglu's input comes in such steps
ROPE_DIMS = (64, 128)
HEAD_DIM_STEP = 16  # all attention here: 32 bytes
MAX_COLUMNS = 65535  # and rows, of a weight in integers
GROUP_STEP = 32  # columns that share a scale
MATMUL_ROWS = 1024  # queries whose scores matmul_attention holds at once


def npu_kernels(device: torch.device, chip: str) -> Kernels:
    """Those of one of CHIPS; or "plain", torch's own."""
    kernels: Kernels = import_module(f"mmdist.kernels.npu_{chip}").KERNELS(device)
    return kernels


class NpuKernels(Kernels):
    chip: str
    quant_bits: tuple[int, ...]  # of weights that the chip multiplies with as they are
    quant_groups: bool  # whether groups of columns may have scales of their own

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.level = f"npu {self.chip}"

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if not can_norm(x, weight):
            return super().rms_norm(x, weight, eps)
        return torch.ops.npu.npu_rms_norm(input=x, gamma=weight, epsilon=eps)[0]

    def add_rms_norm(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not can_norm(x, weight) or x.shape != y.shape:
            return super().add_rms_norm(x, y, weight, eps)
        normed, _, total = torch.ops.npu.npu_add_rms_norm(x1=x, x2=y, gamma=weight, epsilon=eps)
        return total, normed

    def gated(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        if activation != "silu" or gate_up.shape[-1] % SWIGLU_COLUMNS:
            return super().gated(gate_up, activation)
        return torch.ops.npu.npu_swiglu(input=gate_up, dim=-1)

    def quantized_linear(self, weight: Quantized) -> Linear:
        rows, columns = weight.q.shape
        groups = weight.scale.shape[1]
        if weight.bits not in self.quant_bits:
            raise UserError(
                f"weights of {weight.bits} bits: a {CHIPS[self.chip].title} multiplies with int8 only; use quant=w8a16"
            )
        group = columns // groups
        odd_groups = groups > 1 and (not self.quant_groups or group % GROUP_STEP or columns % groups)
        if odd_groups or max(rows, columns) > MAX_COLUMNS or (weight.bits == 4 and rows % 8):
            return DequantizedLinear(weight)
        return NpuQuantizedLinear(weight)

    def pages(self, kv_cache_dtype: str, size: Size, dtype: torch.dtype) -> Pages | Int8Pages:
        head_dim = size[-1]
        if head_dim % HEAD_DIM_STEP:
            raise UserError(f"heads of {head_dim} numbers: a {CHIPS[self.chip].title} attends to multiples of 16 only")
        assert kv_cache_dtype == "auto", "engine_settings() refuses others"
        return self.empty_pages(size, dtype)

    def empty_pages(self, size: Size, dtype: torch.dtype) -> Pages:
        raise NotImplementedError


def can_norm(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return x.dtype == weight.dtype and x.shape[-1] * x.itemsize >= MIN_BYTES


class NpuQuantizedLinear:
    """Integers as they are stored, (out, in), seen as (in, out): the vendor's fast form for a scale a row."""

    def __init__(self, weight: Quantized):
        groups = weight.scale.shape[1]
        self.group_size = weight.q.shape[1] // groups if groups > 1 else 0
        self.scale = weight.scale.T.contiguous() if groups > 1 else weight.scale.flatten()
        # Ours is (q - offset) * scale, the operation's (q + offset) * scale.
        offset = None if weight.offset is None else -weight.offset
        self.offset = offset if offset is None else offset.T.contiguous() if groups > 1 else offset.flatten()
        if weight.bits == 4:
            whole = weight.q.T.to(torch.int32).contiguous()
            self.weight = torch.ops.npu.npu_convert_weight_to_int4pack(weight=whole)
        else:
            self.weight = weight.q.T

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.scale.dtype != x.dtype:  # stored in float32, wanted in x's
            self.scale = self.scale.to(x.dtype)
            self.offset = None if self.offset is None else self.offset.to(x.dtype)
        if bias is not None and x.dtype == torch.bfloat16:
            bias = bias.float()
        y = torch.ops.npu.npu_weight_quant_batchmatmul(
            x=x.flatten(0, -2),
            weight=self.weight,
            antiquant_scale=self.scale,
            antiquant_offset=self.offset,
            bias=bias,
            antiquant_group_size=self.group_size,
        )
        return y.view(*x.shape[:-1], -1)


class DequantizedLinear:
    """Integers turned back for each product, by torch: what the operation above does not take."""

    def __init__(self, weight: Quantized):
        self.weight = weight

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, self.weight.dequantize().to(x.dtype), bias)


def matmul_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, *, scale: float
) -> torch.Tensor:
    """q (batch, queries, heads, head_dim) over k, v (batch, context, kv_heads, head_dim) -> q's shape, by products and
    a softmax in float32. mask: bool, what is seen; spread over (batch, kv_heads, heads a group, queries, context)."""
    kv_heads = k.shape[2]
    grouped = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)  # batch, kv_heads, group, queries, head_dim
    keys, values = k.permute(0, 2, 3, 1)[:, :, None], v.transpose(1, 2)[:, :, None]
    out = []
    for first in range(0, q.shape[1], MATMUL_ROWS):
        rows = slice(first, first + MATMUL_ROWS)
        scores = torch.matmul(grouped[:, :, :, rows] * scale, keys).float()
        if mask is not None:
            scores = scores.masked_fill(~(mask if mask.shape[-2] == 1 else mask[..., rows, :]), -torch.inf)
        out.append(torch.matmul(scores.softmax(-1).to(v.dtype), values))
    return torch.cat(out, dim=3).permute(0, 3, 1, 2, 4).flatten(2, 3)


def padded_heads(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Zeros behind each head up to a multiple of HEAD_DIM_STEP: they change no product."""
    missing = -tensors[0].shape[-1] % HEAD_DIM_STEP
    return [F.pad(x, (0, missing)) if missing else x for x in tensors]
