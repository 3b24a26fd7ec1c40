"""MiniGPT-4 (Vicuna v0 7B and 13B with a Q-Former, Llama-2 7B without): pictures become rows of a Llama's input.

Zhu et al., arXiv:2304.10592; reference: Vision-CAIR/MiniGPT-4. Checkpoints: what `weights_tools convert minigpt4`
writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PretrainedConfig
from transformers.configuration_utils import SubConfigSpec

from mmdist.config import ModelConfig, UserError
from mmdist.models.base import MultimodalModel, Processor
from mmdist.models.minigpt4_processor import MiniGPT4Processor
from mmdist.models.minigpt4_vision import MiniGPT4Encoder
from mmdist.tp import TP

RENAMES = {"vision.ln_vision.": "vision.tower.ln_vision."}  # as folders have it that were converted earlier
JOINED_PATCHES = 4  # neighbours that become one row in the variant without Q-Former


class MiniGPT4Config(PretrainedConfig):
    """What `weights_tools convert minigpt4` writes; the defaults are those of the published Vicuna 7B.

    Sizes in pixels. cross_attention_frequency: every how manyth layer of the Q-Former looks at the picture.
    """

    model_type = "minigpt4"
    sub_configs_defaults = {"text_config": SubConfigSpec(LlamaConfig)}

    text_config: dict | PretrainedConfig | None = None
    image_size: int = 224
    patch_size: int = 14
    vision_width: int = 1408
    vision_intermediate_size: int = 6144
    vision_num_layers: int = 39
    vision_num_heads: int = 16
    has_qformer: bool = True
    num_query_tokens: int = 32
    qformer_width: int = 768
    qformer_intermediate_size: int = 3072
    qformer_num_layers: int = 12
    qformer_num_heads: int = 12
    qformer_norm_eps: float = 1e-12
    cross_attention_frequency: int = 2
    tie_word_embeddings: bool = False

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens_per_image(self) -> int:
        return self.num_query_tokens if self.has_qformer else self.num_patches // JOINED_PATCHES

    @property
    def projector_width(self) -> int:
        return self.qformer_width if self.has_qformer else JOINED_PATCHES * self.vision_width


class MiniGPT4(MultimodalModel):
    config_class = MiniGPT4Config
    renames = RENAMES

    def __init__(self, config: Any, tp: TP):
        super().__init__(config, tp)
        self.vision = MiniGPT4Encoder(config)

    @classmethod
    def load_processor(cls, folder: Path, config: Any, options: ModelConfig) -> Processor:
        if options.chat_template is not None:
            raise UserError(
                "model.chat_template: MiniGPT-4 has its own conversation; leave it out, or give raw prompts"
            )
        return MiniGPT4Processor(folder, config)

    def vision_activations(self) -> int:
        return self.vision.activations()

    def encode_images(self, vision: dict[str, torch.Tensor]) -> torch.Tensor:
        """pixel_values (pictures, 3, size, size) -> (pictures * tokens_per_image, hidden)."""
        return self.vision(vision["pixel_values"]).flatten(0, 1)


MODEL = MiniGPT4
