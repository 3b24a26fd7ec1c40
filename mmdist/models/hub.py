"""What the LLaVA families share: their names in checkpoints, and transformers' processors as the way to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from mmdist.config import ModelConfig, UserError
from mmdist.models.base import Processor, Prompt

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
# Tables that old versions of transformers saved and that follow from the config.
IGNORED = ("*.rotary_emb.inv_freq", "*.embeddings.position_ids")


class LlavaPrompts(Processor):
    """A LLaVA processor of transformers, with placeholders and pictures counted."""

    def __init__(self, processor: Any, folder: Path, config: Any, options: ModelConfig):
        self.processor, self.folder = processor, folder
        self.image_token_id = config.image_token_index
        # Older folders leave these out, and without them the placeholders would not match the pictures.
        processor.patch_size = config.vision_config.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = 1  # CLIP's class token
        if options.chat_template is not None:
            processor.chat_template = read_template(Path(options.chat_template))

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
