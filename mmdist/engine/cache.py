"""The paged KV cache of one rank, and the attention over it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from mmdist.config import EngineConfig, UserError
from mmdist.engine.batch import Batch
from mmdist.engine.pages import PAGES, Int8Pages, Pages, vector_bytes
from mmdist.kernels import plain
from mmdist.models.base import MultimodalModel

DEFAULT_MAX_MODEL_LEN = 4096


@dataclass(frozen=True)
class CacheShape:
    """One rank's cache: num_kv_heads are this rank's."""

    max_model_len: int
    num_layers: int
    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    kv_cache_dtype: str

    def bytes(self, dtype: torch.dtype) -> int:
        vectors = 2 * self.num_layers * self.num_blocks * self.block_size * self.num_kv_heads
        return vectors * vector_bytes(self.kv_cache_dtype, self.head_dim, dtype)


def cache_shape(model: MultimodalModel, config: EngineConfig) -> CacheShape:
    """The cache that engine.* asks for; refused where one request could not fit."""
    limit = model.max_model_len
    max_model_len = config.max_model_len or min(limit, DEFAULT_MAX_MODEL_LEN)
    if max_model_len > limit:
        raise UserError(f"engine.max_model_len={max_model_len}: the model was made for at most {limit} tokens")
    per_request = -(-max_model_len // config.block_size)
    num_blocks = config.num_blocks or config.max_num_seqs * per_request
    if num_blocks < per_request:
        raise UserError(
            f"engine.num_blocks={num_blocks} of {config.block_size} tokens cannot hold one request of "
            f"{max_model_len} tokens; it takes {per_request}, or lower engine.max_model_len"
        )
    return CacheShape(
        max_model_len=max_model_len,
        num_layers=model.num_cached_layers,
        num_blocks=num_blocks,
        block_size=config.block_size,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        kv_cache_dtype=config.kv_cache_dtype,
    )


class PagedCache:
    """Keys and values of every layer in slots; slot = block * block_size + place in the block."""

    def __init__(self, shape: CacheShape, dtype: torch.dtype, device: torch.device):
        self.block_size, self.dtype, self.device = shape.block_size, dtype, device
        size = (shape.num_layers, shape.num_blocks * shape.block_size, shape.num_kv_heads, shape.head_dim)
        pages = PAGES[shape.kv_cache_dtype]
        self.k, self.v = pages(size, dtype, device), pages(size, dtype, device)

    def slots(self, block_table: list[int], num_tokens: int) -> torch.Tensor:
        """(num_tokens,) slots of a sequence's tokens."""
        blocks = torch.tensor(block_table, dtype=torch.long)[:, None] * self.block_size
        return (blocks + torch.arange(self.block_size)).flatten()[:num_tokens]


class StepCache:
    """What the layers see of the cache during one step (mmdist.layers.attention.AttentionCache)."""

    def __init__(self, cache: PagedCache, batch: Batch):
        self.cache = cache
        device = cache.device
        tables = zip(batch.block_tables, batch.context_lens, strict=True)
        slots = [cache.slots(table, context_len) for table, context_len in tables]
        new = [s[len(s) - query_len :] for s, query_len in zip(slots, batch.query_lens, strict=True)]
        self.new_slots = torch.cat(new).to(device)
        self.num_decodes = sum(query_len == 1 for query_len in batch.query_lens)
        assert all(query_len == 1 for query_len in batch.query_lens[: self.num_decodes]), "single tokens come first"
        self.query_lens = batch.query_lens[self.num_decodes :]
        self.prefill_slots = [s.to(device) for s in slots[self.num_decodes :]]
        self.context_lens = torch.tensor(batch.context_lens[: self.num_decodes])
        self.decode_slots = pad(slots[: self.num_decodes]).to(device)
        self.run = contiguous_run(slots[0]) if self.num_decodes == 1 else None
        self.masks: dict[int | None, torch.Tensor | None] = {}

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, window: int | None
    ) -> torch.Tensor:
        """Store k, v (tokens, kv_heads, head_dim), then attend with q (tokens, heads, head_dim) -> q's shape."""
        k, v = self.cache.k.write(layer, self.new_slots, k), self.cache.v.write(layer, self.new_slots, v)
        out, row = [], self.num_decodes
        if self.num_decodes:
            keys, values = self.gather(self.cache.k, layer), self.gather(self.cache.v, layer)
            out.append(plain.decode_attention(q[:row], keys, values, self.mask(window), scale=scale))
        for query_len, slots in zip(self.query_lens, self.prefill_slots, strict=True):
            rows = slice(row, row + query_len)
            fresh = query_len == len(slots)  # the whole context is in this step: no need to read it back
            keys = k[rows] if fresh else self.cache.k.read(layer, slots)
            values = v[rows] if fresh else self.cache.v.read(layer, slots)
            out.append(plain.prefill_attention(q[rows], keys, values, scale=scale, window=window))
            row += query_len
        return out[0] if len(out) == 1 else torch.cat(out)

    def gather(self, pages: Pages | Int8Pages, layer: int) -> torch.Tensor:
        """-> (decodes, longest context, kv_heads, head_dim)."""
        if self.run is not None:
            return pages.read(layer, slice(*self.run))[None]
        return pages.read(layer, self.decode_slots.flatten()).unflatten(0, self.decode_slots.shape)

    def mask(self, window: int | None) -> torch.Tensor | None:
        """(decodes, 1, 1, longest context) bool, or None where every sequence sees all of it."""
        if window not in self.masks:
            lens = self.context_lens[:, None]
            places = torch.arange(int(lens.max()))
            seen = places < lens if window is None else (places < lens) & (places >= lens - window)
            self.masks[window] = None if seen.all() else seen[:, None, None].to(self.cache.device)
        return self.masks[window]


def pad(slots: list[torch.Tensor]) -> torch.Tensor:
    """Rows of one length; what is added points to slot 0 and is masked out."""
    return pad_sequence(slots, batch_first=True) if slots else torch.empty(0, 0, dtype=torch.long)


def contiguous_run(slots: torch.Tensor) -> tuple[int, int] | None:
    """[first, last) when the slots follow one another, so that the cache can be read in place."""
    first, last = int(slots[0]), int(slots[-1]) + 1
    return (first, last) if bool((slots == torch.arange(first, first + len(slots))).all()) else None
