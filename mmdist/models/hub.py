"""What the families with Hugging Face folders share: transformers' processors as the way to prompts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from mmdist.config import ModelConfig, UserError
from mmdist.models.base import Processor, Prompt

# Tables that old versions of transformers saved and that follow from the config.
IGNORED = ("*.rotary_emb.inv_freq", "*.embeddings.position_ids")


class HubProcessor(Processor):
    """A processor of transformers: its chat template, placeholders counted, no second begin-of-sequence token."""

    def __init__(self, processor: Any, folder: Path, options: ModelConfig):
        self.processor, self.folder = processor, folder
        self.placeholder, self.tokenizer = processor.image_token, processor.tokenizer
        self.joined = find_bytes(self.tokenizer)
        if options.chat_template is not None:
            processor.chat_template = read_template(Path(options.chat_template))

    def prompt(
        self, *, images: Sequence[Any] = (), messages: list[dict] | None = None, text: str | None = None
    ) -> Prompt:
        text = self.text(messages, text)
        check_placeholders(text, self.placeholder, len(images), "pictures")
        return self.make_prompt(self.inputs(text, images))

    @abstractmethod
    def make_prompt(self, inputs: dict[str, Any]) -> Prompt:
        """The tensors of `inputs` -> Prompt."""

    def text(self, messages: list[dict] | None, text: str | None) -> str:
        """The prompt in words, placeholders in it."""
        if messages is not None:
            return self.apply_chat_template(messages)
        assert text is not None, "a prompt is made of messages or of text"
        return text

    def inputs(self, text: str, images: Sequence[Any]) -> dict[str, Any]:
        """The processor's tensors, input_ids (a list) among them."""
        bos = self.tokenizer.bos_token
        special = not (bos and text.startswith(bos))  # the template wrote it already
        inputs = self.processor(
            text=[text], images=list(images) or None, return_tensors="pt", add_special_tokens=special
        )
        inputs.pop("attention_mask")
        return {**inputs, "input_ids": inputs["input_ids"][0].tolist()}

    def apply_chat_template(self, messages: list[dict]) -> str:
        if self.processor.chat_template is None:
            raise UserError(
                f"{self.folder}: no chat template in it; give raw prompts, or a jinja file as model.chat_template=FILE"
            )
        try:
            return self.processor.apply_chat_template(messages, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise UserError(f"messages: the chat template refuses them: {error}") from error

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)


def find_bytes(tokenizer: Any) -> frozenset[int]:
    """Ids of a sentencepiece vocabulary's byte pieces; none in one of bytes alone."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    ids = tokenizer.convert_tokens_to_ids(pieces)  # of an unknown piece None or <unk>'s
    return frozenset(ids) - {None, tokenizer.unk_token_id}


def check_placeholders(text: str, placeholder: str, count: int, what: str) -> None:
    if text.count(placeholder) != count:
        raise UserError(
            f"{text.count(placeholder)} {placeholder} in the prompt, {count} {what} given; "
            f"write one {placeholder} for each"
        )


def read_template(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise UserError(f"model.chat_template={path}: cannot be read ({error.strerror}); give a jinja file") from error
