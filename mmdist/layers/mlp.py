"""The gated feed-forward block of Llama, cut by its intermediate dimension."""

from __future__ import annotations

import torch
from torch import nn

from mmdist.kernels.kernels import PLAIN, Kernels
from mmdist.kernels.plain import find_activation
from mmdist.layers.linear import ColumnParallelLinear, RowParallelLinear
from mmdist.plan import Piece
from mmdist.tp import TP


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)): (tokens, hidden) -> (tokens, hidden)."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str, tp: TP, *, bias: bool = False):
        super().__init__()
        tp.divide(intermediate_size, "intermediate_size")
        pieces = [Piece(intermediate_size, name) for name in ("gate_proj", "up_proj")]
        self.gate_up_proj = ColumnParallelLinear(hidden_size, pieces, tp, bias=bias)
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, tp, bias=bias)
        find_activation(activation)  # refuses an unknown one
        self.activation = activation
        self.kernels = PLAIN

    def after_load(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.kernels.gated(self.gate_up_proj(x), self.activation))
