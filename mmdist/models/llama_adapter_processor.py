"""LLaMA-Adapter's words and pictures: sentencepiece ids of an Alpaca prompt, and one picture as CLIP takes it.

Reference: OpenGVLab/LLaMA-Adapter, llama_adapter_v2_multimodal7b/llama/{tokenizer,utils}.py and openai/CLIP, clip.py.
Pictures go in as RGB, as CLIP was trained. Upstream's demo.py reads them with cv2 and feeds blue, green, red instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sentencepiece import SentencePieceProcessor

from mmdist.config import UserError
from mmdist.models.base import Processor, Prompt
from mmdist.models.original import TOKENIZER, load_pieces, name_special, to_pixels

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


class LlamaAdapterProcessor(Processor):
    single_turn = True

    def __init__(self, folder: Path, config: Any):
        self.image_size = config.vision_config.image_size
        self.tokenizer = load_tokenizer(folder / TOKENIZER, config.text_config.vocab_size)

    def prompt(
        self, *, images: Sequence[Any] = (), messages: list[dict] | None = None, text: str | None = None
    ) -> Prompt:
        """Messages: one of a user, whose text is the instruction and whose second text, if any, its input."""
        if len(images) != 1:
            raise UserError(f"LLaMA-Adapter looks at exactly one picture, {len(images)} are given")
        if messages is not None:
            text = alpaca_prompt(messages)
        assert text is not None, "a prompt is made of messages or of text"
        token_ids = [self.tokenizer.bos_id(), *self.tokenizer.encode(text)]
        vision = {"pixel_values": clip_pixels(images[0], self.image_size)}
        return Prompt(token_ids, vision=vision, memory=(), memory_pictures=1)

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(token_ids) if skip_special_tokens else name_special(self.tokenizer, token_ids)


def alpaca_prompt(messages: list[dict]) -> str:
    roles = [message["role"] for message in messages]
    if roles != ["user"]:
        found = ", ".join(roles) or "none"
        raise UserError(f"LLaMA-Adapter has no conversation: give one message of a user; found {found}")
    texts = [part["text"] for part in messages[0]["content"] if part["type"] == "text"]
    if len(texts) not in (1, 2):
        raise UserError(f"{len(texts)} texts in the message; the first is the instruction, a second one its input")
    if len(texts) == 1:
        return PROMPT.format_map({"instruction": texts[0]})
    return PROMPT_WITH_INPUT.format_map({"instruction": texts[0], "input": texts[1]})


def load_tokenizer(path: Path, vocab_size: int) -> SentencePieceProcessor:
    tokenizer = load_pieces(path)
    if tokenizer.vocab_size() != vocab_size:
        raise UserError(f"{path}: {tokenizer.vocab_size()} pieces, the model has {vocab_size}; it is another model's")
    return tokenizer


def clip_pixels(image: Image.Image, size: int) -> torch.Tensor:
    """-> (1, 3, size, size): the short edge becomes `size`, then the middle is cut out (torchvision's rounding)."""
    short = min(image.size)
    width, height = (int(size * length / short) for length in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    scaled = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    return to_pixels(scaled.crop((left, top, left + size, top + size)))[None]
