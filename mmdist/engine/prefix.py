"""The prefix cache: full blocks of the KV cache, found again by all that their keys and values depend on.

A block's hash is made of the hash of the block before it, of its tokens, and of the pictures that its image tokens
show; in families whose layers look at pictures everywhere, all of a request's pictures come before the first block.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict

from mmdist.engine.request import Sequence

DIGEST_BYTES = 16
NOTHING_BEFORE = bytes(DIGEST_BYTES)


class PrefixCache:
    """Blocks by hash. unused: those no sequence has any more, kept until room is needed, the oldest first.

    coming: hashes of blocks that running sequences are going to compute.
    """

    def __init__(self) -> None:
        self.block_of: dict[bytes, int] = {}
        self.hash_of: dict[int, bytes] = {}
        self.unused: OrderedDict[int, None] = OrderedDict()
        self.coming: set[bytes] = set()
        self.num_queried_tokens = self.num_hit_tokens = 0

    def find(self, hashes: list[bytes]) -> list[int]:
        """The blocks of the longest known beginning."""
        found = []
        for digest in hashes:
            if digest not in self.block_of:
                break
            found.append(self.block_of[digest])
        return found

    def count_coming(self, hashes: list[bytes]) -> int:
        """How many of these, from the first on, are about to be found."""
        known = (digest in self.coming or digest in self.block_of for digest in hashes)
        return next((number for number, is_known in enumerate(known) if not is_known), len(hashes))

    def add(self, digest: bytes, block: int) -> None:
        """A block whose keys and values are computed; of two that hold the same, the first is found."""
        self.coming.discard(digest)
        if digest not in self.block_of:
            self.block_of[digest] = block
            self.hash_of[block] = digest

    def keep(self, block: int) -> bool:
        """Take a block that has lost its last user; False for one that would never be found."""
        if block not in self.hash_of:
            return False
        self.unused[block] = None
        return True

    def evict(self) -> int:
        """The block that was unused for longest, forgotten."""
        block, _ = self.unused.popitem(last=False)
        del self.block_of[self.hash_of.pop(block)]
        return block


def hash_blocks(sequence: Sequence, block_size: int, count: int) -> list[bytes]:
    """Of the sequence's first `count` blocks; what was hashed before is remembered."""
    hashes = sequence.block_hashes
    for number in range(len(hashes), count):
        before = hashes[-1] if hashes else hash_seen(sequence)
        hashes.append(hash_block(sequence, before, number * block_size, (number + 1) * block_size))
    return hashes[:count]


def hash_block(sequence: Sequence, before: bytes, start: int, stop: int) -> bytes:
    """Of the tokens [start, stop) behind the block with hash `before`."""
    first, last = sequence.image_range(start, stop)
    positions = sequence.request.prompt.image_positions[first:last]
    numbers = array("q", (*sequence.tokens(start, stop), last - first, *positions))
    parts = [before, numbers.tobytes()]
    for picture in sequence.pictures_of(first, last):  # its rows follow each other
        rows = array("q", (max(first, picture.first) - picture.first, min(last, picture.last) - picture.first))
        parts += [picture.digest, rows.tobytes()]
    return hashlib.blake2b(b"".join(parts), digest_size=DIGEST_BYTES).digest()


def hash_seen(sequence: Sequence) -> bytes:
    """Of the pictures that all of the sequence's tokens depend on."""
    memory = sequence.request.prompt.memory
    if memory is None:
        return NOTHING_BEFORE
    digests = b"".join(picture.digest for picture in sequence.pictures)
    return hashlib.blake2b(digests + repr(memory).encode(), digest_size=DIGEST_BYTES).digest()
