"""VLMo's words and pictures: WordPiece ids, a squashed picture, and the list of answers.

Reference: microsoft/unilm, vlmo/datasets/base_dataset.py and vlmo/transforms (bicubic resize to a square, mean and std
0.5); answer2label.txt as seen in Ascend's guide to VLMo: one {"answer": ..., "label": ...} a line, where the number of
the line is the class and "label" is not read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import BertWordPieceTokenizer

from mmdist.config import UserError
from mmdist.models.base import Processor, Prompt

VOCABULARY, ANSWERS = "vocab.txt", "answer2label.txt"


class VlmoProcessor(Processor):
    single_turn = True

    def __init__(self, folder: Path, config: Any):
        self.image_size = config.image_size
        self.tokenizer = load_tokenizer(folder / VOCABULARY, config)
        self.answers = load_answers(folder / ANSWERS, config.num_answers) if config.head == "vqa" else []

    def prompt(
        self, *, images: Sequence[Any] = (), messages: list[dict] | None = None, text: str | None = None
    ) -> Prompt:
        if messages is not None:
            text = find_question(messages)
        if len(images) > 1:
            raise UserError(f"VLMo looks at one picture, {len(images)} are given")
        prompt = self.text(text) if text is not None else Prompt([])
        if images:
            prompt.vision = {"pixel_values": self.pixel_values(images[0])}
        return prompt

    def text(self, text: str) -> Prompt:
        encoded = self.tokenizer.encode(text)
        return Prompt(encoded.ids, truncated=bool(encoded.overflowing))

    def pixel_values(self, image: Image.Image) -> torch.Tensor:
        """-> (1, 3, size, size)."""
        small = image.convert("RGB").resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255
        return ((pixels - 0.5) / 0.5)[None]

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """A list of one class -> its answer."""
        return ", ".join(self.answers[label] for label in token_ids)


def find_question(messages: list[dict]) -> str:
    roles = [message["role"] for message in messages]
    if roles != ["user"]:
        raise UserError(f"VLMo answers single questions: give one message of a user, not {', '.join(roles) or 'none'}")
    return " ".join(part["text"] for part in messages[0]["content"] if part["type"] == "text")


def load_tokenizer(path: Path, config: Any) -> BertWordPieceTokenizer:
    if not path.exists():
        raise UserError(f"{path}: no such file; VLMo needs the vocabulary of bert-base-uncased beside its weights")
    tokenizer = BertWordPieceTokenizer(str(path), lowercase=True)
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise UserError(
            f"{path}: {tokenizer.get_vocab_size()} words, the model has embeddings of {config.vocab_size}; "
            "it is the vocabulary of another model"
        )
    tokenizer.enable_truncation(config.max_text_len)
    return tokenizer


def load_answers(path: Path, num_answers: int) -> list[str]:
    """The answer of each class, by the number of its line."""
    if not path.exists():
        raise UserError(f"{path}: no such file; VLMo needs the list of its {num_answers} answers beside its weights")
    with path.open(encoding="utf-8") as lines:  # not splitlines(), which also breaks at characters inside an answer
        answers = [parse_answer(line, f"{path}: line {i}") for i, line in enumerate(lines, 1)]
    if len(answers) != num_answers:
        raise UserError(
            f"{path}: {len(answers)} answers, the classifier has {num_answers} classes; take the file the checkpoint "
            "was trained with"
        )
    return answers


def parse_answer(line: str, where: str) -> str:
    try:
        answer = json.loads(line)["answer"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f'{where}: expected {{"answer": TEXT, "label": NUMBER}}, found {line[:60]!r}') from error
    if not isinstance(answer, str):
        raise UserError(f"{where}: the answer is {type(answer).__name__}, expected text")
    return answer
