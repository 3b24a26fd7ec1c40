"""Attention of whole prompts and pictures in the native kernels, against float64."""

from __future__ import annotations

import random

import pytest
import torch
from test_native_linear import CPU, HERE

from mmdist.kernels.native import NativeKernels
from mmdist.native.build import load_library

# batch, queries, context, heads, kv_heads, head_dim
SHAPES = [
    (1, 1, 1, 1, 1, 8),
    (2, 33, 33, 4, 2, 16),
    (3, 50, 200, 6, 1, 64),
    (1, 257, 257, 2, 2, 88),
    (1, 130, 300, 2, 1, 128),
]
VIEWS = {"full": {}, "causal": {"causal": True}, "window": {"causal": True, "window": 37}}


@pytest.fixture(scope="module", params=HERE)
def kernels(request) -> NativeKernels:
    native = load_library(request.param)
    assert native is not None, f"no library for {request.param}"
    return NativeKernels(CPU, native)


def wanted(q, k, v, *, causal: bool = False, window: int | None = None) -> torch.Tensor:
    """softmax(q k^T / sqrt(head_dim)) v in float64."""
    queries, context, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * q.shape[-1] ** -0.5
    distance = torch.arange(context - queries, context)[:, None] - torch.arange(context)
    if causal:
        hidden = (distance < 0) | (distance >= (window or context))
        scores = scores.masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ v.repeat_interleave(groups, 1)).transpose(1, 2)


def random_inputs(batch, queries, context, heads, kv_heads, head_dim) -> list[torch.Tensor]:
    shapes = [(batch, queries, heads), (batch, context, kv_heads), (batch, context, kv_heads)]
    return [torch.randn(*shape, head_dim).bfloat16() for shape in shapes]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_float64s(kernels: NativeKernels, shape: tuple[int, ...], view: str) -> None:
    torch.manual_seed(0)
    inputs = random_inputs(*shape)
    ours = kernels.attention(*inputs, scale=shape[-1] ** -0.5, **VIEWS[view])
    torch.testing.assert_close(ours.double(), wanted(*inputs, **VIEWS[view]), rtol=0.02, atol=0.01)


def test_random_shapes(kernels: NativeKernels) -> None:
    dice = random.Random(0)
    torch.manual_seed(0)
    for _ in range(40):
        kv_heads, groups, head_dim = dice.randint(1, 3), dice.randint(1, 4), 8 * dice.randint(1, 16)
        context = dice.randint(1, 300)
        inputs = random_inputs(1, dice.randint(1, context), context, kv_heads * groups, kv_heads, head_dim)
        view = dice.choice(list(VIEWS.values()))
        ours = kernels.attention(*inputs, scale=head_dim**-0.5, **view)
        torch.testing.assert_close(ours.double(), wanted(*inputs, **view), rtol=0.02, atol=0.015)


def test_large_scores_do_not_overflow(kernels: NativeKernels) -> None:
    q, k, v = random_inputs(1, 40, 140, 2, 2, 64)
    q, k = q * 60, k * 60  # scores of some tens of thousands
    ours = kernels.attention(q, k, v, scale=0.125, causal=True)
    torch.testing.assert_close(ours.double(), wanted(q, k, v, causal=True), rtol=0.02, atol=0.02)


def test_nan_stays_with_those_who_see_it(kernels: NativeKernels) -> None:
    q, k, v = random_inputs(1, 64, 64, 2, 2, 32)
    before = kernels.attention(q, k, v, scale=0.2, causal=True)
    v[0, 40, 1] = float("nan")
    after = kernels.attention(q, k, v, scale=0.2, causal=True)
    assert after[0, 40:, 1].isnan().all()
    assert torch.equal(after[0, :, 0], before[0, :, 0])


def test_parts_of_a_fused_projection(kernels: NativeKernels) -> None:
    q, k, v = torch.randn(2, 50, 3, 4, 16).bfloat16().unbind(2)
    ours = kernels.attention(q, k, v, scale=0.25)
    assert torch.equal(ours, kernels.attention(q.contiguous(), k.contiguous(), v.contiguous(), scale=0.25))


def test_quick_gelu(kernels: NativeKernels) -> None:
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), 1e-39, 300, -300]).bfloat16()
    for count in (1, 7, 16, 33, 40000):
        x = torch.cat((special, torch.randn(count).bfloat16()))
        want = x.double() * torch.sigmoid(1.702 * x.double())
        torch.testing.assert_close(kernels.quick_gelu(x).double(), want, rtol=2**-7, atol=1e-30, equal_nan=True)
