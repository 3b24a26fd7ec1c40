"""The free blocks of the paged KV cache."""

from __future__ import annotations

import heapq

from mmdist.engine.request import Sequence


class BlockManager:
    """Hands out the lowest free block, so that a lone sequence lies in one contiguous run."""

    def __init__(self, num_blocks: int, block_size: int):
        self.block_size = block_size
        self.free = list(range(num_blocks))

    def missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks the sequence still needs to hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size) - len(sequence.block_table)

    def can_grow(self, sequence: Sequence, num_tokens: int) -> bool:
        return self.missing(sequence, num_tokens) <= len(self.free)

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        for _ in range(self.missing(sequence, num_tokens)):
            sequence.block_table.append(heapq.heappop(self.free))

    def release(self, sequence: Sequence) -> None:
        for block in sequence.block_table:
            heapq.heappush(self.free, block)
        sequence.block_table.clear()
