"""LLaVA-1.5 (7B, 13B): CLIP over one centre-cropped tile a picture, two-layer projector, Llama decoder.

Checkpoints: Hugging Face folders. Pictures are prepared as transformers does it (short edge, centre crop); the original
code can also pad to a square. LlavaModel is what the LLaVA families share.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers  # classes are looked up when used: importing them here would triple the start-up time

from mmdist.config import ModelConfig
from mmdist.models.base import MultimodalModel, Processor, Prompt
from mmdist.models.hub import IGNORED, HubProcessor
from mmdist.models.vision import ClipEncoder
from mmdist.tp import TP

# As the hub's files have them, and as transformers 5 names its parameters.
RENAMES = {
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


class LlavaProcessor(HubProcessor):
    def __init__(self, processor: Any, folder: Path, config: Any, options: ModelConfig):
        super().__init__(processor, folder, options)
        self.image_token_id = config.image_token_index
        # Older folders leave these out, and without them the placeholders would not match the pictures.
        processor.patch_size = config.vision_config.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = 1  # CLIP's class token

    def make_prompt(self, inputs: dict[str, Any]) -> Prompt:
        token_ids = inputs.pop("input_ids")
        return Prompt(token_ids, positions_of(self.image_token_id, token_ids), inputs)


def positions_of(wanted: int, token_ids: list[int]) -> list[int]:
    return [position for position, token_id in enumerate(token_ids) if token_id == wanted]


class LlavaModel(MultimodalModel):
    renames = RENAMES
    ignored = IGNORED
    encoder_class: ClassVar[type[ClipEncoder]] = ClipEncoder

    def __init__(self, config: Any, tp: TP):
        super().__init__(config, tp)
        self.vision = self.encoder_class(config)

    def vision_activations(self) -> int:
        return self.vision.activations()


class Llava(LlavaModel):
    config_class = transformers.LlavaConfig

    @classmethod
    def load_processor(cls, folder: Path, config: Any, options: ModelConfig) -> Processor:
        return LlavaProcessor(transformers.LlavaProcessor.from_pretrained(folder), folder, config, options)

    def encode_images(self, vision: dict[str, torch.Tensor]) -> torch.Tensor:
        """pixel_values (images, 3, size, size) -> (images * patches, hidden)."""
        return self.vision(vision["pixel_values"].to(self.vision.projector.linear_1.weight)).flatten(0, 1)


MODEL = Llava
