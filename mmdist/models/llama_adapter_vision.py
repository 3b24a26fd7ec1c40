"""LLaMA-Adapter's picture side: CLIP's tokens and learned queries through a few transformer blocks, on rank 0 alone.

Reference: OpenGVLab/LLaMA-Adapter, llama_adapter_v2_multimodal7b/llama/llama_adapter.py; the blocks are timm 0.4.12's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mmdist.models.tower import Tower
from mmdist.models.vision import MLP, ClipTower, FusedAttention

NORM_EPS = 1e-5


class BlockAttention(FusedAttention):
    def __init__(self, width: int, num_heads: int):
        super().__init__(num_heads)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.attend(self.qkv(x)))


class VisualBlock(nn.Module):
    """timm's transformer block: (batch, tokens, width) -> the same."""

    def __init__(self, config: Any):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.v_embed_dim, NORM_EPS)
        self.attn = BlockAttention(config.v_embed_dim, config.v_num_heads)
        self.norm2 = nn.LayerNorm(config.v_embed_dim, NORM_EPS)
        self.mlp = MLP(config.v_embed_dim, config.v_intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class LlamaAdapterEncoder(Tower):
    """A picture -> query_len rows of the decoder's width. All of it is one tower, as in Ascend's own om of it."""

    rank_zero_only = True

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        vision, hidden_size = config.vision_config, config.text_config.hidden_size
        self.tower = ClipTower(vision, [-1], drop_class_token=False)
        self.projection = nn.Linear(vision.hidden_size, vision.projection_dim, bias=False)
        self.clip_proj = nn.Linear(vision.projection_dim, config.v_embed_dim)
        self.clip_proj_norm = nn.LayerNorm(config.v_embed_dim, NORM_EPS)
        self.visual_query = nn.Embedding(config.query_len, config.v_embed_dim)
        self.visual_blocks = nn.ModuleList(VisualBlock(config) for _ in range(config.v_depth))
        self.visual_proj = nn.Linear(config.v_embed_dim, hidden_size)
        self.visual_proj_norm = nn.LayerNorm(hidden_size, NORM_EPS)

    def example_inputs(self, batch: int) -> tuple[torch.Tensor, ...]:
        return self.tower.example_inputs(batch)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(pictures, 3, size, size) -> (pictures, query_len, hidden)."""
        return self.ask(self.clip_features(pixel_values))

    def clip_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(pictures, 3, size, size) -> (pictures, 1 + patches, projection): of all tokens, not the class's alone."""
        states = self.tower(pixel_values)
        return self.projection(self.tower.model.post_layernorm(states))

    def ask(self, features: torch.Tensor) -> torch.Tensor:
        """CLIP's (pictures, tokens, projection) -> (pictures, query_len, hidden)."""
        x = self.clip_proj_norm(self.clip_proj(features))
        x = torch.cat((self.visual_query.weight.expand(x.shape[0], -1, -1), x), dim=1)
        for block in self.visual_blocks:
            x = block(x)
        return self.visual_proj_norm(self.visual_proj(x[:, : self.config.query_len]))


def encoder_activations(config: Any) -> int:
    """Numbers that live at once over one picture: pixels, and the states and MLP of a layer."""
    vision = config.vision_config
    tokens = 1 + (vision.image_size // vision.patch_size) ** 2
    layer = tokens * (6 * vision.hidden_size + 2 * vision.intermediate_size)
    block = (tokens + config.query_len) * (6 * config.v_embed_dim + 2 * config.v_intermediate_size)
    return 2 * 3 * vision.image_size**2 + max(layer, block)
