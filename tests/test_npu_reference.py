"""The reference kernels of NPU operations (tests/npu): they compute what plain torch does, and refuse by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from npu.chip import Chip, ChipLimit
from npu.reference_ops import reference_ops

from mmdist.kernels import plain

P, A2 = Chip("Ascend310P3"), Chip("Ascend910B3")
CHIPS = pytest.mark.parametrize("chip", [P, A2], ids=lambda chip: chip.soc)
HALF = torch.float16
LENS = (5, 27)


def rand(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.float(), want.float(), rtol=2e-3, atol=2e-3)


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    return plain.prefill_attention(q.float(), k.float(), v.float(), scale=scale, window=None)


def tiled(mask: torch.Tensor) -> torch.Tensor:
    """(queries, context) as a 310P wants it."""
    mask = F.pad(mask, (0, -mask.shape[1] % 16, 0, -mask.shape[0] % 16))
    return mask.unflatten(1, (-1, 16)).transpose(0, 1)[None].contiguous()


def hidden(queries: int, context: int) -> torch.Tensor:
    return ~plain.causal_mask(queries, context, None, torch.device("cpu"))


def additive(queries: int, context: int) -> torch.Tensor:
    return torch.zeros(queries, context, dtype=HALF).masked_fill(hidden(queries, context), -torch.inf)


def caches(chip: Chip, kv_heads: int, head_dim: int, block_size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    tail = (kv_heads * head_dim // 16, block_size, 16) if chip.is_310p else (block_size, kv_heads, head_dim)
    return torch.zeros(6, *tail, dtype=HALF), torch.zeros(6, *tail, dtype=HALF)


@CHIPS
def test_norms_and_activations(chip: Chip) -> None:
    ops = reference_ops(chip)
    x, y, gamma = rand(3, 2, 64), rand(3, 2, 64) * 2, rand(64)
    want = plain.rms_norm(x.float(), gamma.float(), 1e-5)
    close(ops["npu::npu_rms_norm"](x, gamma, epsilon=1e-5)[0], want)
    normed, _, total = ops["npu::npu_add_rms_norm"](x, y, gamma, epsilon=1e-5)
    close(total, x + y)
    close(normed, plain.rms_norm((x + y).float(), gamma.float(), 1e-5))
    close(ops["npu::npu_swiglu"](x), F.silu(x[..., :32]) * x[..., 32:])


@CHIPS
def test_rotary_positions(chip: Chip) -> None:
    ops = reference_ops(chip)
    angles = rand(7, 32, dtype=torch.float32).repeat(1, 2)[:, None]
    cos, sin = angles.cos().to(HALF), angles.sin().to(HALF)
    q, k = rand(7, 4, 64), rand(7, 2, 64)
    want = [plain.apply_rope(x.float(), cos.float(), sin.float()) for x in (q, k)]
    q2, k2 = q.flatten(1).clone(), k.flatten(1).clone()
    table = torch.cat((cos[:, 0, :32], sin[:, 0, :32]), -1)
    ops["atb::_npu_rotary_embedding"](torch.arange(7), q2, k2, 64, table, True)
    got = ops["npu::npu_apply_rotary_pos_emb"](q[None], k[None], cos[None], sin[None])
    for a, b, c in zip(got, (q2, k2), want, strict=True):
        close(a[0], c)
        close(b.view(c.shape), c)
    close(q, want[0])  # in place


@pytest.mark.parametrize("group_size", [0, 32])
def test_products_over_integers(group_size: int) -> None:
    ops = reference_ops(A2)
    q, x, bias = torch.randint(-8, 8, (48, 64)), rand(5, 64), rand(48)
    groups = 64 // group_size if group_size else 1
    scale, offset = rand(48, groups) / 8, rand(48, groups)
    wide = ((q.float().unflatten(1, (groups, -1)) + offset[..., None]) * scale[..., None]).flatten(1)
    arguments = {"antiquant_scale": scale.T.contiguous(), "antiquant_offset": offset.T.contiguous(), "bias": bias}
    want = F.linear(x.float(), wide, bias.float())
    packed = ops["npu::npu_convert_weight_to_int4pack"](q.T.int().contiguous())
    for weight in (q.to(torch.int8).T, packed):
        got = ops["npu::npu_weight_quant_batchmatmul"](x, weight, antiquant_group_size=group_size, **arguments)
        torch.testing.assert_close(got.float(), want, rtol=5e-3, atol=2e-2)


@CHIPS
def test_nnal_prompt_then_decode(chip: Chip) -> None:
    """Flash over whole prompts, their keys to the cache, then chunks and single queries read from there."""
    ops, heads, kv_heads, head_dim, scale = reference_ops(chip), 4, 2, 32, 0.2
    tokens, total = sum(LENS), sum(LENS)
    q, k, v = rand(tokens, heads, head_dim), rand(tokens, kv_heads, head_dim), rand(tokens, kv_heads, head_dim) * 3
    rows = [slice(0, LENS[0]), slice(LENS[0], total)]
    want = torch.cat([causal(q[r], k[r], v[r], scale) for r in rows])
    mask = additive(32, 32)
    out = torch.empty_like(q)
    fixed = {"scale_value": scale, "num_heads": heads, "num_kv_heads": kv_heads}
    ops["atb::_npu_flash_attention"](
        q, k, v, tiled(mask) if chip.is_310p else mask, torch.tensor(LENS, dtype=torch.int32), out=out, **fixed
    )
    close(out, want)

    cached = caches(chip, kv_heads, head_dim, 16)
    table = torch.tensor([[5, 0], [2, 3]], dtype=torch.int32)
    slots = torch.cat([table[i].repeat_interleave(16)[:n] * 16 + torch.arange(n) % 16 for i, n in enumerate(LENS)])
    ops["atb::_npu_reshape_and_cache"](k, v, *cached, slots.int())
    contexts = torch.tensor(LENS, dtype=torch.int32)
    last = torch.stack([q[r][-1] for r in rows])
    out = torch.empty_like(last)
    ops["atb::_npu_paged_attention"](last, *cached, block_table=table, context_lens=contexts, out=out, **fixed)
    close(out, torch.stack([want[r][-1] for r in rows]))

    new = (2, 3)
    chunk = torch.cat([q[r][-n:] for r, n in zip(rows, new, strict=True)])
    mask = torch.cat([F.pad(additive(n, c), (0, 27 - c)) for n, c in zip(new, LENS, strict=True)])
    out = torch.empty_like(chunk)
    mask, lens = tiled(mask) if chip.is_310p else mask, torch.tensor(new, dtype=torch.int32)
    ops["atb::_npu_paged_attention_splitfuse"](chunk, *cached, table, contexts, mask, lens, out=out, **fixed)
    close(out, torch.cat([want[r][-n:] for r, n in zip(rows, new, strict=True)]))


@CHIPS
def test_pictures(chip: Chip) -> None:
    ops, q = reference_ops(chip), rand(9, 4, 64)
    out = torch.empty_like(q)
    ops["atb::_npu_flash_attention_unpad"](q, q, q, torch.tensor([4, 5], dtype=torch.int32), 0.1, 4, 4, out)
    want = [plain.full_attention(*(x[None].float(),) * 3, scale=0.1)[0] for x in (q[:4], q[4:])]
    close(out, torch.cat(want))


@CHIPS
@pytest.mark.parametrize("layout", ["BSH", "BNSD"])
def test_prompt_attention(chip: Chip, layout: str) -> None:
    q, k, v = rand(2, 6, 4, 32), rand(2, 9, 4, 32), rand(2, 9, 4, 32) + 1

    def shaped(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2) if layout == "BSH" else x.transpose(1, 2).contiguous()

    op = reference_ops(chip)["npu::npu_prompt_flash_attention"]
    fixed = {"num_heads": 4, "scale_value": 0.2, "input_layout": layout}
    want = torch.stack([causal(*part, 0.2) for part in zip(q, k, v, strict=True)])
    got = op(*map(shaped, (q, k, v)), atten_mask=hidden(6, 9), next_tokens=2147483647, **fixed)
    close(got, shaped(want))
    # The default, next_tokens=0, hides what lies right of the diagonal from the first token on, too.
    got = op(*map(shaped, (q, k, v)), atten_mask=torch.zeros(6, 9, dtype=torch.bool), **fixed)
    first = torch.stack([causal(a, b[:6], c[:6], 0.2) for a, b, c in zip(q, k, v, strict=True)])
    close(got, shaped(first))


def test_incremental_attention() -> None:
    q, cache, table = rand(2, 4, 1, 32), rand(6, 2, 16, 32), torch.tensor([[5, 0], [2, 3]], dtype=torch.int32)
    got = reference_ops(P)["npu::npu_incre_flash_attention"](
        q, cache, cache, actual_seq_lengths=LENS, block_table=table, block_size=16, num_heads=4,
        num_key_value_heads=2, scale_value=0.2, input_layout="BNSD",
    )  # fmt: skip
    for i, length in enumerate(LENS):
        k = cache[table[i].long()].transpose(1, 2).flatten(0, 1)[:length]
        close(got[i, :, 0], causal(q[i].transpose(0, 1), k, k, 0.2)[0])


def test_fused_attention() -> None:
    """Prompts in TND, then single queries over blocks in BSH."""
    op, scale = reference_ops(A2)["npu::npu_fused_infer_attention_score"], 0.2
    triangle = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    q, k, v = rand(32, 4, 64), rand(32, 2, 64), rand(32, 2, 64) + 1
    fixed = {"num_heads": 4, "num_key_value_heads": 2, "scale": scale}
    ends = [LENS[0], sum(LENS)]
    got, _ = op(
        q, k, v, atten_mask=triangle, actual_seq_lengths=ends, actual_seq_lengths_kv=ends, input_layout="TND",
        sparse_mode=3, **fixed,
    )  # fmt: skip
    rows = [slice(0, LENS[0]), slice(LENS[0], 32)]
    want = torch.cat([causal(q[r], k[r], v[r], scale) for r in rows])
    close(got, want)

    cache = caches(A2, 2, 64)
    table = torch.tensor([[4], [1]], dtype=torch.int32)
    slots = torch.cat([table[i] * 128 + torch.arange(n) for i, n in enumerate(LENS)])
    reference_ops(A2)["npu::npu_scatter_pa_kv_cache"](k, v, *cache, slots, cache_mode="Norm")
    keys, values = (x.flatten(2) for x in cache)
    last = torch.stack([q[r][-1:] for r in rows]).flatten(2)
    got, _ = op(last, keys, values, actual_seq_lengths_kv=LENS, block_table=table, block_size=128, **fixed)
    close(got.view(2, 4, 64), torch.stack([want[r][-1] for r in rows]))
    got, _ = op(
        q[rows[1]][None, -3:].flatten(2), keys, values, atten_mask=triangle, sparse_mode=3,
        actual_seq_lengths_kv=LENS[1:], block_table=table[1:], block_size=128, **fixed,
    )  # fmt: skip
    close(got.view(3, 4, 64), want[-3:])


def test_fused_all_reduce() -> None:
    def all_reduce(x: torch.Tensor, hcom: str) -> int:
        assert hcom == "group"
        x += x.clone()
        return 2

    x, weight = rand(3, 16), rand(16, 8)
    got = reference_ops(Chip("Ascend910B3", all_reduce))["npu::npu_mm_all_reduce_base"](x, weight, "group")
    close(got, 2 * x @ weight)


def rope(dtype: torch.dtype = HALF, head_dim: int = 64, layout: str = "BSND") -> tuple:
    q, angle = rand(1, 4, 2, head_dim, dtype=dtype), rand(1, 4, 1, head_dim, dtype=dtype)
    return q, q.clone(), angle, angle, layout


def prompt(q_dim: int = 64, **more: object) -> tuple[tuple, dict]:
    q = rand(1, 4, 4 * q_dim)
    return (q, q, q), {"num_heads": 4, **more}


def paged(chip: Chip, head_dim: int = 64, block_size: int = 128, dtype: torch.dtype = torch.int32) -> tuple:
    q, table = rand(1, 2, head_dim), torch.zeros(1, 1, dtype=dtype)
    cached = caches(chip, 2, head_dim, block_size)
    return q, *cached, 2, 2, 1.0, table, torch.tensor([3], dtype=torch.int32), torch.empty_like(q)


def fused(block_size: int, queries: int = 4, **more: object) -> tuple[tuple, dict]:
    cache, table = torch.zeros(2, block_size, 128, dtype=HALF), torch.zeros(1, 1, dtype=torch.int32)
    return (rand(1, queries, 128), cache, cache), {
        "num_heads": 2, "actual_seq_lengths_kv": [4], "block_table": table, "block_size": block_size, **more,
    }  # fmt: skip


def product(group_size: int = 0, dtype: torch.dtype = HALF, weight_dtype: torch.dtype = torch.int8) -> tuple:
    groups = -(-96 // group_size) if group_size else 1
    scale = rand(groups, 8, dtype=dtype)
    return rand(2, 96, dtype=dtype), torch.zeros(96, 8).to(weight_dtype), scale, None, None, None, None, group_size


def tiny_mask() -> torch.Tensor:
    return torch.zeros(2047, 2047, dtype=torch.bool)


BF16 = torch.bfloat16
# chip, operation, arguments, words of the limit
VIOLATIONS: dict[str, tuple[Chip, str, tuple[tuple, dict], str]] = {
    "bf16 norm": (P, "npu_rms_norm", ((rand(2, 64, dtype=BF16), rand(64, dtype=BF16)), {}), "bfloat16"),
    "bf16 rope": (P, "npu_apply_rotary_pos_emb", (rope(BF16), {}), "bfloat16"),
    "bf16 W8A16": (P, "npu_weight_quant_batchmatmul", (product(dtype=BF16), {}), "bfloat16"),
    "short rows": (P, "npu_rms_norm", ((rand(2, 8), rand(8)), {}), "32 bytes"),
    "gamma": (A2, "npu_rms_norm", ((rand(2, 64), rand(63)), {}), "gamma"),
    "odd swiglu": (A2, "npu_swiglu", ((rand(2, 63),), {}), "odd"),
    "swiglu step": (P, "npu_swiglu", ((rand(2, 48),), {}), "multiple of 32"),
    "rope head_dim": (P, "npu_apply_rotary_pos_emb", (rope(head_dim=80), {}), "head_dim 80"),
    "rope layout": (A2, "npu_apply_rotary_pos_emb", (rope(layout="BNSD"), {}), "layout BNSD"),
    "rotary_mul": (P, "npu_rotary_mul", ((rand(1, 4, 2, 64),) * 3, {}), "jit_compile"),
    "group size 48": (A2, "npu_weight_quant_batchmatmul", (product(48), {}), "antiquant_group_size 48"),
    "int4": (P, "npu_weight_quant_batchmatmul", (product(weight_dtype=torch.int32), {}), "int4"),
    "float weight": (A2, "npu_weight_quant_batchmatmul", (product(weight_dtype=HALF), {}), "int8"),
    "wide weight": (
        P, "npu_weight_quant_batchmatmul", ((rand(1, 1), torch.zeros(1, 65536).to(torch.int8), rand(1)), {}), "65535",
    ),
    "GQA through PromptFA": (P, "npu_prompt_flash_attention", prompt(num_key_value_heads=2), "GQA"),
    "PromptFA lengths": (P, "npu_prompt_flash_attention", prompt(actual_seq_lengths=[4]), "actual_seq_lengths"),
    "PromptFA sparse": (P, "npu_prompt_flash_attention", prompt(sparse_mode=3), "sparse_mode 3"),
    "PromptFA window": (P, "npu_prompt_flash_attention", prompt(next_tokens=5), "next_tokens 5"),
    "PromptFA head_dim": (P, "npu_prompt_flash_attention", prompt(88), "head_dim 88"),
    "float mask": (P, "npu_prompt_flash_attention", prompt(atten_mask=rand(4, 4)), "atten_mask is torch.float16"),
    "blind query": (
        A2, "npu_prompt_flash_attention", prompt(atten_mask=torch.ones(4, 4, dtype=torch.bool)), "sees nothing",
    ),
    "FIA": (P, "npu_fused_infer_attention_score", fused(128), "no such operation"),
    "FIA mask side": (
        A2, "npu_fused_infer_attention_score", fused(128, sparse_mode=3, atten_mask=tiny_mask()), "2048",
    ),
    "FIA triangle": (
        A2,
        "npu_fused_infer_attention_score",
        fused(128, sparse_mode=3, atten_mask=torch.zeros(2048, 2048, dtype=torch.bool)),
        "triangle",
    ),
    "FIA block_size": (A2, "npu_fused_infer_attention_score", fused(64), "block_size 64"),
    "FIA decode block_size": (A2, "npu_fused_infer_attention_score", fused(24, 1), "block_size 24"),
    "FIA layout": (A2, "npu_fused_infer_attention_score", fused(128, input_layout="SBH"), "input_layout SBH"),
    "FIA block table": (
        A2, "npu_fused_infer_attention_score", fused(128, actual_seq_lengths_kv=[129]), "block_table has 1 columns",
    ),
    "scatter": (P, "npu_scatter_pa_kv_cache", ((rand(1, 2, 64),) * 4 + (torch.zeros(1).int(),), {}), "no such"),
    "slot": (
        P, "_npu_reshape_and_cache",
        ((rand(1, 2, 64), rand(1, 2, 64), *caches(P, 2, 64), torch.tensor([768], dtype=torch.int32)), {}), "slot",
    ),
    "cache layout": (
        P, "_npu_reshape_and_cache",
        ((rand(1, 2, 64), rand(1, 2, 64), *caches(A2, 2, 64), torch.zeros(1).int()), {}), "the cache is",
    ),
    "cache block": (P, "_npu_paged_attention", (paged(P, 256, 128), {}), "over 16384"),
    "int64 table": (A2, "_npu_paged_attention", (paged(A2, dtype=torch.int64), {}), "block_table is torch.int64"),
    "mm_all_reduce": (P, "npu_mm_all_reduce_base", ((rand(2, 16), rand(16, 8), "group"), {}), "no such operation"),
    "NZ of float32": (P, "npu_format_cast", ((rand(16, 16, dtype=torch.float32), 29), {}), "float32"),
    "unpadded heads": (
        P, "_npu_flash_attention_unpad",
        ((rand(4, 2, 80),) * 3 + (torch.tensor([4], dtype=torch.int32), 1.0, 2, 2, rand(4, 2, 80)), {}), "head_dim 80",
    ),
    "sixteens": (
        P, "_npu_flash_attention",
        ((rand(4, 2, 64),) * 3 + (tiled(additive(4, 4)), torch.tensor([4]).int(), 1.0, 2, 2, rand(4, 2, 64)), {}),
        "multiple of 16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", VIOLATIONS)
def test_violations_are_named(case: str) -> None:
    chip, name, (args, kwargs), words = VIOLATIONS[case]
    ops: dict[str, Callable] = {key.partition("::")[2]: function for key, function in reference_ops(chip).items()}
    with pytest.raises(ChipLimit, match=name) as error:
        ops[name](*args, **kwargs)
    assert chip.soc in str(error.value) and words in str(error.value)
