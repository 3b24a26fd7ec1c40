"""RMSNorm as Llama has it: statistics in float32, the result cast before the weight is applied."""

from __future__ import annotations

import torch
from torch import nn

from mmdist.kernels.kernels import PLAIN, Kernels


class RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.eps = eps
        self.kernels = PLAIN

    def after_load(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernels.rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x + y, and that normed."""
        return self.kernels.add_rms_norm(x, y, self.weight, self.eps)
