"""Llama-3.2-Vision's encoder: transformers' parts, put together as Meta's code and transformers 4.46.3 do.

transformers 5.23 takes the output of layer i for i in intermediate_layers_indices; the checkpoints were trained with
its input.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers  # classes are looked up when used: importing them here would triple the start-up time
from torch import nn
from transformers.models.mllama import modeling_mllama

from mmdist.kernels.kernels import Kernels
from mmdist.models.tower import Tower, noise
from mmdist.models.vision import register_attention

PATCH_MULTIPLE = 8  # patches of a tile are padded to a multiple of this


class MllamaTower(Tower):
    """The vision transformer and the states it keeps on the way, one picture at a time."""

    input_names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    max_batch = 1

    def __init__(self, config: Any):
        super().__init__()
        self.model: Any = transformers.MllamaVisionModel(config)
        self.indices = config.intermediate_layers_indices

    def after_load(self, kernels: Kernels) -> None:
        register_attention(self.model.config)
        for layer in (*self.model.transformer.layers, *self.model.global_transformer.layers):
            layer.self_attn.kernels = kernels

    def example_inputs(self, batch: int) -> tuple[torch.Tensor, ...]:
        """Of the widest picture: a row of tiles."""
        tiles, size = self.model.config.max_num_tiles, self.model.config.image_size
        widest = self.model.config.supported_aspect_ratios.index([1, tiles])
        mask = torch.ones(batch, tiles, dtype=torch.long)
        return noise(batch, tiles, 3, size, size), torch.full((batch,), 1 + widest), mask

    def forward(self, pixel_values: torch.Tensor, ratio_ids: torch.Tensor, ratio_mask: torch.Tensor) -> torch.Tensor:
        """(1, tiles, 3, size, size), (1,), (1, tiles) -> (1, tiles, patches, (1 + number of indices) * width)."""
        model, ratio_ids = self.model, ratio_ids[:, None]
        x = self.embed(pixel_values, ratio_ids)
        shape = x.shape  # (1, tiles, padded patches, width)
        mask = modeling_mllama._prepare_aspect_ratio_attention_mask(
            aspect_ratio_mask=ratio_mask, num_patches=model.num_patches, target_length=shape[2], dtype=x.dtype
        )
        states = [x.flatten(1, 2)]
        for layer in model.transformer.layers:
            states.append(layer(states[-1], mask))
        x = model.post_tile_positional_embedding(model.layernorm_post(states[-1]).view(shape), ratio_ids).flatten(1, 2)
        for layer in model.global_transformer.layers:
            x = layer(x, mask)
        inputs = torch.stack([states[i] for i in self.indices], dim=-1).flatten(2)
        joined = torch.cat([x, inputs], dim=-1)
        return joined.unflatten(1, shape[1:3])[:, :, : model.num_patches]

    def embed(self, pixel_values: torch.Tensor, ratio_ids: torch.Tensor) -> torch.Tensor:
        """(1, tiles, 3, size, size) -> (1, tiles, padded patches, width)."""
        model = self.model
        x = model.patch_embedding(pixel_values[0]).flatten(2).transpose(1, 2)
        x = model.pre_tile_positional_embedding(x[None], ratio_ids)
        x = model.apply_class_embedding(x[0])
        x = model.layernorm_pre(model.gated_positional_embedding(x[None], ratio_ids))
        return F.pad(x, (0, 0, 0, -x.shape[2] % PATCH_MULTIPLE))


class MllamaEncoder(nn.Module):
    """Tiles of a picture -> states the decoder looks at; on rank 0 alone."""

    rank_zero_only = True

    def __init__(self, config: Any):
        super().__init__()
        self.vision_config = config.vision_config
        self.tower: nn.Module = MllamaTower(config.vision_config)
        self.projector = nn.Linear(config.vision_config.vision_output_dim, config.text_config.hidden_size)

    @property
    def num_patches(self) -> int:
        """Of a tile, the class token included."""
        return 1 + (self.vision_config.image_size // self.vision_config.patch_size) ** 2

    def forward(self, pixel_values: torch.Tensor, ratio_ids: torch.Tensor, ratio_mask: torch.Tensor) -> torch.Tensor:
        """(pictures, tiles, 3, size, size), (pictures,), (pictures, tiles) -> (pictures, tiles, patches, hidden)."""
        pixel_values = pixel_values.to(self.projector.weight)
        pictures = zip(pixel_values.split(1), ratio_ids.split(1), ratio_mask.split(1), strict=True)
        return self.projector(torch.cat([self.tower(*picture) for picture in pictures]))

    def activations(self) -> int:
        """Numbers that live at once over one picture: pixels, the states that are kept, a layer's MLP, the mask."""
        config = self.vision_config
        tokens = config.max_num_tiles * (-(-self.num_patches // PATCH_MULTIPLE) * PATCH_MULTIPLE)
        pixels = 2 * config.max_num_tiles * 3 * config.image_size**2
        kept = tokens * (config.num_hidden_layers * config.hidden_size + 2 * config.vision_output_dim)
        return pixels + kept + tokens * (6 * config.hidden_size + 2 * config.intermediate_size) + 2 * tokens**2
