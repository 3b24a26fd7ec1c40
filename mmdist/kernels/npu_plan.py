"""Which operation serves which job on each Ascend chip, why, within what limits, and what does it beyond them.

The files npu*.py do as it says: a test records what they call. task=plan prints it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TORCH = "torch"  # torch's own operations, each run by the chip


@dataclass(frozen=True)
class Job:
    """operations: as the dispatcher names them. otherwise: what takes over where the limits end."""

    job: str
    operations: tuple[str, ...]
    why: str
    limits: str
    otherwise: str


RMS_NORM = Job(
    "rms norm", ("npu::npu_rms_norm",), "one pass over the row", "rows of 32 bytes or more, one dtype", "torch"
)
ADD_RMS_NORM = Job(
    "residual + norm", ("npu::npu_add_rms_norm",), "the sum is not read back", "as rms norm, equal shapes", "torch"
)
ROPE = Job(
    "rotary positions",
    ("npu::npu_apply_rotary_pos_emb",),
    "q and k at once; npu_rotary_mul needs jit_compile=True on a 310P",
    "head_dim 64 or 128",
    "torch",
)
GATED = Job(
    "gated mlp", ("npu::npu_swiglu",), "one pass instead of three", "silu, gate | up a multiple of 32 wide", "torch"
)
BIASED = Job(
    "attention with a bias (vlmo)",
    (TORCH,),
    "no operation of both chips adds a table to the scores",
    "any",
    "products and a softmax in float32",
)
PICKING = Job("likeliest tokens", (TORCH,), "a few rows of the vocabulary's part", "any", "argmax, topk, sort")

# Chips whose decoding cannot be captured, and why.
WITHOUT_GRAPHS = {"310p": "CANN's documents know captured streams on A2 and A3 only, not on a 310P"}

PLANS: dict[str, tuple[Job, ...]] = {
    "310p": (
        RMS_NORM,
        ADD_RMS_NORM,
        ROPE,
        GATED,
        Job(
            "linear",
            ("npu::npu_format_cast",),
            "the chip multiplies tiles of 16 x 16: weights are cast to FRACTAL_NZ once, then torch's linear",
            "float16, both sides multiples of 16",
            "torch's linear over ND",
        ),
        Job(
            "linear w8a16",
            ("npu::npu_weight_quant_batchmatmul",),
            "int8 is read, not turned back; ND, seen transposed (NZ only in graph mode)",
            "int8, a scale a row, sides up to 65535; w4a16 is refused",
            "turned back for each product by torch (groups of columns)",
        ),
        Job(
            "cache write",
            ("atb::_npu_reshape_and_cache",),
            "the cache is (blocks, kv_heads * head_dim / 16, block_size, 16) in FRACTAL_NZ, as decoding reads it",
            "float16, head_dim a multiple of 16, block_size 128 or 64, block_size * head_dim at most 16384",
            "refused at the start",
        ),
        Job(
            "prefill, whole prompt",
            ("atb::_npu_flash_attention",),
            "shared KV heads, which npu_prompt_flash_attention has not on this chip; FIA is not for it",
            "float16, tokens padded to 16, a mask of tokens x tokens in FRACTAL_NZ, lengths on the host",
            "-",
        ),
        Job(
            "prefill, later chunks",
            ("atb::_npu_paged_attention_splitfuse",),
            "reads the earlier context where it lies",
            "as above, the mask query x context",
            "-",
        ),
        Job(
            "decode",
            ("atb::_npu_paged_attention",),
            "reads blocks where they lie",
            "lengths on the device; no sliding window that ends within the context",
            "gathered, then products and a softmax in float32",
        ),
        Job(
            "pictures and other attention",
            ("npu::npu_prompt_flash_attention",),
            "documented for this chip, with masks and unequal lengths",
            "float16, heads padded to 16, batch to 128, KV heads repeated where shared, no lengths",
            "products and a softmax in float32 (fewer than 16 queries on shared KV heads)",
        ),
        Job("all-reduce", (TORCH,), "HCCL over PCIe; no LCCL, no fused products", "one machine", "-"),
        BIASED,
        PICKING,
    ),
    "910b": (
        RMS_NORM,
        ADD_RMS_NORM,
        ROPE,
        GATED,
        Job("linear", (TORCH,), "torch's linear over ND; NZ pays for some shapes only, not measured", "any", "-"),
        Job(
            "linear w8a16, w4a16",
            ("npu::npu_weight_quant_batchmatmul", "npu::npu_convert_weight_to_int4pack"),
            "integers are read, not turned back; int8 seen transposed, int4 eight to an int32",
            "a scale a row, or groups of a multiple of 32 columns; sides up to 65535; int4: rows a multiple of 8",
            "turned back for each product by torch",
        ),
        Job(
            "cache write",
            ("npu::npu_scatter_pa_kv_cache",),
            "the cache is (blocks, block_size, kv_heads, head_dim), which attention reads as (blocks, block_size, H)",
            "block_size 128, 256, 384 or 512",
            "refused at the start",
        ),
        Job(
            "prefill and decode",
            ("npu::npu_fused_infer_attention_score",),
            "one operation for all; layout BSH: the documents bind TND to head sizes of 192, or no blocks",
            "head_dim a multiple of 16, up to 64 query heads a KV head, one sequence a call in prefill",
            "gathered, then products and a softmax in float32 (decoding with a sliding window)",
        ),
        Job(
            "pictures and other attention",
            ("npu::npu_fused_infer_attention_score",),
            "as above, heads padded to 16",
            "bool masks",
            "-",
        ),
        Job(
            "product + all-reduce",
            ("npu::npu_mm_all_reduce_base",),
            "sends what is ready while it still multiplies",
            "plain weights, 512 tokens or more in a step, 2, 4 or 8 ranks in a full HCCS mesh",
            "a product, then HCCL's all-reduce (decoding, weights in integers)",
        ),
        BIASED,
        PICKING,
    ),
}  # fmt: skip


def operations(chip: str) -> set[str]:
    """All that the plan of a chip calls, without torch's own."""
    return {operation for job in PLANS[chip] for operation in job.operations} - {TORCH}


def job_lines(job: dict[str, Any]) -> list[str]:
    """A Job as a dict, for people: what does it and why, and what does it beyond the limits."""
    first = f"{job['job']}: {', '.join(job['operations'])} ({job['why']})"
    return [first, f"    within: {job['limits']}; else: {job['otherwise']}"]
