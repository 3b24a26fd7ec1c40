"""The NPU kernels' calls bind to torch_npu's schemas and, over the reference kernels, give plain torch's numbers.

The reference kernels refuse what each chip would; nothing here is a chip.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import run_ranks
from npu.chip import ChipLimit
from npu.library import operations_of

from mmdist.ascend import CHIPS
from mmdist.config import CHIPS as CHIP_NAMES
from mmdist.config import UserError
from mmdist.kernels import plain
from mmdist.kernels.kernels import Kernels
from mmdist.kernels.npu import NpuKernels, npu_kernels
from mmdist.kernels.npu_plan import PLANS, operations
from mmdist.kernels.paged import DecodeTables, Prefill
from mmdist.kernels.pages import Slots
from mmdist.layers.linear import RowParallelLinear
from mmdist.quant import Scheme, quantize
from mmdist.tp import TP

CPU = torch.device("cpu")
CALLED: dict[str, set[str]] = {chip: set() for chip in PLANS}
CLOSE = {"rtol": 2e-2, "atol": 4e-3}  # float16, sums in another order


@pytest.fixture(params=PLANS)
def chip(request: Any) -> Iterator[str]:
    with operations_of(request.param) as called:
        yield request.param
    CALLED[request.param] |= called


@pytest.fixture
def kernels(chip: str) -> NpuKernels:
    torch.manual_seed(0)
    kernels = npu_kernels(CPU, chip)
    assert isinstance(kernels, NpuKernels)
    return kernels


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape).half()


def test_every_chip_has_a_plan() -> None:
    assert set(PLANS) == set(CHIPS) == set(CHIP_NAMES) - {"auto"}


@pytest.mark.parametrize("shape", ((5, 64), (2, 3, 16), (3, 8)))
def test_norms(kernels: NpuKernels, shape: tuple[int, ...]) -> None:
    """The last of them is too short for the operation."""
    x, y, weight = half(*shape), half(*shape), half(shape[-1])
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-5), plain.rms_norm(x, weight, 1e-5), **CLOSE)
    both = (some.add_rms_norm(x, y, weight, 1e-5) for some in (kernels, Kernels(CPU)))
    for got, want in zip(*both, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize(("width", "activation"), ((64, "silu"), (36, "silu"), (64, "gelu")))
def test_gated(kernels: NpuKernels, width: int, activation: str) -> None:
    x = half(3, width)
    torch.testing.assert_close(kernels.gated(x, activation), Kernels(CPU).gated(x, activation), **CLOSE)


@pytest.mark.parametrize("shape", ((48, 32), (40, 32)))
def test_linear(kernels: NpuKernels, shape: tuple[int, int]) -> None:
    weight, x, bias = half(*shape), half(2, 3, shape[1]), half(shape[0])
    linear = kernels.linear(weight)
    got = torch.nn.functional.linear(x, weight, bias) if linear is None else linear(x, bias)
    torch.testing.assert_close(got, torch.nn.functional.linear(x, weight, bias), **CLOSE)


@pytest.mark.parametrize("offset", (False, True))
@pytest.mark.parametrize("scheme", (Scheme(8), Scheme(8, 64), Scheme(8, 48), Scheme(4), Scheme(4, 32)))
def test_quantized_linear(kernels: NpuKernels, scheme: Scheme, offset: bool) -> None:
    columns = 192
    weight = quantize(torch.randn(40, columns), scheme)
    weight.offset = torch.full_like(weight.scale, 3) if offset else None
    if scheme.bits not in kernels.quant_bits:
        with pytest.raises(UserError, match="multiplies with int8 only; use quant=w8a16"):
            kernels.quantized_linear(weight)
        return
    x, bias = half(2, 3, columns), half(40)
    want = torch.nn.functional.linear(x.float(), weight.dequantize(), bias.float())
    got = kernels.quantized_linear(weight)(x, bias)
    torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("kv_heads", (4, 2))
@pytest.mark.parametrize(("queries", "context"), ((17, 17), (3, 40), (32, 9)))
def test_attention_over_all(kernels: NpuKernels, queries: int, context: int, kv_heads: int) -> None:
    """Heads of 24 numbers are filled up to 32."""
    q, k, v = half(2, queries, 4, 24), half(2, context, kv_heads, 24), half(2, context, kv_heads, 24)
    got = kernels.attention(q, k, v, scale=0.3)
    torch.testing.assert_close(got, plain.full_attention(q, k, v, scale=0.3), **CLOSE)


@pytest.mark.parametrize("queries", (2, 33))
def test_masked_attention(kernels: NpuKernels, queries: int) -> None:
    q, k, v = half(queries, 4, 32), half(50, 2, 32), half(50, 2, 32)
    mask = torch.rand(queries, 50) < 0.5
    got = kernels.masked_attention(q, k, v, mask, scale=0.2)
    torch.testing.assert_close(got, plain.masked_attention(q, k, v, mask, scale=0.2), **CLOSE)


@pytest.mark.parametrize("window", (None, 20))
@pytest.mark.parametrize("head_dim", (16, 64, 128))
def test_the_cache(kernels: NpuKernels, head_dim: int, window: int | None) -> None:
    """A prompt in two chunks, a whole one, and a token after each, over blocks out of order."""
    size, heads = CHIPS[kernels.chip].block_sizes[0], (4, 2, 2)
    caches = [Cache(some, size, head_dim, heads) for some in (kernels, Kernels(CPU))]
    steps = [([2, 0], 0, 150), ([2, 0], 150, 187), ([1], 0, 30)]
    for table, first, last in steps:
        x = half(last - first, sum(heads) * head_dim)
        got, want = (cache.prefill(x.clone(), table, first, last, window) for cache in caches)
        torch.testing.assert_close(got, want, **CLOSE)
    x = half(2, sum(heads) * head_dim)
    got, want = (cache.decode(x.clone(), [[2, 0], [1]], [188, 31], window) for cache in caches)
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("window", (None, 20))
def test_torch_alone(window: int | None) -> None:
    """hardware.kernels=plain."""
    kernels, heads = npu_kernels(CPU, "plain"), (4, 2, 2)
    q, k, v, mask = half(2, 5, 4, 16), half(2, 9, 2, 16), half(2, 9, 2, 16), torch.rand(5, 9) < 0.7
    torch.testing.assert_close(kernels.attention(q, k, v, scale=0.3), plain.full_attention(q, k, v, scale=0.3), **CLOSE)
    got, want = (some.masked_attention(q[0], k[0], v[0], mask, scale=0.3) for some in (kernels, Kernels(CPU)))
    torch.testing.assert_close(got, want, **CLOSE)
    caches = [Cache(some, 16, 16, heads) for some in (kernels, Kernels(CPU))]
    for first, last in ((0, 19), (19, 30)):
        x = half(last - first, 8 * 16)
        got, want = (cache.prefill(x.clone(), [2, 0], first, last, window) for cache in caches)
        torch.testing.assert_close(got, want, **CLOSE)
    x = half(1, 8 * 16)
    got, want = (cache.decode(x.clone(), [[2, 0]], [31], window) for cache in caches)
    torch.testing.assert_close(got, want, **CLOSE)


class Cache:
    """Layer 1 of two, with random rotations."""

    def __init__(self, kernels: Kernels, block_size: int, head_dim: int, heads: tuple[int, int, int]):
        self.size, self.heads = block_size, heads
        room = (2, 3, heads[1], block_size, head_dim)
        self.attention = kernels.paged_attention(*(kernels.pages("auto", room, torch.float16) for _ in range(2)))
        angles = torch.linspace(0, 9, 200)[:, None] * torch.linspace(1, 0.1, head_dim // 2)
        self.angles = torch.cat((angles, angles), -1)[:, None]

    def store(self, x: torch.Tensor, places: list[tuple[list[int], int]]) -> tuple[torch.Tensor, ...]:
        slots = [table[token // self.size] * self.size + token % self.size for table, token in places]
        angles = self.angles[[token for _, token in places]]
        rope = angles.cos().half(), angles.sin().half()
        return self.attention.store(1, x, self.heads, rope, Slots(torch.tensor(slots), self.size))

    def prefill(self, x: torch.Tensor, table: list[int], first: int, last: int, window: int | None) -> torch.Tensor:
        q, k, v = self.store(x, [(table, token) for token in range(first, last)])
        part = Prefill(table, last - first, last, self.size, CPU)
        return self.attention.prefill(1, q, k, v, part, scale=0.2, window=window)

    def decode(self, x: torch.Tensor, block_tables: list[list[int]], lens: list[int], window: int | None):
        q, _, _ = self.store(x, [(table, length - 1) for table, length in zip(block_tables, lens, strict=True)])
        tables = DecodeTables(block_tables, lens, self.size, CPU)
        return self.attention.decode(1, q, tables, scale=0.2, window=window)


class Named:
    """A rank's collectives with a communicator for operations on the device."""

    def __init__(self, tp: TP):
        self.tp = tp

    def device_group(self, device: torch.device) -> str:
        return f"hcom of rank {self.tp.rank}"

    def all_sum(self, x: torch.Tensor) -> None:
        self.tp.all_reduce(x)


