"""One step's work as rank 0 sends it to all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from mmdist.engine.request import Picture, Sequence

SHORT_PREFILL = 16  # up to so many new tokens of a prompt are attended for one by one, beside those of answers


@dataclass
class NewMemory:
    """Encoded pictures that come to all ranks in this step; shape: theirs, memory: Prompt.memory."""

    id: str
    shape: tuple[int, ...]
    memory: Any


@dataclass
class Batch:
    """Sequences laid end to end, those with few new tokens first; plain lists, so that it travels in one message.

    query_lens: new tokens of each sequence; context_lens: its tokens in the cache after this step. image_rows: which
    of the new tokens are pictures'; logits_rows: after which of them a token is sampled, and candidates: from how many
    of the likeliest tokens (0, or none said: all). memory_ids: whose pictures
    each sequence's layers look at ("" for none); kept_memories: all that are still needed.
    """

    input_ids: list[int] = field(default_factory=list)
    query_lens: list[int] = field(default_factory=list)
    context_lens: list[int] = field(default_factory=list)
    block_tables: list[list[int]] = field(default_factory=list)
    image_rows: list[int] = field(default_factory=list)
    logits_rows: list[int] = field(default_factory=list)
    candidates: list[int] = field(default_factory=list)
    memory_ids: list[str] = field(default_factory=list)
    kept_memories: list[str] = field(default_factory=list)
    new_memories: list[NewMemory] = field(default_factory=list)

    @property
    def phase(self) -> str:
        """What the step is (mmdist.spans): decode, or prefill as soon as any prompt is in it."""
        return "decode" if all(query_len == 1 for query_len in self.query_lens) else "prefill"


@dataclass
class Scheduled:
    """A sequence and how many of its tokens this step computes."""

    sequence: Sequence
    num_tokens: int

    @property
    def start(self) -> int:
        return self.sequence.num_computed

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens

    @property
    def samples(self) -> bool:
        """True when the step reaches the sequence's last token, so that the next one is sampled."""
        return self.stop == self.sequence.num_tokens

    def image_range(self) -> tuple[int, int]:
        """Which of the request's image tokens are among this step's tokens."""
        return self.sequence.image_range(self.start, self.stop)

    def pictures(self) -> list[Picture]:
        """Those that must be encoded for this step."""
        return self.sequence.pictures_in(self.start, self.stop)


def build_batch(scheduled: list[Scheduled], running: Iterable[Sequence] = ()) -> Batch:
    batch = Batch(kept_memories=[memory_id(sequence) for sequence in running if memory_id(sequence)])
    for item in scheduled:
        row = len(batch.input_ids) - item.start
        first, last = item.image_range()
        batch.image_rows += [row + p for p in item.sequence.request.prompt.image_positions[first:last]]
        batch.input_ids += item.sequence.tokens(item.start, item.stop)
        batch.query_lens.append(item.num_tokens)
        batch.context_lens.append(item.stop)
        batch.block_tables.append(item.sequence.block_table)
        batch.memory_ids.append(memory_id(item.sequence))
        if item.samples:
            batch.logits_rows.append(len(batch.input_ids) - 1)
    return batch


def image_embeds(scheduled: list[Scheduled]) -> list[torch.Tensor]:
    """The rows for Batch.image_rows, in order; rank 0 only."""
    embeds = []
    for item in scheduled:
        first, last = item.image_range()
        for picture in item.sequence.pictures_of(first, last):
            embeds.append(rows_of(picture)[max(0, first - picture.first) : last - picture.first])
    return embeds


def rows_of(picture: Picture) -> torch.Tensor:
    assert picture.embeds is not None, "pictures are encoded before a step looks at them"
    return picture.embeds


def memory_id(sequence: Sequence) -> str:
    return "" if sequence.request.prompt.memory is None else sequence.request.id


def take_memories(scheduled: list[Scheduled], batch: Batch) -> list[torch.Tensor]:
    """Announce in the batch what no rank remembers yet; the encoded pictures, in that order; rank 0 only."""
    encoded: list[torch.Tensor] = []
    for sequence in (item.sequence for item in scheduled):
        if memory_id(sequence) and not sequence.remembered:
            rows = [rows_of(picture) for picture in sequence.pictures]
            encoded.append(rows[0] if len(rows) == 1 else torch.cat(rows))
            memory = sequence.request.prompt.memory
            batch.new_memories.append(NewMemory(sequence.request.id, tuple(encoded[-1].shape), memory))
            sequence.remembered = True
    return encoded
