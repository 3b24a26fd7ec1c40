"""Vision towers of transformers, run as far as a model looks at them, and parts that several encoders share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers  # classes are looked up when used: importing them here would triple the start-up time
from torch import nn

from mmdist.kernels.kernels import Kernels
from mmdist.kernels.plain import find_activation
from mmdist.models.tower import Tower, noise

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


class ClipTower(Tower):
    """CLIP's vision tower; all its parameters are there, the layers behind the last one asked for do not run.

    layers: transformers' numbers of hidden states, 0 the embeddings, negative ones counted from the end.
    """

    def __init__(self, config: Any, layers: list[int], *, drop_class_token: bool):
        super().__init__()
        self.model: Any = transformers.CLIPVisionModel(config)
        self.layers = [layer % (config.num_hidden_layers + 1) for layer in layers]
        self.drop_class_token = drop_class_token

    def example_inputs(self, batch: int) -> tuple[torch.Tensor, ...]:
        size = self.model.config.image_size
        return (noise(batch, 3, size, size),)

    def after_load(self, kernels: Kernels) -> None:
        embeddings = self.model.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions, device=kernels.device)[None]
        register_attention(self.model.config)
        for layer in self.model.encoder.layers:
            layer.self_attn.kernels = kernels
            if self.model.config.hidden_act == "quick_gelu":
                del layer.mlp.activation_fn  # a module; a function may not take its place before it is gone
                layer.mlp.activation_fn = kernels.quick_gelu

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(tiles, 3, size, size) -> (tiles, patches, hidden * len(layers)), the class token first where it is kept."""
        states = torch.cat(self.hidden_states(pixel_values, self.layers), dim=-1)
        return states[:, 1:] if self.drop_class_token else states

    def hidden_states(self, pixel_values: torch.Tensor, layers: list[int]) -> list[torch.Tensor]:
        """(tiles, 1 + patches, hidden) behind each of the layers, 0 being the embeddings."""
        states = [self.model.pre_layrnorm(self.model.embeddings(pixel_values))]
        for layer in self.model.encoder.layers[: max(layers)]:
            states.append(layer(states[-1], attention_mask=None))
        return [states[layer] for layer in layers]


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
        layers = [layers] if isinstance(layers, int) else list(layers)
        drops = config.vision_feature_select_strategy == "default"
        hidden_size = config.text_config.hidden_size
        self.vision_config = config.vision_config
        self.tower: nn.Module = ClipTower(config.vision_config, layers, drop_class_token=drops)
        self.projector = Projector(
            config.vision_config.hidden_size * len(layers),
            hidden_size,
            config.projector_hidden_act,
            config.multimodal_projector_bias,
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(tiles, 3, size, size) -> (tiles, patches, decoder hidden)."""
        return torch.cat([self.projector(self.tower(tiles)) for tiles in pixel_values.split(MAX_TILES)])

    def activations(self) -> int:
        """Numbers that live at once in one pass over MAX_TILES tiles: pixels, a layer's hidden states, its MLP."""
        config = self.vision_config
        tokens = MAX_TILES * (1 + (config.image_size // config.patch_size) ** 2)
        pixels = 2 * MAX_TILES * 3 * config.image_size**2
        return pixels + tokens * (6 * config.hidden_size + 2 * config.intermediate_size)