def test_a_product_fused_with_its_all_reduce() -> None:
    weight, x = half(8, 32), half(600, 32)

    ranks: dict[str, TP] = {}

    def all_reduce(y: torch.Tensor, hcom: str) -> int:
        ranks[hcom].all_reduce(y)
        return len(ranks)

    def work(tp: TP) -> tuple[torch.Tensor, torch.Tensor]:
        group = Named(tp)
        ranks[group.device_group(CPU)] = tp
        tp = TP(tp.rank, tp.size, group)
        layer = RowParallelLinear(32, 8, tp, bias=True)
        part = slice(tp.rank * 16, tp.rank * 16 + 16)
        layer.weight, layer.bias = (
            torch.nn.Parameter(p, False) for p in (weight[:, part].clone(), torch.ones(8).half())
        )
        layer.after_load(npu_kernels(CPU, "910b"))
        return layer(x[:, part]), layer(x[:5, part])

    with operations_of("910b", all_reduce=all_reduce) as called:
        results = run_ranks(2, work)
    CALLED["910b"] |= called
    for long, short in results:
        want = (x.float() @ weight.T.float() + 1).half()
        torch.testing.assert_close(long, want, rtol=1e-2, atol=2e-2)
        torch.testing.assert_close(short, want[:5], rtol=1e-2, atol=2e-2)
    assert called == {"npu::npu_mm_all_reduce_base"}


