"""What stands between the matrix products, at every level this CPU has: against float64 and plain torch."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from mmdist.kernels import plain
from mmdist.kernels.kernels import PLAIN
from mmdist.kernels.native import NativeKernels
from mmdist.kernels.paged import DecodeTables, PagedAttention
from mmdist.kernels.pages import PAGES, Int8Pages, Pages, Slots
from mmdist.native.build import LEVELS, cpu_words, load_library

CPU = torch.device("cpu")
HERE = [name for name, level in LEVELS.items() if level.needs <= cpu_words()]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module", params=HERE)
def kernels(request) -> NativeKernels:
    native = load_library(request.param)
    assert native is not None, f"no library for {request.param}"
    return NativeKernels(CPU, native)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def rows_of(rows: int, width: int, special: bool = False) -> torch.Tensor:
    """Random bfloat16, on wish with denormals, zeros, infinities and NaN in places."""
    x = torch.randn(rows, width).bfloat16() * 3
    if special:
        for value in (1e-39, -1e-40, 0.0, -0.0, INF, -INF, NAN, 3e38):
            x[torch.rand_like(x.float()) < 0.5 / width] = value
    return x


def assert_within_ulp(ours: torch.Tensor, want: torch.Tensor) -> None:
    """Equal, special numbers too, but for one place of bfloat16 in at most a thousandth of the numbers."""
    same = (ours == want) | (ours.isnan() & want.isnan())
    assert (~same).sum() <= 1 + ours.numel() // 1000
    apart = ours[~same].view(torch.int16).int() - want[~same].view(torch.int16).int()
    assert (apart.abs() <= 1).all()


@pytest.mark.parametrize("special", (False, True))
@pytest.mark.parametrize("shape", ((1, 1), (1, 2048), (3, 7), (5, 33), (100, 514)), ids=str)
def test_norms_are_plain_torchs(kernels: NativeKernels, shape: tuple[int, int], special: bool) -> None:
    x, y, weight = rows_of(*shape, special), rows_of(*shape, special), rows_of(1, shape[1])[0]
    assert_within_ulp(kernels.rms_norm(x, weight, 1e-5), plain.rms_norm(x, weight, 1e-5))
    ours, want = kernels.add_rms_norm(x, y, weight, 1e-5), PLAIN.add_rms_norm(x, y, weight, 1e-5)
    assert torch.equal(ours[0].view(torch.int16)[~want[0].isnan()], want[0].view(torch.int16)[~want[0].isnan()])
    assert_within_ulp(ours[0], want[0])
    assert_within_ulp(ours[1], want[1])


def test_norm_against_float64(kernels: NativeKernels) -> None:
    x, weight = rows_of(9, 1000), rows_of(1, 1000)[0]
    wide = x.double()
    want = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.double()
    error = (kernels.rms_norm(x, weight, 1e-6).double() - want).abs()
    assert (error <= want.abs() * 2**-6.9).all()  # two roundings


def test_norm_of_what_is_not_contiguous(kernels: NativeKernels) -> None:
    x, weight = rows_of(6, 40)[:, :20], rows_of(1, 20)[0]
    assert_within_ulp(kernels.rms_norm(x, weight, 1e-5), plain.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("special", (False, True))
@pytest.mark.parametrize("shape", ((1, 1), (1, 8192), (3, 7), (11, 1030)), ids=str)
def test_gated_silu_is_plain_torchs(kernels: NativeKernels, shape: tuple[int, int], special: bool) -> None:
    x = rows_of(shape[0], 2 * shape[1], special)
    assert_within_ulp(kernels.gated(x, "silu"), PLAIN.gated(x, "silu"))
    assert torch.equal(kernels.gated(rows_of(2, 8), "gelu"), PLAIN.gated(rows_of(2, 8), "gelu")) is False


def test_silu_of_every_number(kernels: NativeKernels) -> None:
    """Within half a place of bfloat16 of float64's, but for the exponential's own rounding and its underflow."""
    gate = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    ours = kernels.gated(torch.stack((gate, torch.ones_like(gate)), 1).T.reshape(1, -1), "silu")[0].double()
    want = F.silu(gate.double())
    finite = want.isfinite()
    assert ((ours - want).abs()[finite] <= want.abs()[finite] * 2**-7.99 + 1e-35).all()
    assert torch.equal(ours[~finite].isnan(), want[~finite].isnan() | (gate == -INF)[~finite])


class Cache:
    """Paged keys and values twice, in our hands and plain torch's, with blocks of sequences in any order."""

    def __init__(self, kernels: NativeKernels, lens: list[int], kv_heads: int, block_size: int, dim: int, kind: str):
        blocks = [-(-n // block_size) for n in lens]
        order = torch.randperm(sum(blocks)).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in blocks]
        self.lens, self.block_size = lens, block_size
        size = (2, sum(blocks), kv_heads, block_size, dim)
        self.pages = [PAGES[kind](size, torch.bfloat16, CPU) for _ in range(4)]
        for pages in self.pages:
            pages.values.zero_()
            if kind == "int8":
                pages.scales.zero_()
        self.ours, self.plain = (
            kernels.paged_attention(*self.pages[:2]),
            PagedAttention(*self.pages[2:], kernels.attention),
        )

    def slots(self) -> Slots:
        """Of all tokens, sequence by sequence."""
        size = self.block_size
        each = [[t[i // size] * size + i % size for i in range(n)] for t, n in zip(self.tables, self.lens, strict=True)]
        return Slots(torch.tensor([slot for slots in each for slot in slots]), size)

    def fill(self, heads: int, special: bool = False) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Store random tokens in layer 1; what both gave for q, k and v."""
        kv_heads, dim = self.pages[0].values.shape[2], self.pages[0].values.shape[-1]
        tokens = sum(self.lens)
        qkv = rows_of(tokens, (heads + 2 * kv_heads) * dim, special)
        angles = torch.randn(tokens, 1, dim)
        rope, counts = (angles.cos().bfloat16(), angles.sin().bfloat16()), [heads, kv_heads, kv_heads]
        want = self.plain.store(1, qkv, counts, rope, self.slots())
        return list(self.ours.store(1, qkv.clone(), counts, rope, self.slots())), list(want)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a[~a.isnan()], b[~b.isnan()])


@pytest.mark.parametrize("special", (False, True))
@pytest.mark.parametrize("kind", PAGES)
@pytest.mark.parametrize("dim", (2, 6, 34, 64, 80, 128))
def test_rotation_and_store_are_plain_torchs(kernels: NativeKernels, dim: int, kind: str, special: bool) -> None:
    """Bit by bit: q, k and v, the pages and their scales."""
    cache = Cache(kernels, [1, 37, 16], 3, 16, dim, kind)
    ours, want = cache.fill(6, special)
    assert all(same_bits(a, b) for a, b in zip(ours, want, strict=True))
    for mine, theirs in zip(cache.pages[:2], cache.pages[2:], strict=True):
        assert same_bits(mine.values, theirs.values)
        assert kind == "auto" or same_bits(mine.scales, theirs.scales)


def exact(pages: Pages | Int8Pages, slots: Slots) -> torch.Tensor:
    """What layer 1 holds, without the rounding of a read."""
    wide = pages.values[1].double() * (pages.scales[1].double() if isinstance(pages, Int8Pages) else 1)
    return wide[slots.index]


def attention_64(cache: Cache, q: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
    """decode() in float64, over what the pages hold."""
    out, before = [], 0
    k, v = (exact(pages, cache.slots()) for pages in cache.pages[2:])
    for row, length in zip(q.double(), cache.lens, strict=True):
        seen = slice(before + max(0, length - (window or length)), before + length)
        keys, values = (x[seen].repeat_interleave(len(row) // x.shape[1], 1) for x in (k, v))
        weights = (torch.einsum("hd,thd->ht", row, keys) * scale).softmax(-1)
        out.append(torch.einsum("ht,thd->hd", weights, values))
        before += length
    return torch.stack(out)


def check_attention(
    kernels: NativeKernels, lens: list[int], heads: tuple[int, int], dim: int, block_size: int, window: int | None,
    kind: str,
) -> None:  # fmt: skip
    cache = Cache(kernels, lens, heads[1], block_size, dim, kind)
    cache.fill(heads[0])
    tables = DecodeTables(cache.tables, lens, block_size, CPU)
    q, scale = rows_of(len(lens), heads[0] * dim).view(len(lens), heads[0], dim), dim**-0.5 / 3
    ours, plain_ = (x.decode(1, q, tables, scale=scale, window=window) for x in (cache.ours, cache.plain))
    want = attention_64(cache, q, scale, window)
    error, size = (ours.double() - want).abs(), want.abs().amax(-1, keepdim=True)
    assert (error <= want.abs() * 2**-8 + size * 2**-12).all(), f"{(error / size).max()} off"
    assert ((plain_.double() - want).abs() <= size * 2**-5).all()
    assert len({tuple(row) for row in ours.flatten(1).tolist()}) == len(lens) or max(lens) == 1


@pytest.mark.parametrize("kind", PAGES)
@pytest.mark.parametrize("window", (None, 1, 70, 128))
@pytest.mark.parametrize("heads", ((4, 4), (4, 1), (6, 2), (14, 2), (32, 8)), ids=str)
def test_attention_against_float64(
    kernels: NativeKernels, heads: tuple[int, int], window: int | None, kind: str
) -> None:
    check_attention(kernels, [1, 5, 128, 129, 300], heads, 64, 16, window, kind)


@pytest.mark.parametrize("dim", (2, 6, 16, 30, 34, 80, 96, 128, 256))
def test_attention_of_any_head_dim(kernels: NativeKernels, dim: int) -> None:
    for kind in PAGES:
        check_attention(kernels, [3, 150], (6, 3), dim, 16, None, kind)


def test_attention_of_random_shapes(kernels: NativeKernels) -> None:
    dice = random.Random(0)
    for _ in range(40):
        kv_heads, lens = dice.randint(1, 9), [dice.randint(1, 400) for _ in range(dice.randint(1, 6))]
        heads = (kv_heads * dice.randint(1, 9), kv_heads)
        dim, window = 2 * dice.randint(1, 70), dice.choice([None, dice.randint(1, 500)])
        check_attention(kernels, lens, heads, dim, dice.randint(1, 40), window, dice.choice(list(PAGES)))


def test_attention_depends_on_nothing_else(kernels: NativeKernels) -> None:
    """Neither on the threads nor on the rest of the batch nor on where the blocks lie."""
    cache = Cache(kernels, [2900, 40, 500], 2, 16, 32, "auto")
    cache.fill(8)
    q = rows_of(3, 256).view(3, 8, 32)
    library = load_library(kernels.level)
    assert library is not None

    def decode(rows: slice) -> torch.Tensor:
        tables = DecodeTables(cache.tables[rows], cache.lens[rows], 16, CPU)
        return cache.ours.decode(1, q[rows], tables, scale=0.1, window=None)

    once = decode(slice(0, 3))
    for threads in (1, 2, 7, torch.get_num_threads()):
        library.lib.mmdist_pool_init(threads)
        assert torch.equal(decode(slice(0, 3)), once), f"{threads} threads"
    assert all(torch.equal(decode(slice(i, i + 1)), once[i : i + 1]) for i in range(3))


def test_attention_to_special_numbers(kernels: NativeKernels) -> None:
    """What a sequence stored hurts its own KV head and no other; what was never written is not read."""
    cache = Cache(kernels, [20, 20], 2, 16, 32, "auto")
    cache.fill(4)
    for pages in cache.pages:
        pages.values[1, cache.tables[0][1], :, 4:] = NAN
        pages.values[1, cache.tables[1][0], 1, 3, 5] = NAN
    q = rows_of(2, 128).view(2, 4, 32)
    out = cache.ours.decode(1, q, DecodeTables(cache.tables, cache.lens, 16, CPU), scale=0.1, window=None)
    assert out[0].isfinite().all() and out[1, :2].isfinite().all() and out[1, 2:].isnan().all()


@pytest.mark.parametrize("k", (1, 2, 20, 333))
def test_top_k_is_a_stable_sort(kernels: NativeKernels, k: int) -> None:
    logits = torch.cat((rows_of(4, 333, special=True), rows_of(4, 333), torch.zeros(1, 333).bfloat16()))
    logits[8, ::3] = -0.0
    wide = rows_of(9, 400)
    wide[:, :333] = logits
    want, places = logits.float().sort(descending=True, stable=True)
    for some in (logits, wide[:, :333]):
        for values, ids in (kernels.top_k(some, k), PLAIN.top_k(some, k)):
            assert torch.equal(ids, places[:, :k])
            assert same_bits(values, want[:, :k])
