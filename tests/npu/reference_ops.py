"""Reference kernels: what torch_npu's fused operations compute, on the CPU, and what each chip refuses.

reference_ops(chip) -> {"npu::npu_rms_norm": function, ...}, each called as the operation's schema says. Formulas and
limits are the vendor's: the docstrings shipped in torch_npu 2.13.0 (_op_plugin_docs.py, op_plugin/atb/_atb_api_docs.py)
and Ascend/op-plugin docs/context; where those are silent, what vllm-ascend's 310P code does. torch alone is imported.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from npu import reference_attention
from npu.chip import FLOATS, FRACTAL_NZ, HALVES, KERNELS, ND, Chip, Kernel, Op, kernel

assert reference_attention.__name__  # importing it registers its kernels
MIN_ROW_BYTES = 32
SWIGLU_STEP = 32
ROPE_DIMS = (64, 128)
MAX_WEIGHT_SIDE = 65535
GROUP_STEP = 32
Tensor = torch.Tensor
Pair = tuple[Tensor, Tensor]


def reference_ops(chip: Chip) -> dict[str, Kernel]:
    return {name: partial(function, Op(name.partition("::")[2], chip)) for name, function in KERNELS.items()}


# Norms and activations


def check_norm(op: Op, x: Tensor, gamma: Tensor) -> None:
    op.dtype((torch.float16,) if op.chip.is_310p else FLOATS, input=x, gamma=gamma)
    op.require(1 <= x.dim() <= 8, f"{x.dim()} dimensions, not 1 to 8")
    op.shape(gamma, tuple(x.shape[x.dim() - gamma.dim() :]), "gamma")
    wide = x.shape[-1] * x.element_size() >= MIN_ROW_BYTES
    op.require(wide or not op.chip.is_310p, f"rows of {x.shape[-1]} numbers are shorter than {MIN_ROW_BYTES} bytes")


def normed(x: Tensor, gamma: Tensor, epsilon: float) -> Pair:
    """RmsNorm in float32; its reciprocal root mean square, too."""
    wide, dims = x.float(), tuple(range(-gamma.dim(), 0))
    rstd = torch.rsqrt(wide.pow(2).mean(dims, keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(x.dtype), rstd


@kernel("npu::npu_rms_norm")
def npu_rms_norm(op: Op, input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> Pair:
    check_norm(op, input, gamma)
    return normed(input, gamma, epsilon)


@kernel("npu::npu_add_rms_norm")
def npu_add_rms_norm(
    op: Op, x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    check_norm(op, x1, gamma)
    op.dtype(FLOATS, x1=x1, x2=x2)
    op.shape(x2, tuple(x1.shape), "x2")
    total = x1 + x2
    return (*normed(total, gamma, epsilon), total)


@kernel("npu::npu_swiglu")
def npu_swiglu(op: Op, input: Tensor, dim: int = -1) -> Tensor:
    size = input.shape[dim]
    op.dtype((torch.float16,) if op.chip.is_310p else FLOATS, input=input)
    op.require(size % 2 == 0, f"dimension {dim} is odd: {size}")
    op.require(not op.chip.is_310p or size % SWIGLU_STEP == 0, f"dimension {dim} is {size}, not a multiple of 32")
    gate, up = input.float().chunk(2, dim=dim)
    return (F.silu(gate) * up).to(input.dtype)


# Rotary positions


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@kernel("npu::npu_apply_rotary_pos_emb")
def npu_apply_rotary_pos_emb(
    op: Op, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: str = "BSND", rotary_mode: str = "half"
) -> Pair:
    """In place."""
    op.require(rotary_mode == "half", f"rotary_mode {rotary_mode}, not half")
    op.require(layout in ("BSND", "TND"), f"layout {layout}, not BSND or TND")
    op.dtype((torch.float16, torch.float32) if op.chip.is_310p else FLOATS, query=query, key=key, cos=cos, sin=sin)
    op.require(query.dim() == len(layout), f"query has {query.dim()} dimensions in layout {layout}")
    op.require(query.numel() > 0 and key.numel() > 0, "an empty tensor")
    head_dim, lead = query.shape[-1], tuple(query.shape[:-2])
    op.require(head_dim in ROPE_DIMS, f"head_dim {head_dim}, not 64 or 128")
    op.shape(key, (*lead, key.shape[-2], head_dim), "key")
    for name, x in (("cos", cos), ("sin", sin)):
        op.shape(x, (*lead, 1, head_dim), name)
    for x in (query, key):
        x.copy_(rotate_half(x.float(), cos.float(), sin.float()))
    return query, key


@kernel("npu::npu_rotary_mul")
def npu_rotary_mul(
    op: Op, input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    op.require(not op.chip.is_310p, "only with jit_compile=True, which no inference stack uses on this chip")
    op.none(rotate=rotate)
    op.require(rotary_mode == "half", f"rotary_mode {rotary_mode} is not emulated")
    op.dtype(FLOATS, input=input, r1=r1, r2=r2)
    op.require(input.dim() == 4, f"{input.dim()} dimensions, not 4")
    head_dim = input.shape[-1]
    op.require(head_dim < 896 and head_dim % 2 == 0, f"head_dim {head_dim}, not even and below 896")
    for name, x in (("r1", r1), ("r2", r2)):
        pairs = zip(x.shape, input.shape, strict=True)
        op.require(x.shape[-1] == head_dim and all(a in (1, b) for a, b in pairs), f"{name} is {tuple(x.shape)}")
    return rotate_half(input.float(), r1.float(), r2.float()).to(input.dtype)


@kernel("atb::_npu_rotary_embedding")
def npu_rotary_embedding(
    op: Op, positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox_style: bool
) -> None:
    """In place on (tokens, heads * head_size); cos_sin_cache: (positions, cos | sin), each half as wide as a head."""
    op.dtype(HALVES, query=query, key=key, cos_sin_cache=cos_sin_cache)
    op.require(is_neox_style, "interleaved pairs are not emulated")
    op.require(query.dim() == key.dim() == 2, "query and key have 2 dimensions")
    op.contiguous(query=query, key=key)
    op.require(head_size % 16 == 0, f"head_size {head_size}, not a multiple of 16")
    op.shape(cos_sin_cache, (cos_sin_cache.shape[0], head_size), "cos_sin_cache")
    op.shape(positions, (query.shape[0],), "positions")
    cos, sin = (torch.cat((part, part), -1)[:, None].float() for part in cos_sin_cache[positions.long()].chunk(2, -1))
    for x in (query, key):
        heads = x.unflatten(-1, (-1, head_size))
        heads.copy_(rotate_half(heads.float(), cos, sin))


# Products over weights in integers


@kernel("npu::npu_convert_weight_to_int4pack")
def npu_convert_weight_to_int4pack(op: Op, weight: Tensor, inner_k_tiles: int = 0) -> Tensor:
    """Eight numbers of 4 bits in an int32, the first in the lowest bits."""
    op.only_on_a2()
    op.dtype((torch.int32,), weight=weight)
    op.contiguous(weight=weight)
    op.require(weight.dim() == 2 and weight.shape[-1] % 8 == 0, f"{tuple(weight.shape)}: columns come in eights")
    op.require(bool((weight.abs() <= 8).all() and (weight < 8).all()), "a number outside -8 to 7")
    nibbles = (weight & 15).unflatten(-1, (-1, 8)).long() << torch.arange(0, 32, 4)
    return nibbles.sum(-1).to(torch.int32)


def unpacked(packed: Tensor) -> Tensor:
    """(rows, columns / 8) int32 -> (rows, columns)"""
    nibbles = packed[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32) & 15
    return (nibbles - 16 * (nibbles > 7)).flatten(-2)


def whole_weight(op: Op, weight: Tensor, columns: int) -> Tensor:
    """(K, N) numbers of an int8 weight, or of an int4 one packed along N, or along K when it is a transposed view."""
    if weight.dtype == torch.int32:
        op.require(not op.chip.is_310p, "weight is int4, not int8")
        weight = unpacked(weight.T).T if weight.shape[0] * 8 == columns else unpacked(weight)
    else:
        op.dtype((torch.int8,), weight=weight)
    op.require(weight.shape[0] == columns, f"x has {columns} columns and weight {weight.shape[0]} rows")
    op.require(max(weight.shape) <= MAX_WEIGHT_SIDE, f"weight is {tuple(weight.shape)}, at most 65535 a side")
    return weight


def dequantized(op: Op, weight: Tensor, scale: Tensor, offset: Tensor | None, group_size: int) -> Tensor:
    """(weight + offset) * scale in float32; scale: (1,), (1, 1), (N,), (1, N), or (groups, N)."""
    columns, rows = weight.shape
    if group_size:
        legal = GROUP_STEP <= group_size < columns and group_size % GROUP_STEP == 0
        op.require(legal, f"antiquant_group_size {group_size}, not a multiple of 32 from 32 to K - 1 = {columns - 1}")
        op.shape(scale, (-(-columns // group_size), rows), "antiquant_scale")
    else:
        legal_shapes = ((1,), (1, 1), (rows,), (1, rows))
        op.require(tuple(scale.shape) in legal_shapes, f"antiquant_scale is {tuple(scale.shape)} for N = {rows}")
    if offset is not None:
        op.shape(offset, tuple(scale.shape), "antiquant_offset")
    scale, offset = (
        None if x is None else (x.repeat_interleave(group_size, 0)[:columns] if group_size else x.flatten()).float()
        for x in (scale, offset)
    )
    weight = weight.float() if offset is None else weight.float() + offset
    return weight * scale


@kernel("npu::npu_weight_quant_batchmatmul")
def npu_weight_quant_batchmatmul(
    op: Op,
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> Tensor:
    op.none(quant_scale=quant_scale, quant_offset=quant_offset, weight_dtype=weight_dtype)
    op.dtype(HALVES, x=x, antiquant_scale=antiquant_scale, antiquant_offset=antiquant_offset)
    op.require(x.dim() == 2 and weight.dim() == 2, f"x has {x.dim()} dimensions and weight {weight.dim()}, not 2")
    op.require(x.numel() > 0, "x is empty")
    op.format(ND, weight=weight)  # FRACTAL_NZ: in graph mode only
    whole = whole_weight(op, weight, x.shape[1])
    y = x.float() @ dequantized(op, whole, antiquant_scale, antiquant_offset, antiquant_group_size)
    if bias is not None:
        op.dtype((torch.float32,) if x.dtype == torch.bfloat16 else (torch.float16,), bias=bias)
        op.contiguous(bias=bias)
        op.require(tuple(bias.shape) in ((y.shape[1],), (1, y.shape[1])), f"bias is {tuple(bias.shape)}")
        y = y + bias.float()
    return y.to(x.dtype)


@kernel("npu::npu_mm_all_reduce_base")
def npu_mm_all_reduce_base(
    op: Op,
    x1: Tensor,
    x2: Tensor,
    hcom: str,
    *,
    reduce_op: str = "sum",
    bias: Tensor | None = None,
    comm_turn: int = 0,
    **others: object,
) -> Tensor:
    op.only_on_a2()
    op.none(**{name: value for name, value in others.items() if value not in (0, None)})
    op.require(reduce_op == "sum" and comm_turn == 0, f"reduce_op {reduce_op}, comm_turn {comm_turn}, not sum and 0")
    op.dtype(HALVES, x1=x1, x2=x2, bias=bias)
    op.contiguous(x1=x1)
    op.require(x1.dim() in (2, 3) and x2.dim() == 2, f"x1 has {x1.dim()} dimensions and x2 {x2.dim()}")
    op.require(x1.shape[-1] == x2.shape[0], f"x1 has {x1.shape[-1]} columns and x2 {x2.shape[0]} rows")
    op.require(op.chip.all_reduce is not None, "outside a job")
    assert op.chip.all_reduce is not None
    y = x1 @ x2
    size = op.chip.all_reduce(y, hcom)
    op.require(size in (1, 2, 4, 8), f"{size} ranks, not 1, 2, 4 or 8")
    return y if bias is None else y + bias


# Formats and types


@kernel("npu::npu_format_cast")
def npu_format_cast(
    op: Op, input: Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    """The same numbers; the emulator lays them out."""
    op.none(customize_dtype=customize_dtype, input_dtype=input_dtype)
    op.require(acl_format in (ND, FRACTAL_NZ), f"format {acl_format} is not emulated")
    if acl_format == FRACTAL_NZ:
        op.dtype((*HALVES, torch.int8), input=input)
        op.require(input.dim() >= 2, "FRACTAL_NZ has two dimensions at least")
    return input.clone()


@kernel("npu::_npu_dtype_cast")
def cast(op: Op, input: Tensor, dtype: torch.dtype) -> Tensor:
    return input.to(dtype)
