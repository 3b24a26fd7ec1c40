"""Rotary positions, storing and attention over one rank's paged keys and values, in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch

from mmdist.kernels import plain
from mmdist.kernels.pages import Int8Pages, Pages, Slots

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class DecodeTables:
    """Where the contexts of the sequences with one new token are: (sequences, blocks) block tables, filled up with
    zeros, and (sequences,) context lengths."""

    def __init__(
        self, block_tables: Sequence[list[int]], context_lens: Sequence[int], block_size: int, device: torch.device
    ):
        width = max(map(len, block_tables))
        filled = [table + [0] * (width - len(table)) for table in block_tables]
        self.block_tables = torch.tensor(filled, dtype=torch.int32, device=device)
        self.context_lens = torch.tensor(context_lens, dtype=torch.int32, device=device)
        self.lens, self.block_size, self.longest = list(context_lens), block_size, max(context_lens)
        self.masks: dict[int | None, torch.Tensor | None] = {}

    @cached_property
    def addresses(self) -> tuple[int, int, int]:
        """Of the tables, their width, and of the lengths."""
        return self.block_tables.data_ptr(), self.block_tables.shape[1], self.context_lens.data_ptr()

    @cached_property
    def places(self) -> torch.Tensor:
        return torch.arange(self.longest, device=self.block_tables.device)

    @cached_property
    def slots(self) -> Slots:
        """(sequences, longest context); beyond a sequence's own, which is masked out, its last: memory never written
        may hold a NaN, and no weight makes that 0."""
        tokens = self.places.minimum(self.context_lens[:, None].long() - 1)
        blocks = self.block_tables.long().gather(1, tokens // self.block_size)
        return Slots(blocks * self.block_size + tokens % self.block_size, self.block_size)

    def mask(self, window: int | None) -> torch.Tensor | None:
        """(sequences, 1, 1, longest context) bool, or None where every sequence sees all of it."""
        if window not in self.masks:
            seen = self.seen(window)
            self.masks[window] = None if seen.all() else seen[:, None, None]
        return self.masks[window]

    def seen(self, window: int | None) -> torch.Tensor:
        """(sequences, longest context) bool"""
        lens = self.context_lens[:, None]
        seen = self.places < lens
        return seen if window is None else seen & (self.places >= lens - window)


class FixedTables(DecodeTables):
    """Those of a captured graph: the tensors are given, what is in them changes, and nothing waits for the device."""

    def __init__(
        self, block_tables: torch.Tensor, context_lens: torch.Tensor, lens: list[int], longest: int, block_size: int
    ):
        """lens: of this time, as the host knows them; longest: of all times."""
        self.block_tables, self.context_lens, self.lens = block_tables, context_lens, lens
        self.longest, self.block_size = longest, block_size
        self.masks = {}

    def mask(self, window: int | None) -> torch.Tensor:
        if window not in self.masks:
            self.masks[window] = self.seen(window)[:, None, None]
        mask = self.masks[window]
        assert mask is not None
        return mask


class Prefill:
    """Several new tokens of one sequence: query_len of them, the last of its context_len, which `block_table` holds."""

    def __init__(self, block_table: list[int], query_len: int, context_len: int, block_size: int, device: torch.device):
        self.query_len, self.context_len = query_len, context_len
        self.block_table, self.block_size, self.device = block_table, block_size, device

    @property
    def is_whole(self) -> bool:
        """True where the whole context is new: nothing has to be read back."""
        return self.query_len == self.context_len

    @cached_property
    def slots(self) -> Slots:
        """Of the whole context."""
        tokens = torch.arange(self.context_len)
        blocks = torch.tensor(self.block_table)[tokens // self.block_size]
        return Slots((blocks * self.block_size + tokens % self.block_size).to(self.device), self.block_size)

    @cached_property
    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, blocks) block table and (1,) context length, int32."""
        values = ([self.block_table], [self.context_len])
        table, length = (torch.tensor(value, dtype=torch.int32, device=self.device) for value in values)
        return table, length


class PagedAttention:
    def __init__(self, k: Pages | Int8Pages, v: Pages | Int8Pages, attention: Callable[..., torch.Tensor]):
        """attention: Kernels.attention."""
        self.k, self.v, self.attention = k, v, attention

    def store(
        self, layer: int, qkv: torch.Tensor, heads: Sequence[int], rope: tuple[torch.Tensor, torch.Tensor], slots: Slots
    ) -> QKV:
        """(tokens, q | k | v) with so many heads each -> q, k, v (tokens, heads, head_dim): q and k rotated, k and v
        stored and as they will be read. qkv may be overwritten."""
        q, k, v = plain.split_rotate(qkv, heads, rope)
        return q, self.k.write(layer, slots, k), self.v.write(layer, slots, v)

    def prefill(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        part: Prefill,
        *,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Of the new tokens, as store() gave them: q (tokens, heads, head_dim) -> its shape."""
        if not part.is_whole:
            k, v = self.k.read(layer, part.slots), self.v.read(layer, part.slots)
        return self.attention(q[None], k[None], v[None], scale=scale, causal=True, window=window)[0]

    def decode(
        self, layer: int, q: torch.Tensor, tables: DecodeTables, *, scale: float, window: int | None
    ) -> torch.Tensor:
        """q (sequences, heads, head_dim), one token each -> the same shape."""
        keys, values = self.k.read(layer, tables.slots), self.v.read(layer, tables.slots)
        return plain.decode_attention(q, keys, values, tables.mask(window), scale=scale)
