"""Which sequences compute how many tokens in the next step; on rank 0 only."""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass, field

from mmdist.config import EngineConfig
from mmdist.engine.batch import SHORT_PREFILL, Scheduled
from mmdist.engine.blocks import BlockManager
from mmdist.engine.pictures import EmbeddingCache
from mmdist.engine.request import Sequence

# A step reads all weights for its one token of each answer. A prompt's tokens cost more than that once they are as many
# as products that can be computed while a number is read: 20 to 80 on CPUs, about 300 on accelerators. Answers that run
# beside a long prompt should slow down by a few times, not stop; and prompts should not take many steps of little.
PREFILL_BESIDE_DECODE_ON_CPU, PREFILL_BESIDE_DECODE = 128, 512


@dataclass
class Room:
    """What a step has room for, and what was put into it.

    tokens: still to be given away, `reserved` of them to decoding sequences whose turn comes; pictures: that may still
    be encoded; starts: requests that may still begin.
    """

    tokens: int
    reserved: int
    pictures: int
    starts: int
    scheduled: list[Scheduled] = field(default_factory=list)


class Scheduler:
    """Running sequences first, in order of arrival; then new ones, by priority and in order too, while tokens, places
    and blocks last.

    A long prompt is prefilled in chunks beside the others' decoding; the chunks, and the pictures encoded for them, are
    few then, so that no one's answer stands still for long. When blocks run out, the youngest sequence gives its own
    back and is computed again later.
    """

    def __init__(self, config: EngineConfig, blocks: BlockManager, embeddings: EmbeddingCache, device: str = "cpu"):
        """device: its type."""
        self.config, self.blocks, self.embeddings = config, blocks, embeddings
        default = PREFILL_BESIDE_DECODE_ON_CPU if device == "cpu" else PREFILL_BESIDE_DECODE
        self.max_prefill_beside_decode = config.max_prefill_tokens_beside_decode or default
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Behind those that wait and are as urgent."""
        place = len(self.waiting)
        while place and self.waiting[place - 1].request.priority > sequence.request.priority:
            place -= 1
        self.waiting.insert(place, sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that is finished or no longer wanted."""
        self.blocks.release(sequence)
        for queue in (self.running, self.waiting):
            if sequence in queue:
                queue.remove(sequence)

    def schedule(self) -> list[Scheduled]:
        """Sequences with few new tokens come first."""
        room = self._room()
        preempted = self.num_preemptions
        for sequence in list(self.running):
            room.reserved -= is_decoding(sequence)
            if sequence in self.running:
                self._continue(sequence, room)
        while self.num_preemptions == preempted and self._admit(room):
            pass
        return sorted(room.scheduled, key=lambda item: item.num_tokens > SHORT_PREFILL)

    def _room(self) -> Room:
        config, num_decoding = self.config, sum(map(is_decoding, self.running))
        if not num_decoding:
            return Room(config.max_num_batched_tokens, 0, sys.maxsize, sys.maxsize)
        tokens = min(config.max_num_batched_tokens, num_decoding + self.max_prefill_beside_decode)
        return Room(tokens, num_decoding, 1, config.max_starts_beside_decode or sys.maxsize)

    def _continue(self, sequence: Sequence, room: Room) -> None:
        """Put a running sequence into the step; younger ones, in the end itself, make room for it in the cache."""
        stop = self._reach(sequence, sequence.num_computed, room)
        if stop == sequence.num_computed:
            return
        while not self.blocks.can_grow(sequence, stop):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return
        self._take(sequence, stop, room)

    def _admit(self, room: Room) -> bool:
        """Begin the first waiting sequence, if there is room for it now."""
        if not self.waiting or len(self.running) >= self.config.max_num_seqs or not room.starts:
            return False
        first = self.waiting[0]
        pictures = sum(s.request.prompt.memory_pictures for s in (first, *self.running))
        if pictures > self.config.max_pictures:
            return False
        found = self.blocks.find(first)
        start = len(found) * self.blocks.block_size
        stop = self._reach(first, start, room)
        if stop == start or self.blocks.is_coming(first, found) or not self.blocks.can_start(first, found, stop):
            return False
        self.running.append(self.waiting.popleft())
        self.blocks.start(first, found)
        room.starts -= 1
        self._take(first, stop, room)
        return True

    def _reach(self, sequence: Sequence, start: int, room: Room) -> int:
        """How far a sequence gets from `start` in this step; where a picture's turn has not come, up to it."""
        stop = min(sequence.num_tokens, start + room.tokens - room.reserved)
        places = self._new_pictures(sequence, start, stop)
        return places[room.pictures] if len(places) > room.pictures else stop

    def _new_pictures(self, sequence: Sequence, start: int, stop: int) -> list[int]:
        """Where in [start, stop) pictures begin that have to be encoded. Those that layers look at count as one."""
        pictures = [p for p in sequence.pictures_in(start, stop) if not self.embeddings.has(p)]
        if sequence.request.prompt.memory is not None:
            return [start for _ in pictures[:1]]
        positions = sequence.request.prompt.image_positions
        return [max(start, positions[picture.first]) for picture in pictures]

    def _take(self, sequence: Sequence, stop: int, room: Room) -> None:
        start = sequence.num_computed
        room.pictures -= len(self._new_pictures(sequence, start, stop))
        room.tokens -= stop - start
        self.blocks.grow(sequence, stop)
        room.scheduled.append(Scheduled(sequence, stop - start))

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.release(sequence)
        sequence.num_computed, sequence.remembered = 0, False
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1


def is_decoding(sequence: Sequence) -> bool:
    return sequence.num_tokens - sequence.num_computed == 1
