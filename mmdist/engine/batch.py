"""One step's work as rank 0 sends it to all."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

import torch

from mmdist.engine.request import Sequence


@dataclass
class Batch:
    """Sequences laid end to end, those with one new token first; plain lists, so that it travels in one message.

    query_lens: new tokens of each sequence; context_lens: its tokens in the cache after this step. image_rows: which
    of the new tokens are pictures'; logits_rows: after which of them a token is sampled.
    """

    input_ids: list[int] = field(default_factory=list)
    query_lens: list[int] = field(default_factory=list)
    context_lens: list[int] = field(default_factory=list)
    block_tables: list[list[int]] = field(default_factory=list)
    image_rows: list[int] = field(default_factory=list)
    logits_rows: list[int] = field(default_factory=list)


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
        positions = self.sequence.request.prompt.image_positions
        return bisect_left(positions, self.start), bisect_left(positions, self.stop)


def build_batch(scheduled: list[Scheduled]) -> Batch:
    batch = Batch()
    for item in scheduled:
        row = len(batch.input_ids) - item.start
        first, last = item.image_range()
        batch.image_rows += [row + p for p in item.sequence.request.prompt.image_positions[first:last]]
        batch.input_ids += item.sequence.tokens(item.start, item.stop)
        batch.query_lens.append(item.num_tokens)
        batch.context_lens.append(item.stop)
        batch.block_tables.append(item.sequence.block_table)
        if item.samples:
            batch.logits_rows.append(len(batch.input_ids) - 1)
    return batch


def image_embeds(scheduled: list[Scheduled]) -> list[torch.Tensor]:
    """The rows for Batch.image_rows, in order; rank 0 only."""
    ranges = [(item.sequence.image_embeds, *item.image_range()) for item in scheduled]
    return [embeds[first:last] for embeds, first, last in ranges if embeds is not None and first < last]
