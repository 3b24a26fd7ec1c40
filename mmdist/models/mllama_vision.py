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
from mmdist.models.vision import register_attention

PATCH_MULTIPLE = 8  # patches of a tile are padded to a multiple of this


class MllamaEncoder(nn.Module):
    """Tiles of a picture -> states the decoder looks at; on rank 0 alone."""

    rank_zero_only = True

    def __init__(self, config: Any):
        super().__init__()
        self.model: Any = transformers.MllamaVisionModel(config.vision_config)
        self.projector = nn.Linear(config.vision_config.vision_output_dim, config.text_config.hidden_size)
        self.indices = config.vision_config.intermediate_layers_indices

    def after_load(self, kernels: Kernels) -> None:
        register_attention(self.model.config)
        for layer in (*self.model.transformer.layers, *self.model.global_transformer.layers):
            layer.self_attn.kernels = kernels

    @property
    def num_patches(self) -> int:
        """Of a tile, the class token included."""
        return self.model.num_patches

    def forward(self, pixel_values: torch.Tensor, ratio_ids: torch.Tensor, ratio_mask: torch.Tensor) -> torch.Tensor:
        """(pictures, tiles, 3, size, size), (pictures,), (pictures, tiles) -> (pictures, tiles, patches, hidden)."""
        pictures = zip(pixel_values.split(1), ratio_ids.split(1), ratio_mask.split(1), strict=True)
        return self.projector(torch.cat([self.encode(*picture) for picture in pictures]))

    def encode(self, pixel_values: torch.Tensor, ratio_ids: torch.Tensor, ratio_mask: torch.Tensor) -> torch.Tensor:
        """The arguments of one picture -> (1, tiles, patches, (1 + number of indices) * width)."""
        model, ratio_ids = self.model, ratio_ids[:, None]
        x = self.embed(pixel_values, ratio_ids)
        shape = x.shape  # (1, tiles, padded patches, width)
        mask = modeling_mllama._prepare_aspect_ratio_attention_mask(
            aspect_ratio_mask=ratio_mask, num_patches=self.num_patches, target_length=shape[2], dtype=x.dtype
        )
        states = [x.flatten(1, 2)]
        for layer in model.transformer.layers:
            states.append(layer(states[-1], mask))
        x = model.post_tile_positional_embedding(model.layernorm_post(states[-1]).view(shape), ratio_ids).flatten(1, 2)
        for layer in model.global_transformer.layers:
            x = layer(x, mask)
        inputs = torch.stack([states[i] for i in self.indices], dim=-1).flatten(2)
        joined = torch.cat([x, inputs], dim=-1)
        return joined.unflatten(1, shape[1:3])[:, :, : self.num_patches]

    def embed(self, pixel_values: torch.Tensor, ratio_ids: torch.Tensor) -> torch.Tensor:
        """(1, tiles, 3, size, size) -> (1, tiles, padded patches, width)."""
        model = self.model
        weight = model.patch_embedding.weight
        x = model.patch_embedding(pixel_values[0].to(weight)).flatten(2).transpose(1, 2)
        x = model.pre_tile_positional_embedding(x[None], ratio_ids)
        x = model.apply_class_embedding(x[0])
        x = model.layernorm_pre(model.gated_positional_embedding(x[None], ratio_ids))
        return F.pad(x, (0, 0, 0, -x.shape[2] % PATCH_MULTIPLE))

    def activations(self) -> int:
        """Numbers that live at once over one picture: pixels, the states that are kept, a layer's MLP, the mask."""
        config = self.model.config
        tokens = config.max_num_tiles * (-(-self.num_patches // PATCH_MULTIPLE) * PATCH_MULTIPLE)
        pixels = 2 * config.max_num_tiles * 3 * config.image_size**2
        kept = tokens * (config.num_hidden_layers * config.hidden_size + 2 * config.vision_output_dim)
        return pixels + kept + tokens * (6 * config.hidden_size + 2 * config.intermediate_size) + 2 * tokens**2
