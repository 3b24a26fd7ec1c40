"""LLaVA-NeXT (llava-v1.6: mistral, vicuna, 34B): CLIP over anyres tiles, two-layer projector, Llama decoder.

Checkpoints: Hugging Face folders, with the hub's names or those that transformers 5 writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers  # classes are looked up when used: importing them here would triple the start-up time
from torch import nn
from transformers.models import llava_next as reference

from mmdist.config import ModelConfig
from mmdist.models.base import Processor
from mmdist.models.llava import LlavaModel, LlavaProcessor
from mmdist.models.vision import ClipEncoder


class LlavaNextEncoder(ClipEncoder):
    """Adds the learned vector that ends each row of a picture's grid."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.image_newline = nn.Parameter(torch.empty(config.text_config.hidden_size))


class LlavaNext(LlavaModel):
    vision: LlavaNextEncoder
    config_class: ClassVar[Any] = transformers.LlavaNextConfig
    encoder_class = LlavaNextEncoder

    @classmethod
    def load_processor(cls, folder: Path, config: Any, options: ModelConfig) -> Processor:
        return LlavaProcessor(transformers.LlavaNextProcessor.from_pretrained(folder), folder, config, options)

    def encode_images(self, vision: dict[str, torch.Tensor]) -> torch.Tensor:
        """pixel_values (images, tiles, 3, size, size), image_sizes (images, 2) (height, width) -> (tokens, hidden)."""
        sizes, counts = vision["image_sizes"].tolist(), self.count_tiles(vision)
        tiles = torch.cat([pixels[:count] for pixels, count in zip(vision["pixel_values"], counts, strict=True)])
        features = self.vision(tiles.to(self.vision.image_newline)).split(counts)
        return torch.cat([self.pack(feature, size) for feature, size in zip(features, sizes, strict=True)])

    def count_tiles(self, vision: dict[str, torch.Tensor]) -> list[int]:
        """Of each picture; those behind them are padding."""
        return [
            reference.modeling_llava_next.image_size_to_num_patches(size, self.pinpoints, self.tile_size)
            for size in vision["image_sizes"].tolist()
        ]

    def split_pictures(self, vision: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Without the padding, which depends on the request's other pictures."""
        if "image_sizes" not in vision:
            return super().split_pictures(vision)
        counts, pictures = self.count_tiles(vision), super().split_pictures(vision)
        return [{**one, "pixel_values": one["pixel_values"][:n]} for one, n in zip(pictures, counts, strict=True)]

    def picture_rows(self, vision: dict[str, torch.Tensor], num_rows: int) -> list[int]:
        """Pictures differ in their grids."""
        if "image_sizes" not in vision:
            return super().picture_rows(vision, num_rows)
        return [self.count_rows(size) for size in vision["image_sizes"].tolist()]

    def count_rows(self, image_size: list[int]) -> int:
        """Of what pack() makes of a picture."""
        side = self.tile_size // self.config.vision_config.patch_size
        rows, columns = self.grid_shape(image_size)
        grid = reference.modeling_llava_next.unpad_image(torch.empty(0, rows * side, columns * side), image_size)
        return side * side + grid.shape[1] * (grid.shape[2] + 1)

    def grid_shape(self, image_size: list[int]) -> tuple[int, int]:
        """(rows, columns) of tiles."""
        return reference.modeling_llava_next.get_anyres_image_grid_shape(image_size, self.pinpoints, self.tile_size)

    @property
    def pinpoints(self) -> list[list[int]]:
        return self.config.image_grid_pinpoints

    @property
    def tile_size(self) -> int:
        return self.config.vision_config.image_size

    def pack(self, tiles: torch.Tensor, image_size: list[int]) -> torch.Tensor:
        """(1 + rows * columns, patches, hidden) of one picture -> (tokens, hidden).

        The base tile first, then the grid of tiles as one picture, cut back to the picture's aspect ratio, each row
        of patches ended by the newline vector (transformers 5.23, LlavaNextModel.pack_image_features).
        """
        base, grid = tiles[0], tiles[1:]
        rows, columns = self.grid_shape(image_size)
        side = self.tile_size // self.config.vision_config.patch_size
        grid = grid.view(rows, columns, side, side, -1).permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)
        grid = reference.modeling_llava_next.unpad_image(grid, image_size)
        newline = self.vision.image_newline[:, None, None].expand(-1, grid.shape[1], 1)
        return torch.cat((base, torch.cat((grid, newline), dim=-1).flatten(1).T))


MODEL = LlavaNext
