"""Which sequences compute how many tokens in the next step; on rank 0 only."""

from __future__ import annotations

from collections import deque

from mmdist.config import EngineConfig
from mmdist.engine.batch import Scheduled
from mmdist.engine.blocks import BlockManager
from mmdist.engine.request import Sequence


class Scheduler:
    """Running sequences first, in order of arrival; then new ones while tokens, places and blocks last.

    A long prompt is prefilled in chunks beside the others' decoding. When blocks run out, the youngest sequence gives
    its own back and is computed again later.
    """

    def __init__(self, config: EngineConfig, blocks: BlockManager):
        self.config, self.blocks = config, blocks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that is finished or no longer wanted."""
        self.blocks.release(sequence)
        for queue in (self.running, self.waiting):
            if sequence in queue:
                queue.remove(sequence)

    def schedule(self) -> list[Scheduled]:
        """Sequences with one new token come first."""
        scheduled: list[Scheduled] = []
        budget = self.config.max_num_batched_tokens
        preempted = self.num_preemptions
        reserved = sum(map(is_decoding, self.running))  # a long prompt leaves every decoding sequence its token
        for sequence in list(self.running):
            reserved -= is_decoding(sequence)
            if sequence in self.running and budget > reserved:
                budget -= self._continue(sequence, budget - reserved, scheduled)
        while budget > 0 and self.num_preemptions == preempted and self._can_admit(budget):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            budget -= self._take(sequence, budget, scheduled)
        return sorted(scheduled, key=lambda item: item.num_tokens > 1)

    def _continue(self, sequence: Sequence, budget: int, scheduled: list[Scheduled]) -> int:
        """Tokens of a running sequence put into the step; younger ones, in the end itself, make room for it."""
        target = sequence.num_computed + min(sequence.num_tokens - sequence.num_computed, budget)
        while not self.blocks.can_grow(sequence, target):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return 0
        return self._take(sequence, budget, scheduled)

    def _take(self, sequence: Sequence, budget: int, scheduled: list[Scheduled]) -> int:
        num_tokens = min(sequence.num_tokens - sequence.num_computed, budget)
        self.blocks.grow(sequence, sequence.num_computed + num_tokens)
        scheduled.append(Scheduled(sequence, num_tokens))
        return num_tokens

    def _can_admit(self, budget: int) -> bool:
        if not self.waiting or len(self.running) >= self.config.max_num_seqs:
            return False
        first = self.waiting[0]
        pictures = sum(s.request.prompt.memory_pictures for s in (first, *self.running))
        if pictures > self.config.max_pictures:
            return False
        return self.blocks.can_grow(first, min(first.num_tokens, budget))

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.release(sequence)
        sequence.num_computed, sequence.remembered = 0, False
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1


def is_decoding(sequence: Sequence) -> bool:
    return sequence.num_tokens - sequence.num_computed == 1
