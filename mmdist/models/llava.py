"""LLaVA-1.5 (7B, 13B): CLIP over one centre-cropped tile a picture, two-layer projector, Llama decoder.

Checkpoints: Hugging Face folders. Pictures are prepared as transformers does it (short edge, centre crop); the original
code can also pad to a square.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers  # classes are looked up when used: importing them here would triple the start-up time

from mmdist.config import ModelConfig
from mmdist.models.base import MultimodalModel, Processor
from mmdist.models.hub import IGNORED, RENAMES, LlavaPrompts
from mmdist.models.vision import ClipEncoder
from mmdist.tp import TP


class Llava(MultimodalModel):
    vision: ClipEncoder
    config_class = transformers.LlavaConfig
    renames = RENAMES
    ignored = IGNORED

    def __init__(self, config: Any, tp: TP):
        super().__init__(config, tp)
        self.vision = ClipEncoder(config)

    @classmethod
    def load_processor(cls, folder: Path, config: Any, options: ModelConfig) -> Processor:
        return LlavaPrompts(transformers.LlavaProcessor.from_pretrained(folder), folder, config, options)

    def encode_images(self, vision: dict[str, torch.Tensor]) -> torch.Tensor:
        """pixel_values (images, 3, size, size) -> (images * patches, hidden)."""
        return self.vision(vision["pixel_values"].to(self.vision.projector.linear_1.weight)).flatten(0, 1)

    def vision_activations(self) -> int:
        return self.vision.activations()


MODEL = Llava
