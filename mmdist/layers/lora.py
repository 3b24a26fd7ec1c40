"""Low-rank additions to parallel linear layers, beside the weights they add to: y = W x + b + B (A x), unscaled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mmdist.layers.linear import ColumnParallelLinear, RowParallelLinear
from mmdist.plan import Piece, Shard
from mmdist.tp import TP


class LoRAColumnParallelLinear(ColumnParallelLinear):
    """Each piece has its own A (rank, in), whole on every rank, and B (out, rank), cut like its rows of W."""

    def __init__(self, in_features: int, pieces: Sequence[Piece], tp: TP, *, rank: int, bias: bool = False):
        super().__init__(in_features, pieces, tp, bias=bias)
        self.rank = rank
        self.inner_pieces = tuple(Piece(rank, piece.name, whole=True) for piece in self.pieces)
        self.lora_a = nn.Parameter(torch.empty(rank * len(self.pieces), in_features))
        self.lora_b = nn.Parameter(torch.empty(sum(self.local_sizes), rank))

    def shards(self) -> dict[str, Shard]:
        return super().shards() | {"lora_a": Shard(0, self.inner_pieces), "lora_b": Shard(0, self.pieces)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = F.linear(x, self.lora_a).split(self.rank, dim=-1)
        outer = self.lora_b.split(self.local_sizes)
        return super().forward(x) + torch.cat([F.linear(a, b) for a, b in zip(inner, outer, strict=True)], dim=-1)


class LoRARowParallelLinear(RowParallelLinear):
    """A (rank, in) is cut like the columns of W, B (out, rank) whole: one all-reduce sums both products."""

    def __init__(self, in_features: int, out_features: int, tp: TP, *, rank: int, bias: bool = False):
        super().__init__(in_features, out_features, tp, bias=bias)
        self.lora_a = nn.Parameter(torch.empty(rank, self.piece.local_size(tp)))
        self.lora_b = nn.Parameter(torch.empty(out_features, rank))

    def shards(self) -> dict[str, Shard]:
        return super().shards() | {"lora_a": Shard(1, (self.piece,))}

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return super().matmul(x, bias) + F.linear(F.linear(x, self.lora_a), self.lora_b)


def add_lora(module: nn.Module, rank: int, tp: TP) -> None:
    """Give the parallel linear layers of `module` (its direct children, on meta) low-rank additions."""
    for name, child in list(module.named_children()):
        if isinstance(child, ColumnParallelLinear):
            width, bias = child.weight.shape[1], child.bias is not None
            setattr(module, name, LoRAColumnParallelLinear(width, child.pieces, tp, rank=rank, bias=bias))
        elif isinstance(child, RowParallelLinear):
            width, bias = len(child.weight), child.bias is not None
            setattr(module, name, LoRARowParallelLinear(child.piece.size, width, tp, rank=rank, bias=bias))
