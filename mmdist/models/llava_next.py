"""LLaVA-NeXT (llava-v1.6: mistral, vicuna, 34B): CLIP over anyres tiles, two-layer projector, Llama decoder.

Checkpoints: Hugging Face folders, with the hub's names or those that transformers 5 writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers  # classes are looked up when used: importing them here would triple the start-up time
from torch import nn
from transformers.models import llava_next as reference

from mmdist.config import ModelConfig, UserError
from mmdist.models.base import MultimodalModel, Processor, Prompt
from mmdist.models.vision import ClipEncoder
from mmdist.tp import TP


class LlavaNextVision(ClipEncoder):
    """Adds the learned vector that ends each row of a picture's grid."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.image_newline = nn.Parameter(torch.empty(config.text_config.hidden_size))


class LlavaNext(MultimodalModel):
    vision: LlavaNextVision
    config_class = transformers.LlavaNextConfig
    renames = {
        "language_model.model.": "decoder.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.vision_model.": "vision.tower.model.",
        "vision_tower.": "vision.tower.model.",
        "multi_modal_projector.": "vision.projector.",
        "image_newline": "vision.image_newline",
        "model.language_model.": "decoder.",
        "model.vision_tower.vision_model.": "vision.tower.model.",
        "model.vision_tower.": "vision.tower.model.",
        "model.multi_modal_projector.": "vision.projector.",
        "model.image_newline": "vision.image_newline",
    }
    # Tables that old versions of transformers saved and that follow from the config.
    ignored = ("*.rotary_emb.inv_freq", "*.embeddings.position_ids")

    def __init__(self, config: Any, tp: TP):
        super().__init__(config, tp)
        self.vision = LlavaNextVision(config)

    @classmethod
    def load_processor(cls, folder: Path, config: Any, options: ModelConfig) -> Processor:
        return LlavaNextPrompts(folder, config, options)

    def encode_images(self, vision: dict[str, torch.Tensor]) -> torch.Tensor:
        """pixel_values (images, tiles, 3, size, size), image_sizes (images, 2) (height, width) -> (tokens, hidden)."""
        sizes = vision["image_sizes"].tolist()
        counts = [
            reference.modeling_llava_next.image_size_to_num_patches(size, self.pinpoints, self.tile_size)
            for size in sizes
        ]
        tiles = torch.cat([pixels[:count] for pixels, count in zip(vision["pixel_values"], counts, strict=True)])
        features = self.vision(tiles.to(self.vision.image_newline)).split(counts)
        return torch.cat([self.pack(feature, size) for feature, size in zip(features, sizes, strict=True)])

    def vision_activations(self) -> int:
        return self.vision.activations()

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
        rows, columns = reference.modeling_llava_next.get_anyres_image_grid_shape(
            image_size, self.pinpoints, self.tile_size
        )
        side = self.tile_size // self.config.vision_config.patch_size
        grid = grid.view(rows, columns, side, side, -1).permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)
        grid = reference.modeling_llava_next.unpad_image(grid, image_size)
        newline = self.vision.image_newline[:, None, None].expand(-1, grid.shape[1], 1)
        return torch.cat((base, torch.cat((grid, newline), dim=-1).flatten(1).T))


class LlavaNextPrompts(Processor):
    """transformers' LlavaNextProcessor, with placeholders and pictures counted."""

    def __init__(self, folder: Path, config: Any, options: ModelConfig):
        self.processor = transformers.LlavaNextProcessor.from_pretrained(folder)
        if options.chat_template is not None:
            self.processor.chat_template = read_template(Path(options.chat_template))
        self.folder = folder
        self.image_token_id = config.image_token_index

    def prompt(
        self, *, images: Sequence[Any] = (), messages: list[dict] | None = None, text: str | None = None
    ) -> Prompt:
        if messages is not None:
            text = self.apply_chat_template(messages)
        assert text is not None, "a prompt is made of messages or of text"
        placeholder = self.processor.image_token
        if text.count(placeholder) != len(images):
            raise UserError(
                f"{text.count(placeholder)} {placeholder} in the prompt, {len(images)} pictures given; "
                f"write one {placeholder} for each picture"
            )
        bos = self.processor.tokenizer.bos_token
        special = not (bos and text.startswith(bos))  # the template wrote it already
        inputs = self.processor(
            text=[text], images=list(images) or None, return_tensors="pt", add_special_tokens=special
        )
        token_ids = inputs.pop("input_ids")[0].tolist()
        inputs.pop("attention_mask")
        positions = [i for i, token_id in enumerate(token_ids) if token_id == self.image_token_id]
        return Prompt(token_ids, positions, dict(inputs))

    def apply_chat_template(self, messages: list[dict]) -> str:
        if self.processor.chat_template is None:
            raise UserError(
                f"{self.folder}: no chat template in it; give raw prompts, or a jinja file as model.chat_template=FILE"
            )
        try:
            return self.processor.apply_chat_template(messages, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise UserError(f"messages: the chat template refuses them: {error}") from error

    def decode(self, token_ids: list[int]) -> str:
        return self.processor.tokenizer.decode(token_ids, skip_special_tokens=True)


def read_template(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise UserError(f"model.chat_template={path}: cannot be read ({error.strerror}); give a jinja file") from error


MODEL = LlavaNext
