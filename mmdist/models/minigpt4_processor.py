"""MiniGPT-4's words and pictures: upstream's conversation, sentencepiece ids around the pictures, which are squashed.

Reference: Vision-CAIR/MiniGPT-4, minigpt4/conversation/conversation.py and processors/blip_processors.py, with the
slow LlamaTokenizer of transformers 4.30.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sentencepiece import SentencePieceProcessor

from mmdist.config import UserError
from mmdist.models.base import Processor, Prompt
from mmdist.models.hub import check_placeholders
from mmdist.models.original import TOKENIZER, load_pieces, name_special, to_pixels

PLACEHOLDER = "<ImageHere>"
PICTURE = f"<Img>{PLACEHOLDER}</Img>"
IMAGE_TOKEN_ID = 0  # what stands where a picture's rows go; upstream has no token for it
SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)


@dataclass(frozen=True)
class Conversation:
    """How turns are written. separator: behind the system text and every turn. stop: what ends an answer."""

    user: str
    assistant: str
    separator: str
    stop: tuple[str, ...]

    def write(self, messages: list[dict]) -> str:
        """Messages -> the prompt in words; a system message replaces upstream's text."""
        system = SYSTEM
        if messages and messages[0]["role"] == "system":
            system, messages = text_of(messages[0]), messages[1:]
        turns: list[str] = []
        for message in messages:
            if message["role"] == "user":
                self.ask(turns, message["content"])
            elif message["role"] == "assistant":
                turns.append(self.assistant + text_of(message))
            else:
                raise UserError("messages: a system message stands first or not at all")
        return self.separator.join([system, *turns, self.assistant])

    def ask(self, turns: list[str], content: list[dict]) -> None:
        """As upstream's Chat takes uploads and questions: a picture is a turn, and the text behind it joins it."""
        for part in content:
            if part["type"] == "image":
                turns.append(self.user + PICTURE)
            elif part["type"] != "text":
                raise UserError(f"messages: MiniGPT-4 takes text and pictures, found {part['type']}")
            elif turns and turns[-1] == self.user + PICTURE:
                turns[-1] += f" {part['text']}"
            else:
                turns.append(self.user + part["text"])


def text_of(message: dict) -> str:
    if any(part["type"] != "text" for part in message["content"]):
        raise UserError(f"messages: pictures stand in a user's turn, found one in {message['role']}'s")
    return " ".join(part["text"] for part in message["content"])


VICUNA = Conversation("Human: ", "Assistant: ", "###", stop=("###",))
LLAMA2 = Conversation("<s>[INST] ", " [/INST] ", "", stop=())


class MiniGPT4Processor(Processor):
    placeholder = PICTURE

    def __init__(self, folder: Path, config: Any):
        self.config = config
        self.conversation = VICUNA if config.has_qformer else LLAMA2
        self.stop = self.conversation.stop
        self.tokenizer = load_tokenizer(folder / TOKENIZER, config.text_config.vocab_size)
        self.special = {self.tokenizer.id_to_piece(i): i for i in range(3)}

    def prompt(
        self, *, images: Sequence[Any] = (), messages: list[dict] | None = None, text: str | None = None
    ) -> Prompt:
        if messages is not None:
            text = self.conversation.write(messages)
        assert text is not None, "a prompt is made of messages or of text"
        check_placeholders(text, PLACEHOLDER, len(images), "pictures")
        first, *rest = map(self.encode, text.split(PLACEHOLDER))
        token_ids = [self.tokenizer.bos_id(), *first]
        positions: list[int] = []
        for segment in rest:
            positions += range(len(token_ids), len(token_ids) + self.config.tokens_per_image)
            token_ids += [IMAGE_TOKEN_ID] * self.config.tokens_per_image + segment
        pixels = [squash(image, self.config.image_size) for image in images]
        return Prompt(token_ids, positions, {"pixel_values": torch.stack(pixels)} if pixels else {})

    def encode(self, text: str) -> list[int]:
        """Special tokens cut the text into pieces, each encoded by itself with sentencepiece's dummy blank in front."""
        pieces = re.split(f"({'|'.join(map(re.escape, self.special))})", text)
        ids = ([self.special[piece]] if piece in self.special else self.tokenizer.encode(piece) for piece in pieces)
        return [token_id for some in ids for token_id in some]

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        known = range(len(self.special), self.tokenizer.vocab_size())
        if not skip_special_tokens:
            return name_special(self.tokenizer, token_ids)
        return self.tokenizer.decode([token_id for token_id in token_ids if token_id in known])


def load_tokenizer(path: Path, vocab_size: int) -> SentencePieceProcessor:
    """vocab_size: of the model, which may have a few more (Vicuna v0 has [PAD])."""
    tokenizer = load_pieces(path)
    if tokenizer.vocab_size() > vocab_size:
        raise UserError(f"{path}: {tokenizer.vocab_size()} pieces, the model has {vocab_size}; it is another model's")
    return tokenizer


def squash(image: Image.Image, size: int) -> torch.Tensor:
    """-> (3, size, size): both edges become `size`, whatever the picture's shape."""
    return to_pixels(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
