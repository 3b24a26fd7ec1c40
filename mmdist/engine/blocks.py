"""The blocks of the paged KV cache: which are free, which are whose, and which are found again."""

from __future__ import annotations

import heapq

from mmdist.engine.prefix import PrefixCache, hash_blocks
from mmdist.engine.request import Sequence


class BlockManager:
    """Hands out the lowest free blocks, so that a lone sequence lies in one contiguous run.

    With finds_prefixes full blocks have their tokens' hashes, and sequences that begin alike share them; those that
    nobody has any more are handed out when no other is free.
    """

    def __init__(self, num_blocks: int, block_size: int, *, finds_prefixes: bool = False):
        self.num_blocks, self.block_size, self.finds_prefixes = num_blocks, block_size, finds_prefixes
        self.free = list(range(num_blocks))
        self.num_users = [0] * num_blocks
        self.prefix = PrefixCache()

    @property
    def num_free(self) -> int:
        return len(self.free) + len(self.prefix.unused)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks the sequence still needs to hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size) - len(sequence.block_table)

    def can_grow(self, sequence: Sequence, num_tokens: int) -> bool:
        return self.missing(sequence, num_tokens) <= self.num_free

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        for block in sorted(self._take() for _ in range(self.missing(sequence, num_tokens))):
            self.num_users[block] = 1
            sequence.block_table.append(block)

    def _take(self) -> int:
        return heapq.heappop(self.free) if self.free else self.prefix.evict()

    def find(self, sequence: Sequence) -> list[int]:
        """Blocks that hold the beginning of a sequence already; its last token is always left to be computed."""
        return self.prefix.find(self._hashes(sequence))

    def is_coming(self, sequence: Sequence, found: list[int]) -> bool:
        """True when running sequences are about to compute half of what is missing behind `found`, or more."""
        hashes = self._hashes(sequence)[len(found) :]
        return self.prefix.count_coming(hashes) * self.block_size * 2 >= (
            sequence.num_tokens - len(found) * self.block_size
        )

    def _hashes(self, sequence: Sequence) -> list[bytes]:
        if not self.finds_prefixes:
            return []
        return hash_blocks(sequence, self.block_size, (sequence.num_tokens - 1) // self.block_size)

    def can_start(self, sequence: Sequence, found: list[int], num_tokens: int) -> bool:
        """True when there is room for `num_tokens` tokens, the first of them in the blocks of find()."""
        num_unused = sum(block in self.prefix.unused for block in found)
        return self.missing(sequence, num_tokens) - len(found) <= self.num_free - num_unused

    def start(self, sequence: Sequence, found: list[int]) -> None:
        """Begin a sequence behind the blocks of find()."""
        for block in found:
            self.num_users[block] += 1
            self.prefix.unused.pop(block, None)
        sequence.block_table += found
        sequence.num_findable, sequence.num_computed = len(found), len(found) * self.block_size
        self.prefix.coming.update(self._hashes(sequence)[len(found) :])
        if self.finds_prefixes and sequence.num_cached_tokens is None:  # not again after a preemption
            sequence.num_cached_tokens = sequence.num_computed
            self.prefix.num_queried_tokens += sequence.num_tokens
            self.prefix.num_hit_tokens += sequence.num_computed

    def note_computed(self, sequence: Sequence) -> None:
        """Let others find the full blocks whose keys and values are there now."""
        num_full = sequence.num_computed // self.block_size
        if not self.finds_prefixes or num_full == sequence.num_findable:
            return
        hashes = hash_blocks(sequence, self.block_size, num_full)
        for number in range(sequence.num_findable, num_full):
            self.prefix.add(hashes[number], sequence.block_table[number])
        sequence.num_findable = num_full

    def release(self, sequence: Sequence) -> None:
        """Its blocks are nobody's, the last one first: a block is of use only behind those before it."""
        for block in reversed(sequence.block_table):
            self.num_users[block] -= 1
            if not self.num_users[block] and not self.prefix.keep(block):
                heapq.heappush(self.free, block)
        self.prefix.coming.difference_update(sequence.block_hashes[sequence.num_findable :])
        sequence.block_table.clear()
        sequence.num_findable = 0
