"""Linear layers cut over the ranks; the collective stands in `forward`, where the arithmetic needs it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mmdist.kernels import packed
from mmdist.plan import Piece, Shard
from mmdist.tp import TP


class PackedWeight(nn.Module):
    """A layer with a weight (out, in), which is packed after loading where that makes its product faster."""

    weight: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self.packed: torch.Tensor | None = None

    def after_load(self, device: torch.device) -> None:
        if packed.can_pack(self.weight):
            self.packed = packed.pack(self.weight)
            self.weight = nn.Parameter(self.weight.to("meta"), requires_grad=False)  # its shape stays, its memory goes

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self.packed is None:
            return F.linear(x, self.weight, bias)
        return packed.packed_linear(x, self.packed, bias)


class ColumnParallelLinear(PackedWeight):
    """y = x W^T + b with the rows of W cut: (..., in) -> (..., this rank's out). No collective."""

    def __init__(self, in_features: int, pieces: Sequence[Piece], tp: TP, *, bias: bool = False):
        super().__init__()
        self.pieces = tuple(pieces)
        self.local_sizes = [piece.local_size(tp) for piece in self.pieces]
        rows = sum(self.local_sizes)
        self.weight = nn.Parameter(torch.empty(rows, in_features))
        self.bias = nn.Parameter(torch.empty(rows)) if bias else None

    def shards(self) -> dict[str, Shard]:
        return {"weight": Shard(0, self.pieces), "bias": Shard(0, self.pieces)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.matmul(x, self.bias)


class RowParallelLinear(PackedWeight):
    """y = x W^T + b with the columns of W cut: (..., this rank's in) -> (..., out), equal on every rank."""

    def __init__(self, in_features: int, out_features: int, tp: TP, *, bias: bool = False):
        super().__init__()
        self.tp = tp
        self.piece = Piece(in_features)
        self.weight = nn.Parameter(torch.empty(out_features, self.piece.local_size(tp)))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def shards(self) -> dict[str, Shard]:
        return {"weight": Shard(1, (self.piece,))}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.tp.all_reduce(self.matmul(x))
        return y if self.bias is None else y + self.bias
