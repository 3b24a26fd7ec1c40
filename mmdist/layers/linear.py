"""Linear layers cut over the ranks; the collective stands in `forward`, where the arithmetic needs it.

Parallelism is the layer's, quantisation the weight format's: a layer says along which dim it is cut, the format what
that means for the tensors it stores (mmdist.quant).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from mmdist.config import UserError
from mmdist.kernels.kernels import PLAIN, Kernels
from mmdist.kernels.linear import Linear
from mmdist.plan import Piece, Shard
from mmdist.quant import Quantized, Scheme, WeightFormat, find_amax, quantize
from mmdist.tp import TP


class ParallelWeight(nn.Module):
    """A layer with a weight (out, in) cut along cut_dim, which is made ready once it is loaded.

    format: how the checkpoint stores it quantised, None for plain numbers. scheme: to quantise plain numbers with.
    """

    cut_dim: ClassVar[int]
    weight: nn.Parameter

    def __init__(self, pieces: Sequence[Piece], tp: TP):
        super().__init__()
        self.pieces, self.tp = tuple(pieces), tp
        self.format: WeightFormat | None = None
        self.scheme: Scheme | None = None
        self.linear: Linear | None = None
        self.shape: tuple[int, ...] = ()  # of the weight, where `format` stands for it

    def store_as(self, format: WeightFormat) -> None:
        """Hold the tensors of `format` instead of the plain weight; before loading."""
        rows, columns = self.shape = tuple(self.weight.shape)
        del self.weight
        self.format = format
        for name, spec in format.specs(rows, columns).items():
            empty = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        for name, shard in self.shards().items():
            stored = getattr(self, name, None)
            if stored is not None and stored.shape[shard.dim] != sum(p.local_size(self.tp) for p in shard.pieces):
                raise UserError(f"a rank's part of ({rows}, {columns}) would cut through what {name} stores together")

    def shards(self) -> dict[str, Shard]:
        if self.format is not None:
            return self.format.shards(self.cut_dim, self.pieces)
        return {"weight": Shard(self.cut_dim, self.pieces, packs=True)}

    def bytes_once_ready(self) -> int:
        names = () if self.format is None else self.format.names
        others = sum(param.nbytes for name, param in self.named_parameters(recurse=False) if name not in names)
        if self.format is not None:
            return others + self.format.scheme.num_bytes(*self.shape)
        if self.scheme is not None:
            return others - self.weight.nbytes + self.scheme.num_bytes(*self.weight.shape)
        return others

    def take_blocks(self, blocks: torch.Tensor, kernels: Kernels) -> bool:
        """Use the weight where it lies packed; False where it is to be loaded."""
        if self.scheme is None and (blocks.shape, blocks.dtype) == (self.weight.shape, self.weight.dtype):
            self.linear = kernels.linear_over_blocks(blocks)
        return self.linear is not None

    def after_load(self, kernels: Kernels) -> None:
        """Where the kernels have a form of their own, the loaded tensors' memory goes and their shapes stay."""
        if self.linear is not None:  # from take_blocks()
            return
        if self.format is not None:
            stored = {name: getattr(self, name) for name in self.format.names}
            self.linear = kernels.quantized_linear(self.format.read(stored))
        elif self.scheme is not None:
            self.linear = kernels.quantized_linear(self.quantized(self.scheme))
        else:
            self.linear = kernels.linear(self.weight)
        if self.linear is None:
            return
        for name in self.format.names if self.format is not None else ("weight",):
            setattr(self, name, nn.Parameter(getattr(self, name).to("meta"), requires_grad=False))

    def quantized(self, scheme: Scheme) -> Quantized:
        """This rank's part of the whole weight's integers."""
        return quantize(self.weight, scheme)

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x, self.weight, bias) if self.linear is None else self.linear(x, bias)


class ColumnParallelLinear(ParallelWeight):
    """y = x W^T + b with the rows of W cut: (..., in) -> (..., this rank's out). No collective."""

    cut_dim = 0

    def __init__(self, in_features: int, pieces: Sequence[Piece], tp: TP, *, bias: bool = False):
        super().__init__(pieces, tp)
        self.local_sizes = [piece.local_size(tp) for piece in self.pieces]
        rows = sum(self.local_sizes)
        self.weight = nn.Parameter(torch.empty(rows, in_features))
        self.bias = nn.Parameter(torch.empty(rows)) if bias else None

    def shards(self) -> dict[str, Shard]:
        return {**super().shards(), "bias": Shard(0, self.pieces)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.matmul(x, self.bias)


class RowParallelLinear(ParallelWeight):
    """y = x W^T + b with the columns of W cut: (..., this rank's in) -> (..., out), equal on every rank."""

    cut_dim = 1

    def __init__(self, in_features: int, out_features: int, tp: TP, *, bias: bool = False):
        super().__init__([Piece(in_features)], tp)
        self.weight = nn.Parameter(torch.empty(out_features, self.piece.local_size(tp)))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.kernels = PLAIN

    def after_load(self, kernels: Kernels) -> None:
        super().after_load(kernels)
        self.kernels = kernels

    @property
    def piece(self) -> Piece:
        return self.pieces[0]

    def quantized(self, scheme: Scheme) -> Quantized:
        """A rank sees but a part of each row, and a whole row has one scale: the ranks find its maximum together."""
        amax = find_amax(self.weight, scheme)
        return quantize(self.weight, scheme, amax if scheme.group_size else self.tp.all_max(amax))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = None if self.linear is not None else self.kernels.linear_all_reduce(x, self.weight, self.tp)
        if y is None:
            y = self.tp.all_reduce(self.matmul(x))
        return y if self.bias is None else y + self.bias
