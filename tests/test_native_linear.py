"""Packed linear kernels against float64, at every level this CPU has: odd sizes, tails, special numbers."""

from __future__ import annotations

import random

import pytest
import torch

from mmdist.blocks import BLOCKS, to_stored
from mmdist.kernels.native import NativeKernels
from mmdist.kernels.native_linear import BF12, BF16, NativeLinear
from mmdist.native.build import LEVELS, cpu_words, load_library
from mmdist.quant import Quantized, Scheme, quantize

CPU = torch.device("cpu")
HERE = [name for name, level in LEVELS.items() if level.needs <= cpu_words()]
SCHEMES = {
    "bf16": False,
    "bf16 in 12 bits": True,
    "int8": Scheme(8),
    "int4": Scheme(4),
    "int4 in groups": Scheme(4, 16),
}
SHAPES = [(1, 8), (31, 16), (33, 48), (64, 128), (257, 4112)]  # (out, in)
CASES = [(name, shape) for name in SCHEMES for shape in SHAPES if "groups" not in name or shape[1] % 16 == 0]
ROWS = [1, 2, 3, 4, 5, 7, 9, 12, 13, 31, 100]


@pytest.fixture(scope="module", params=HERE)
def kernels(request) -> NativeKernels:
    native = load_library(request.param)
    assert native is not None, f"no library for {request.param}"
    return NativeKernels(CPU, native)


@pytest.fixture(params=(False, True), ids=("16 bits", "12 bits"))
def short(request) -> bool:
    return request.param


def plain_linear(kernels: NativeKernels, weight: torch.Tensor, short: bool) -> NativeLinear:
    """Of a bfloat16 weight, in 12 bits a number at any level, or not."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kernels, "shortens", short)
        linear = kernels.linear(weight)
    assert isinstance(linear, NativeLinear) and linear.packed.kind == (BF12 if short else BF16)
    return linear


def product(
    kernels: NativeKernels, weight: torch.Tensor, scheme: Scheme | bool, x: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ours, float64's, float64's product of magnitudes); scheme: of integers, or whether bfloat16 is shortened"""
    if isinstance(scheme, bool):
        linear, wide = plain_linear(kernels, weight, scheme), weight.double()
    else:
        quantized = quantize(weight, scheme)
        linear = kernels.quantized_linear(quantized)
        grouped = quantized.q.double().unflatten(1, (quantized.scale.shape[1], -1))
        wide = (grouped * quantized.scale.double()[..., None]).flatten(1)
    want, size = x.double() @ wide.T, x.double().abs() @ wide.abs().T
    return linear(x, bias), want if bias is None else want + bias.double(), size


def assert_close(ours: torch.Tensor, want: torch.Tensor, size: torch.Tensor) -> None:
    """bfloat16's own rounding, and float32's in the sums."""
    error = (ours.double() - want).abs()
    allowed = want.abs() * 2**-8 + size * 2**-18 + 1e-37  # products of denormals may be taken for zero
    assert (error <= allowed).all(), f"{error.max()} off, {(error > allowed).sum()} of {error.numel()} too far"


@pytest.mark.parametrize("name, shape", CASES, ids=str)
def test_product_is_float64s(kernels: NativeKernels, name: str, shape: tuple[int, int]) -> None:
    scheme = SCHEMES[name]
    torch.manual_seed(0)
    weight, bias = torch.randn(shape).bfloat16(), torch.randn(shape[0]).bfloat16()
    for rows in ROWS:
        x = torch.randn(rows, shape[1]).bfloat16()
        assert_close(*product(kernels, weight, scheme, x, bias if rows % 2 else None))


def test_random_shapes(kernels: NativeKernels) -> None:
    dice = random.Random(0)
    for _ in range(60):
        rows, out, columns = dice.randint(1, 40), dice.randint(1, 150), dice.randint(1, 300)
        scheme = dice.choice([False, True, Scheme(8), Scheme(4)])
        weight, x = torch.randn(out, columns).bfloat16(), torch.randn(rows, columns).bfloat16()
        assert_close(*product(kernels, weight, scheme, x, None))


