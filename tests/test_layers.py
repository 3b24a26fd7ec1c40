"""Each parallel layer equals its dense form at every size: with bias, fused pieces, fewer KV heads than ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import run_ranks
from safetensors.torch import save_file
from torch import nn

from mmdist.kernels import plain
from mmdist.kernels.kernels import Kernels
from mmdist.layers.attention import Attention, Context
from mmdist.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from mmdist.layers.linear import ColumnParallelLinear, RowParallelLinear
from mmdist.layers.lora import add_lora
from mmdist.layers.mlp import GatedMLP
from mmdist.loading import load_weights
from mmdist.plan import Piece, shard_plan
from mmdist.tp import TP
from mmdist.weights import Checkpoint

SIZES = (1, 2, 4, 8)


class FullContext:
    """A cache that holds just this step, for one sequence."""

    def store(self, layer: int, qkv: torch.Tensor, heads: list[int], rope: tuple[torch.Tensor, torch.Tensor]):
        return plain.split_rotate(qkv, heads, rope)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options) -> torch.Tensor:
        return plain.prefill_attention(q, k, v, **options)


def parallel(build: Callable[[TP], nn.Module], size: int, folder: Path, call: Callable[[nn.Module], torch.Tensor]):
    """call(layer) on each rank, its weights cut from one random checkpoint in `folder`."""

    def work(tp: TP) -> torch.Tensor:
        with torch.device("meta"):
            layer = build(tp)
        plan = shard_plan(layer, tp)
        load_weights(layer, Checkpoint(folder, {}), plan, tp, Kernels(torch.device("cpu")))
        with torch.inference_mode():
            return call(layer)

    return run_ranks(size, work)


def random_checkpoint(build: Callable[[TP], nn.Module], folder: Path) -> None:
    with torch.device("meta"):
        plan = shard_plan(build(TP()), TP())
    torch.manual_seed(0)
    save_file({name: torch.randn(p.shape) * 0.3 for name, p in plan.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({}))


LAYERS: dict[str, tuple[Callable[[TP], nn.Module], Callable[[nn.Module], torch.Tensor]]] = {
    "mlp": (lambda tp: GatedMLP(12, 16, "silu", tp), lambda layer: layer(inputs(5, 12))),
    "mlp_bias": (lambda tp: GatedMLP(12, 16, "gelu", tp, bias=True), lambda layer: layer(inputs(5, 12))),
    "attention": (lambda tp: Attention(12, 8, 8, 4, tp, layer=0), lambda layer: attend(layer)),
    "attention_bias": (lambda tp: Attention(12, 8, 8, 4, tp, layer=0, bias=True), lambda layer: attend(layer)),
    "grouped": (lambda tp: Attention(12, 8, 2, 4, tp, layer=0, bias=True), lambda layer: attend(layer)),
    "one_kv_head": (lambda tp: Attention(12, 8, 1, 4, tp, layer=0), lambda layer: attend(layer)),
    "mlp_lora": (lambda tp: with_lora(GatedMLP(12, 16, "silu", tp, bias=True), tp), lambda layer: layer(inputs(5, 12))),
    "grouped_lora": (
        lambda tp: with_lora(Attention(12, 8, 2, 4, tp, layer=0, bias=True), tp),
        lambda layer: attend(layer),
    ),
    "embedding_padded": (lambda tp: VocabParallelEmbedding(13, 6, tp), lambda layer: layer(torch.arange(13))),
    "lm_head_padded": (lambda tp: ParallelLMHead(13, 6, tp), lambda layer: layer(inputs(3, 6))),
    "row_bias": (lambda tp: RowOnly(tp), lambda layer: layer(inputs(3, 16))),
    "fused_in_one_tensor": (lambda tp: FusedInOneTensor(tp), lambda layer: layer(inputs(3, 6))),
}


def with_lora(layer: nn.Module, tp: TP) -> nn.Module:
    add_lora(layer, 3, tp)
    return layer


class RowOnly(nn.Module):
    """A row-parallel layer fed with its share of the input; the bias is added once."""

    def __init__(self, tp: TP):
        super().__init__()
        self.tp = tp
        self.proj = RowParallelLinear(16, 6, tp, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x.chunk(self.tp.size, dim=-1)[self.tp.rank])


class FusedInOneTensor(nn.Module):
    """A checkpoint's own fused q|k|v (VLMo's): each piece is cut by itself, not the whole."""

    def __init__(self, tp: TP):
        super().__init__()
        self.qkv = ColumnParallelLinear(6, [Piece(16), Piece(16), Piece(16)], tp, bias=True)
        self.proj = RowParallelLinear(16, 6, tp)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(q * k + v)


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def attend(layer: nn.Module) -> torch.Tensor:
    angles = torch.arange(5.0)[:, None, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
    context = Context((angles.cos(), angles.sin()), FullContext(), torch.arange(5), [5], [None])
    return layer(inputs(5, 12), context)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", LAYERS)
def test_parallel_equals_dense(name: str, size: int, tmp_path: Path) -> None:
    build, call = LAYERS[name]
    random_checkpoint(build, tmp_path)
    (dense,) = parallel(build, 1, tmp_path, call)
    for result in parallel(build, size, tmp_path, call):
        torch.testing.assert_close(result, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("vocab", (5, 13, 200))
def test_likeliest_tokens_over_ranks(vocab: int, size: int) -> None:
    """Equal logits in the order of their ids, ranks with fewer tokens than asked for, ranks with none."""
    logits = inputs(4, 200)[:, :vocab].round()  # many are equal
    want, places = logits.sort(descending=True, stable=True)

    def work(tp: TP) -> list[tuple[torch.Tensor, torch.Tensor]]:
        with torch.device("meta"):
            head = ParallelLMHead(vocab, 6, tp)
        padded = torch.nn.functional.pad(logits, (0, len(head.weight) * size - vocab), value=9.0)
        local = padded.split(len(head.weight), dim=1)[tp.rank]
        return [head.top_k(local, k) for k in (1, 3, vocab, 300)]

    for found in run_ranks(size, work):
        for (values, ids), k in zip(found, (1, 3, vocab, 300), strict=True):
            assert torch.equal(ids, places[:, :k]) and torch.equal(values, want[:, :k])


@pytest.mark.parametrize("collectives", ("shm", "torch"))
@pytest.mark.parametrize("size", (1, 2, 8))
def test_collectives(size: int, collectives: str) -> None:
    def work(tp: TP) -> tuple:
        rank = torch.full((2, 3), float(tp.rank))
        small = tp.broadcast_object({"from": tp.rank})
        large = tp.broadcast_object(list(range(10000)) if tp.rank == 0 else None)
        return tp.all_reduce(rank.clone()), tp.all_gather(rank), tp.broadcast(rank.clone()), small, large

    for reduced, gathered, sent, small, large in run_ranks(size, work, collectives):
        assert (reduced == sum(range(size))).all()
        assert gathered.shape == (2, 3 * size) and gathered[0].tolist() == [
            float(r) for r in range(size) for _ in "abc"
        ]
        assert (sent == 0).all() and small == {"from": 0} and large == list(range(10000))


@pytest.mark.parametrize("window", (None, 4))
def test_decode_attention_equals_prefill(window: int | None) -> None:
    """The one-token form over a batch of padded contexts equals the last row of the many-token form."""
    torch.manual_seed(0)
    lens = (3, 9, 6)
    k, v = torch.randn(3, 9, 2, 8), torch.randn(3, 9, 2, 8)
    q = torch.randn(3, 6, 8)
    places = torch.arange(9)
    length = torch.tensor(lens)[:, None]
    seen = (places < length) & (places >= length - (window or 9))
    out = plain.decode_attention(q, k, v, seen[:, None, None], scale=0.3)
    for i, n in enumerate(lens):
        wanted = plain.prefill_attention(q[i : i + 1], k[i, :n], v[i, :n], scale=0.3, window=window)
        torch.testing.assert_close(out[i : i + 1], wanted)


@pytest.mark.parametrize("window", (None, 5, 70))
@pytest.mark.parametrize("query_len", (1, 64, 150))
def test_grouped_prefill_equals_torch(query_len: int, window: int | None) -> None:
    """Query heads stacked by group, in pieces, equal torch's attention with a whole mask."""
    torch.manual_seed(0)
    q, k, v = torch.randn(query_len, 6, 8), torch.randn(150, 2, 8), torch.randn(150, 2, 8)
    mask = plain.causal_mask(query_len, 150, window, q.device)
    heads = [x.transpose(0, 1)[None] for x in (q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))]
    wanted = torch.nn.functional.scaled_dot_product_attention(*heads, mask, scale=0.3)[0].transpose(0, 1)
    torch.testing.assert_close(plain.prefill_attention(q, k, v, scale=0.3, window=window), wanted)
