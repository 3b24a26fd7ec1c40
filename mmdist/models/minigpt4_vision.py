"""MiniGPT-4's picture side, on rank 0 alone: EVA ViT-g, BLIP-2's Q-Former (in the Vicuna variant) and one projection.

Reference: Vision-CAIR/MiniGPT-4, minigpt4/models/{eva_vit,Qformer,base_model,minigpt_base,minigpt4}.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mmdist.kernels.kernels import PLAIN, Kernels
from mmdist.models.tower import Tower, noise
from mmdist.models.vision import MLP, FusedAttention

EVA_NORM_EPS, LN_VISION_EPS = 1e-6, 1e-5
MAX_PICTURES = 16  # of one forward pass: bounds its memory when a request has many


class EvaAttention(FusedAttention):
    """Fused q, k, v; q and v have a bias, k has none."""

    def __init__(self, width: int, num_heads: int):
        super().__init__(num_heads)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.empty(width))
        self.v_bias = nn.Parameter(torch.empty(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        return self.proj(self.attend(F.linear(x, self.qkv.weight, bias)))


class EvaBlock(nn.Module):
    """(pictures, tokens, width) -> the same."""

    def __init__(self, config: Any):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.vision_width, EVA_NORM_EPS)
        self.attn = EvaAttention(config.vision_width, config.vision_num_heads)
        self.norm2 = nn.LayerNorm(config.vision_width, EVA_NORM_EPS)
        self.mlp = MLP(config.vision_width, config.vision_intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.proj = nn.Conv2d(3, config.vision_width, config.patch_size, config.patch_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(pictures, 3, size, size) -> (pictures, patches, width)."""
        return self.proj(pixel_values).flatten(2).transpose(1, 2)


class EvaTower(Tower):
    """EVA ViT-g without its last block; BLIP-2's ln_vision stands in for its final norm.

    The norm's weights are in BLIP-2's file, which the variant without Q-Former does not read.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.image_size = config.image_size
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.vision_width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.num_patches, config.vision_width))
        self.blocks = nn.ModuleList(EvaBlock(config) for _ in range(config.vision_num_layers))
        self.ln_vision = nn.LayerNorm(config.vision_width, LN_VISION_EPS, elementwise_affine=config.has_qformer)

    def example_inputs(self, batch: int) -> tuple[torch.Tensor, ...]:
        return (noise(batch, 3, self.image_size, self.image_size),)

    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(pictures, 3, size, size) -> (pictures, 1 + patches, width), the class token first."""
        patches = self.patch_embed(pixel_values)
        return torch.cat((self.cls_token.expand(len(patches), -1, -1), patches), dim=1) + self.pos_embed

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(pictures, 3, size, size) -> (pictures, 1 + patches, width)."""
        x = self.embed(pixel_values)
        for block in self.blocks:
            x = block(x)
        return self.ln_vision(x)


class QFormerAttention(nn.Module):
    """BERT's attention with its residual and norm; keys and values come from `seen`."""

    def __init__(self, config: Any, seen_width: int):
        super().__init__()
        self.num_heads = config.qformer_num_heads
        self.query = nn.Linear(config.qformer_width, config.qformer_width)
        self.key = nn.Linear(seen_width, config.qformer_width)
        self.value = nn.Linear(seen_width, config.qformer_width)
        self.dense = nn.Linear(config.qformer_width, config.qformer_width)
        self.norm = nn.LayerNorm(config.qformer_width, config.qformer_norm_eps)
        self.kernels = PLAIN

    def after_load(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(self.query(x)), self.heads(self.key(seen)), self.heads(self.value(seen))
        out = self.kernels.attention(q, k, v, scale=q.shape[-1] ** -0.5).flatten(2)
        return self.norm(self.dense(out) + x)


class QFormerLayer(nn.Module):
    """The queries' branch of a layer: the text's feed-forward block is never used."""

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.attention = QFormerAttention(config, config.qformer_width)
        sees_picture = layer % config.cross_attention_frequency == 0
        self.crossattention = QFormerAttention(config, config.vision_width) if sees_picture else None
        self.mlp = MLP(config.qformer_width, config.qformer_intermediate_size)
        self.norm = nn.LayerNorm(config.qformer_width, config.qformer_norm_eps)

    def forward(self, x: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        x = self.attention(x, x)
        if self.crossattention is not None:
            x = self.crossattention(x, states)
        return self.norm(self.mlp(x) + x)


class QFormer(nn.Module):
    """Learned queries look at a picture: (pictures, tokens, vision width) -> (pictures, queries, width)."""

    def __init__(self, config: Any):
        super().__init__()
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, config.qformer_width))
        self.norm = nn.LayerNorm(config.qformer_width, config.qformer_norm_eps)
        self.layers = nn.ModuleList(QFormerLayer(config, layer) for layer in range(config.qformer_num_layers))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.query_tokens).expand(len(states), -1, -1)
        for layer in self.layers:
            x = layer(x, states)
        return x


class MiniGPT4Encoder(nn.Module):
    """Pictures -> rows of the decoder's width, config.tokens_per_image each."""

    rank_zero_only = True

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.tower: nn.Module = EvaTower(config)
        self.qformer = QFormer(config) if config.has_qformer else None
        self.llama_proj = nn.Linear(config.projector_width, config.text_config.hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(pictures, 3, size, size) -> (pictures, tokens_per_image, hidden)."""
        parts = pixel_values.to(self.llama_proj.weight).split(MAX_PICTURES)
        return torch.cat([self.describe(self.tower(part)) for part in parts])

    def describe(self, states: torch.Tensor) -> torch.Tensor:
        """(pictures, 1 + patches, vision width) -> (pictures, tokens_per_image, hidden)."""
        if self.qformer is not None:
            return self.llama_proj(self.qformer(states))
        joined = states[:, 1:].unflatten(1, (self.config.tokens_per_image, -1)).flatten(2)
        return self.llama_proj(joined)

    def activations(self) -> int:
        """Numbers that live at once in one pass over MAX_PICTURES pictures: pixels, a layer's states, its MLP."""
        config = self.config
        states = (1 + config.num_patches) * (6 * config.vision_width + 2 * config.vision_intermediate_size)
        return MAX_PICTURES * (2 * 3 * config.image_size**2 + states)
