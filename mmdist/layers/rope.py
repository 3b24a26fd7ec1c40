"""Rotary position embedding in the half-split form of Llama, with the scalings that do not depend on the prompt."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import nn

from mmdist.config import UserError
from mmdist.kernels.kernels import Kernels

STATIC_SCALINGS = ("linear", "llama3", "yarn")


class RotaryEmbedding(nn.Module):
    """positions -> the cosines and sines that the cache rotates q and k by.

    config: a transformers text config (its rope_parameters say the rest).
    """

    def __init__(self, config: Any, head_dim: int):
        super().__init__()
        rope_type = config.rope_parameters["rope_type"]
        if rope_type != "default" and rope_type not in STATIC_SCALINGS:
            raise UserError(f"rope_type={rope_type}: expected default, {', '.join(STATIC_SCALINGS)}")
        self.config, self.head_dim = config, head_dim
        self.scaling = 1.0
        self.inv_freq = torch.empty(0)

    def after_load(self, kernels: Kernels) -> None:
        """Compute what is not stored in a checkpoint; called once, after the weights are loaded."""
        device = kernels.device
        parameters = self.config.rope_parameters
        if parameters["rope_type"] == "default":
            exponents = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32) / self.head_dim
            self.inv_freq = parameters["rope_theta"] ** -exponents
        else:
            scalings = import_module("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS  # it takes 0.6 s
            self.inv_freq, self.scaling = scalings[parameters["rope_type"]](self.config, device)

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens,) -> cosines and sines, each (tokens, 1, head_dim)."""
        angles = positions[:, None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)
