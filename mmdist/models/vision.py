"""Vision towers of transformers, run as far as a model looks at them, and parts that several encoders share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers  # classes are looked up when used: importing them here would triple the start-up time
from torch import nn

from mmdist.kernels.kernels import Kernels
from mmdist.kernels.plain import find_activation

# Tiles of one forward pass of the tower: bounds its memory when a request has many pictures.
MAX_TILES = 16


OUR_ATTENTION = "mmdist"


def tower_attention(
    module: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Behind transformers' AttentionInterface: (batch, heads, tokens, head_dim) -> (batch, tokens, heads, head_dim).

    mask: (batch, 1, queries, keys), 0 or a very small number.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if mask is None:
        return module.kernels.attention(q, k, v, scale=scaling), None
    parts = zip(q, k, v, mask[:, 0] == 0, strict=True)
    return torch.stack([module.kernels.masked_attention(*part, scale=scaling) for part in parts]), None


def register_attention(config: Any) -> None:
    """Let the attention of a tower with this config be ours; its modules then need `kernels`."""
    transformers.AttentionInterface.register(OUR_ATTENTION, tower_attention)
    config._attn_implementation = OUR_ATTENTION


class ClipTower(nn.Module):
    """CLIP's vision tower; all its parameters are there, the layers behind the last one asked for do not run."""

    def __init__(self, config: Any):
        super().__init__()
        self.model: Any = transformers.CLIPVisionModel(config)

    def after_load(self, kernels: Kernels) -> None:
        embeddings = self.model.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions, device=kernels.device)[None]
        register_attention(self.model.config)
        for layer in self.model.encoder.layers:
            layer.self_attn.kernels = kernels
            if self.model.config.hidden_act == "quick_gelu":
                del layer.mlp.activation_fn  # a module; a function may not take its place before it is gone
                layer.mlp.activation_fn = kernels.quick_gelu

    def forward(self, pixel_values: torch.Tensor, layers: list[int]) -> torch.Tensor:
        """(tiles, 3, size, size) -> (tiles, 1 + patches, hidden * len(layers)).

        Layer i is transformers' hidden_states[i]: 0 the embeddings, negative ones counted from the end.
        """
        wanted = [layer % (len(self.model.encoder.layers) + 1) for layer in layers]
        states = [self.model.pre_layrnorm(self.model.embeddings(pixel_values))]
        for layer in self.model.encoder.layers[: max(wanted)]:
            states.append(layer(states[-1], attention_mask=None))
        return torch.cat([states[i] for i in wanted], dim=-1)


class MLP(nn.Module):
    """The feed-forward block of a vision transformer, with exact GELU."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class FusedAttention(nn.Module):
    """What vision transformers with one projection for q, k and v share."""

    kernels = Kernels(torch.device("cpu"))

    def __init__(self, num_heads: int):
        super().__init__()
        self.num_heads = num_heads

    def after_load(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, 3 * width) -> (batch, tokens, width)"""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return self.kernels.attention(q, k, v, scale=q.shape[-1] ** -0.5).flatten(2)


class Projector(nn.Module):
    """Two linear layers from the tower's width to the decoder's."""

    def __init__(self, in_features: int, hidden_size: int, activation: str, bias: bool):
        super().__init__()
        self.linear_1 = nn.Linear(in_features, hidden_size, bias=bias)
        self.linear_2 = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.activation = find_activation(activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))


class ClipEncoder(nn.Module):
    """Tower and projector of the LLaVA family; on rank 0 alone."""

    rank_zero_only = True

    def __init__(self, config: Any):
        super().__init__()
        layers = config.vision_feature_layer
        self.layers = [layers] if isinstance(layers, int) else list(layers)
        self.drop_class_token = config.vision_feature_select_strategy == "default"
        hidden_size = config.text_config.hidden_size
        self.tower = ClipTower(config.vision_config)
        self.projector = Projector(
            config.vision_config.hidden_size * len(self.layers),
            hidden_size,
            config.projector_hidden_act,
            config.multimodal_projector_bias,
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(tiles, 3, size, size) -> (tiles, patches, decoder hidden)."""
        return torch.cat([self.projector(self.features(tiles)) for tiles in pixel_values.split(MAX_TILES)])

    def features(self, tiles: torch.Tensor) -> torch.Tensor:
        """The tower's output, (tiles, patches, width), as the projector takes it."""
        states = self.tower(tiles, self.layers)
        return states[:, 1:] if self.drop_class_token else states

    def activations(self) -> int:
        """Numbers that live at once in one pass over MAX_TILES tiles: pixels, a layer's hidden states, its MLP."""
        config = self.tower.model.config
        tokens = MAX_TILES * self.tower.model.embeddings.num_positions
        pixels = 2 * MAX_TILES * 3 * config.image_size**2
        return pixels + tokens * (6 * config.hidden_size + 2 * config.intermediate_size)