def test_every_integer(kernels: NativeKernels) -> None:
    for bits in (4, 8):
        q = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).to(torch.int8)[:, None].repeat(1, 16)
        q[:, 1::3] = -1
        linear = kernels.quantized_linear(Quantized(bits, q, torch.ones(len(q), 1)))
        unit = torch.eye(16).bfloat16()
        assert torch.equal(linear(unit, None), q.T.bfloat16()), f"{bits} bits"


def test_rows_of_x_do_not_see_each_other(kernels: NativeKernels, short: bool) -> None:
    torch.manual_seed(1)
    linear, x = plain_linear(kernels, torch.randn(70, 64).bfloat16(), short), torch.randn(29, 64).bfloat16()
    once, x[3], x[28] = linear(x, None), float("nan"), float("inf")
    again = linear(x, None)
    others = [row for row in range(29) if row not in (3, 28)]
    assert torch.equal(once[others], again[others])
    assert again[3].isnan().all()
    assert not again[28].isfinite().any()


def test_special_numbers(kernels: NativeKernels, short: bool) -> None:
    weight = torch.zeros(32, 8).bfloat16()
    weight[0, 0], weight[1, 1], weight[2, 2], weight[3, 3] = float("nan"), float("inf"), 1e-39, 3e38
    linear = plain_linear(kernels, weight, short)
    y = linear(torch.ones(5, 8).bfloat16(), None)
    assert y[:, 0].isnan().all()
    assert y[:, 1].isposinf().all()
    assert (y[:, 2].abs() <= 1.1e-39).all()
    assert (y[:, 3] == weight[3, 3]).all()
    assert (y[:, 4:] == 0).all()


def test_same_numbers_whatever_the_threads(kernels: NativeKernels, short: bool) -> None:
    torch.manual_seed(2)
    linear, x = plain_linear(kernels, torch.randn(1000, 512).bfloat16(), short), torch.randn(3, 512).bfloat16()
    init, once = load_library(kernels.level), linear(x, None)
    assert init is not None
    for threads in (1, 5, torch.get_num_threads()):
        init.lib.mmdist_pool_init(threads)
        assert torch.equal(linear(x, None), once), f"{threads} threads"


def every_number(sign: int, exponent: range) -> torch.Tensor:
    """bfloat16 (exponents, 128)"""
    fractions = torch.arange(128)
    bits = torch.tensor(list(exponent))[:, None] * 128 + fractions + sign * 2**15
    return (bits - bits.ge(2**15) * 2**16).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("rows", (1, 30))  # as they are read, and made whole before
def test_12_bits_lose_nothing(kernels: NativeKernels, rows: int) -> None:
    """Each number of 15 exponents, and among them some far away, zeros of both signs and the greatest there is."""
    weight = torch.cat([every_number(sign, range(100, 115)) for sign in (0, 1)])
    weight[::7, ::50] = torch.tensor([0.0, -0.0, 1e-30, -3.3e38, 2.0**60]).bfloat16().repeat(3)[:15].reshape(5, 3)
    linear = plain_linear(kernels, weight, short=True)
    assert linear.packed.side is not None
    for first in range(0, 128, rows):
        unit = torch.eye(128)[first : first + rows].bfloat16()
        assert torch.equal(linear(unit, None), weight[:, first : first + rows].T)


def test_12_bits_from_blocks(kernels: NativeKernels) -> None:
    """The same words, whoever packs them."""
    weight = torch.randn(96, 64).bfloat16()
    weight[5, 6], weight[95, 63] = 1e30, 1e-30
    want = plain_linear(kernels, weight, short=True).packed
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kernels, "shortens", True)
        found = kernels.shortened(to_stored(weight, BLOCKS), in_blocks=True)
    assert found is not None and want.side is not None and found.side is not None
    assert torch.equal(found.words, want.words) and torch.equal(found.side, want.side)


def test_numbers_that_do_not_fit_12_bits_keep_16(kernels: NativeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "shortens", True)
    weight = (torch.randn(64, 128) * torch.linspace(-60, 60, 128).exp2()).bfloat16()
    linear = kernels.linear(weight)
    assert isinstance(linear, NativeLinear) and linear.packed.kind == BF16
    x = torch.randn(3, 128).bfloat16()
    assert_close(linear(x, None), x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T)
