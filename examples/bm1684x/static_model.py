"""The networks of `weights_tools export mllama --static` put together: a prompt and its picture in, token by token out.

What the chip's runtime does with a bmodel, with onnxruntime: one picture at most, as many tokens as the files have
places, and sizes read off the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from mmdist.config import UserError
from mmdist.models.base import Prompt
from mmdist.models.mllama import Seen

MASKED = np.float32(-9984)  # added to the score of what is not seen


@dataclass
class Sampling:
    """mode: greedy, or penalty_sample, which alone heeds the others but max_new_tokens."""

    mode: str = "greedy"
    temperature: float = 0.6
    top_p: float = 0.9
    repeat_penalty: float = 1.0
    repeat_last_n: int = 32
    max_new_tokens: int = 50
    seed: int | None = None


class Network:
    def __init__(self, path: Path):
        if not path.exists():
            raise UserError(f"{path}: missing; give a folder made by weights_tools export mllama --static as -m")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.shapes = {given.name: given.shape for given in self.session.get_inputs()}
        self.output_shapes = {given.name: given.shape for given in self.session.get_outputs()}

    def __call__(self, **inputs: np.ndarray) -> list[np.ndarray]:
        return self.session.run(None, inputs)


class StaticModel:
    """One conversation's state and the networks.

    eos_token_ids: those that end an answer. tokens: of prompt and answer so far. past: per block, keys and values.
    """

    def __init__(self, folder: Path):
        self.eos_token_ids: set[int] = set()
        self.embedding, self.embedding_cache, self.lm_head, self.greedy_head, self.sample_head = (
            Network(folder / f"{name}.onnx")
            for name in ("embedding", "embedding_cache", "lm_head", "greedy_head", "penalty_sample_head")
        )
        self.vision = Network(folder / "vision_transformer.onnx")
        count = len(list(folder.glob("block_cache_*.onnx")))
        self.blocks = [Network(folder / f"block_{number}.onnx") for number in range(count)]
        self.cached = [Network(folder / f"block_cache_{number}.onnx") for number in range(count)]
        self.crosses = ["cross_attention_states" in block.shapes for block in self.blocks]
        self.seq_length = self.embedding.shapes["input_ids"][1]
        self.num_tiles, self.num_patches, _ = self.vision.output_shapes["cross_attention_states"]
        self.tokens: list[int] = []
        self.seen: Seen | None = None
        self.past: list[Any] = []

    def generate(self, prompt: Prompt, sampling: Sampling) -> Iterator[int]:
        """The answer's tokens, the one that ends it included; UserError where the prompt has no place."""
        self.check(prompt)
        random = np.random.default_rng(sampling.seed)
        logits = self.prefill(prompt)
        for number in range(1, sampling.max_new_tokens + 1):
            token = self.choose(logits, sampling, random)
            self.tokens.append(token)
            yield token
            if token in self.eos_token_ids or len(self.tokens) == self.seq_length or number == sampling.max_new_tokens:
                return
            logits = self.decode(token)

    def check(self, prompt: Prompt) -> None:
        length = len(prompt.token_ids)
        if length >= self.seq_length:
            raise UserError(
                f"the prompt has {length} tokens, and with an answer it must fit the {self.seq_length} of these files; "
                "ask less, begin anew, or export with a longer --seq-length"
            )
        if prompt.memory_pictures > 1:
            raise UserError(f"{prompt.memory_pictures} pictures: these files have room for one; begin anew")

    def prefill(self, prompt: Prompt) -> np.ndarray:
        """-> logits after the prompt. Rows behind it are computed too and seen by no one."""
        self.tokens, self.past = list(prompt.token_ids), []
        self.seen = prompt.memory[0] if prompt.memory_pictures else None
        length, rows = len(self.tokens), np.arange(self.seq_length)
        ids = np.zeros((1, self.seq_length), np.int32)
        ids[0, :length] = self.tokens
        positions = np.where(rows < length, rows, 0).astype(np.int32)[None]
        mask = additive((rows[None] <= rows[:, None]) & (rows < length)[:, None])[None, None]
        looks = self.look(prompt, rows) if self.seen is not None else {}
        (x,) = self.embedding(input_ids=ids)
        for block, crosses in zip(self.blocks, self.crosses, strict=True):
            if crosses and self.seen is None:
                self.past.append(None)
                continue
            own = looks if crosses else {"position_ids": positions, "attention_mask": mask}
            x, *past = block(input_states=x, **own)
            self.past.append(past)
        return self.lm_head(hidden_states=x[:, length - 1])[0]

    def look(self, prompt: Prompt, rows: np.ndarray) -> dict[str, np.ndarray]:
        """What the cross-attention blocks are given of the picture."""
        vision = {name: tensor.numpy() for name, tensor in prompt.vision.items()}
        (states,) = self.vision(
            pixel_values=vision["pixel_values"][0].astype(np.float32),
            aspect_ratio_ids=vision["aspect_ratio_ids"].reshape(1, 1).astype(np.int32),
            aspect_ratio_mask=vision["aspect_ratio_mask"].reshape(1, -1).astype(np.int32),
        )
        sees, mask = self.picture_masks(rows)
        return {"cross_attention_states": states, "text_row_mask": sees[None, :, None], "attention_mask": mask}

    def picture_masks(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(rows,): 1 where the picture is seen, else 0; (1, 1, rows, tiles * patches): the tiles it has, or, in rows
        that see no picture, all of them (only the layer's MLP is dropped there)."""
        assert self.seen is not None, "there is a picture"
        sees = rows >= self.seen.start
        tiles = (np.arange(self.num_tiles) < self.seen.num_tiles) | ~sees[:, None]
        return sees.astype(np.float32), additive(tiles.repeat(self.num_patches, axis=1))[None, None]

    def decode(self, token: int) -> np.ndarray:
        """-> logits after the token, the last of self.tokens."""
        place = len(self.tokens) - 1
        position = np.full((1, 1), place, np.int32)
        kept = np.arange(self.seq_length + 1) < place
        kept[-1] = True  # the token itself comes last
        own = {"position_ids": position, "attention_mask": additive(kept)[None, None, None]}
        looks = {} if self.seen is None else {"attention_mask": self.picture_masks(position[0])[1]}
        (x,) = self.embedding_cache(input_ids=np.full((1, 1), token, np.int32))
        for block, crosses, past in zip(self.cached, self.crosses, self.past, strict=True):
            if past is None:
                continue
            history = dict(zip(("history_k", "history_v"), past, strict=True))
            x, *new = block(input_states=x, **(looks if crosses else own), **history)
            for old, row in zip(past, new, strict=False):
                old[:, place] = row[:, 0]
        return self.lm_head(hidden_states=x[:, 0])[0]

    def choose(self, logits: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
        if sampling.mode == "greedy":
            return int(self.greedy_head(m_logits=logits)[0][0, 0])
        recent = self.tokens[-sampling.repeat_last_n :] if sampling.repeat_last_n else []
        recent = [token for token in recent if token < logits.shape[1]]  # <|image|> has no logit
        ids = np.full(
            (1, self.seq_length), recent[0] if recent else 0, np.int32
        )  # what is there twice is penalised once
        ids[0, : len(recent)] = recent
        settings = {
            "top_p": sampling.top_p,
            "temperature": sampling.temperature,
            "penalty": sampling.repeat_penalty if recent else 1.0,
        }
        numbers = {name: np.array([value], np.float32) for name, value in settings.items()}
        probs, tokens = self.sample_head(m_logits=logits, input_ids=ids, **numbers)
        return int(random.choice(tokens[0], p=normal(probs[0])))


def normal(probs: Sequence[float] | np.ndarray) -> np.ndarray:
    """Sums to 1 in float64, as numpy wants it."""
    wide = np.asarray(probs, np.float64)
    return wide / wide.sum()


def additive(mask: np.ndarray) -> np.ndarray:
    """True for what is seen -> what is added to the scores."""
    return np.where(mask, np.float32(0), MASKED)