@pytest.mark.parametrize("name", PLANS)
def test_the_plan_says_what_is_called(name: str) -> None:
    """All of it, and nothing else; the tests above have called it."""
    if not CALLED[name]:
        pytest.skip("run with the tests above")
    assert CALLED[name] == operations(name)


def test_a_keyword_the_schema_has_not(chip: str) -> None:
    """The dispatcher itself refuses it: eps is called epsilon, num_kv_heads num_key_value_heads, a scale is no int."""
    x, weight = half(2, 32), half(32)
    for call in (
        lambda: torch.ops.npu.npu_rms_norm(input=x, gamma=weight, eps=1e-5),
        lambda: torch.ops.npu.npu_prompt_flash_attention(query=x, key=x, value=x, num_kv_heads=2),
        lambda: torch.ops.npu.npu_swiglu(input=x, dim=x),
    ):
        with pytest.raises(RuntimeError, match=r"schema|argument|Expected"):
            call()


def violations(chip: str) -> dict[str, tuple[str, Any]]:
    """What each chip refuses -> (a word of the refusal, the call)."""
    ops, q = torch.ops.npu, half(1, 16, 64)
    bf16 = torch.randn(2, 32).bfloat16()
    wide, turn = half(1, 4, 2, 80), half(1, 4, 1, 80)
    quantized = {"weight": torch.ones(96, 8, dtype=torch.int8), "x": half(2, 96)}
    both = {
        "head_dim 80 in the rotation": (
            "80",
            lambda: ops.npu_apply_rotary_pos_emb(wide, wide, turn, turn),
        ),
        "a group of 48": (
            "48",
            lambda: ops.npu_weight_quant_batchmatmul(**quantized, antiquant_scale=half(2, 8), antiquant_group_size=48),
        ),
    }
    on_310p = {
        "bfloat16": ("bfloat16", lambda: ops.npu_rms_norm(bf16, bf16[0])),
        "GQA through PromptFA": (
            "num_key_value_heads",
            lambda: ops.npu_prompt_flash_attention(q, q, q, num_heads=4, num_key_value_heads=2),
        ),
        "FIA": ("no such operation", lambda: ops.npu_fused_infer_attention_score(q, q, q, num_heads=4)),
        "swiglu of 40": ("40", lambda: ops.npu_swiglu(half(2, 40))),
        "a fused all-reduce": ("no such operation", lambda: ops.npu_mm_all_reduce_base(half(2, 4), half(4, 2), "hcom")),
    }
    on_910b = {
        "blocks of 16 in a prompt": (
            "block_size",
            lambda: ops.npu_fused_infer_attention_score(
                half(1, 4, 64), half(2, 16, 64), half(2, 16, 64), num_heads=2, block_size=16, input_layout="BSH",
                block_table=torch.tensor([[0, 1]], dtype=torch.int32), actual_seq_lengths_kv=[20],
            ),
        ),
        "over 64 heads a KV head": (
            "64",
            lambda: ops.npu_fused_infer_attention_score(
                half(1, 4, 128 * 16), half(1, 4, 16), half(1, 4, 16), num_heads=128, num_key_value_heads=1
            ),
        ),
    }  # fmt: skip
    return both | (on_310p if chip == "310p" else on_910b)


def test_planted_violations_are_named(chip: str) -> None:
    for what, (word, call) in violations(chip).items():
        with pytest.raises(ChipLimit, match=word):
            call()
            pytest.fail(f"{what} was accepted")
