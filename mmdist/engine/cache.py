"""The paged KV cache of one rank, and the attention over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mmdist.config import EngineConfig, UserError
from mmdist.engine.batch import SHORT_PREFILL, Batch
from mmdist.kernels.kernels import Kernels
from mmdist.kernels.paged import DecodeTables, Prefill
from mmdist.kernels.pages import Slots, vector_bytes
from mmdist.models.base import MultimodalModel

DEFAULT_MAX_MODEL_LEN = 4096
DEFAULT_BLOCK_SIZE = 16


@dataclass(frozen=True)
class CacheShape:
    """One rank's cache: num_kv_heads are this rank's. spare_blocks come after num_blocks, for no sequence."""

    max_model_len: int
    num_layers: int
    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    kv_cache_dtype: str
    spare_blocks: int = 0

    def bytes(self, dtype: torch.dtype) -> int:
        blocks = self.num_blocks + self.spare_blocks
        vectors = 2 * self.num_layers * blocks * self.block_size * self.num_kv_heads
        return vectors * vector_bytes(self.kv_cache_dtype, self.head_dim, dtype)


def cache_shape(model: MultimodalModel, config: EngineConfig) -> CacheShape:
    """The cache that engine.* asks for; refused where one request could not fit."""
    limit = model.max_model_len
    max_model_len = config.max_model_len or min(limit, DEFAULT_MAX_MODEL_LEN)
    if max_model_len > limit:
        raise UserError(f"engine.max_model_len={max_model_len}: the model was made for at most {limit} tokens")
    block_size = config.block_size or DEFAULT_BLOCK_SIZE
    per_request = -(-max_model_len // block_size)
    num_blocks = config.num_blocks or config.max_num_seqs * per_request
    if num_blocks < per_request:
        raise UserError(
            f"engine.num_blocks={num_blocks} of {block_size} tokens cannot hold one request of "
            f"{max_model_len} tokens; it takes {per_request}, or lower engine.max_model_len"
        )
    return CacheShape(
        max_model_len=max_model_len,
        num_layers=model.num_cached_layers,
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        kv_cache_dtype=config.kv_cache_dtype,
        spare_blocks=-(-config.max_num_seqs // block_size) if config.decode_graph == "on" else 0,
    )


class PagedCache:
    """Keys and values of every layer in blocks; slot = block * block_size + place in the block."""

    def __init__(self, shape: CacheShape, dtype: torch.dtype, kernels: Kernels):
        self.block_size, self.dtype, self.device = shape.block_size, dtype, kernels.device
        self.spare_block = shape.num_blocks  # the first
        blocks = shape.num_blocks + shape.spare_blocks
        size = (shape.num_layers, blocks, shape.num_kv_heads, shape.block_size, shape.head_dim)
        self.k, self.v = (kernels.pages(shape.kv_cache_dtype, size, dtype) for _ in range(2))
        self.attention = kernels.paged_attention(self.k, self.v)

    def slots(self, block_table: list[int], first: int, last: int) -> list[int]:
        """Of a sequence's tokens [first, last)."""
        size = self.block_size
        return [block_table[token // size] * size + token % size for token in range(first, last)]

    def slots_tensor(self, slots: list[int]) -> Slots:
        return Slots(torch.tensor(slots, device=self.device), self.block_size)


class StepCache:
    """What the layers see of the cache during one step (mmdist.layers.attention.AttentionCache)."""

    def __init__(self, cache: PagedCache, batch: Batch):
        self.cache = cache
        num_short = sum(query_len <= SHORT_PREFILL for query_len in batch.query_lens)
        assert all(query_len <= SHORT_PREFILL for query_len in batch.query_lens[:num_short]), "few tokens come first"
        self.num_rows = sum(batch.query_lens[:num_short])
        parts = list(zip(batch.block_tables, batch.query_lens, batch.context_lens, strict=True))
        new = [slot for table, query, context in parts for slot in cache.slots(table, context - query, context)]
        self.new_slots = cache.slots_tensor(new)
        self.tables = self.decode_tables(parts[:num_short]) if num_short else None
        self.prefills = [Prefill(*part, cache.block_size, cache.device) for part in parts[num_short:]]

    def decode_tables(self, parts: list[tuple[list[int], int, int]]) -> DecodeTables:
        """(block table, new tokens, tokens) of each sequence -> a row for each new token, with what it looks at."""
        tables = [table for table, query, _ in parts for _ in range(query)]
        lens = [context - query + 1 + i for _, query, context in parts for i in range(query)]
        return DecodeTables(tables, lens, self.cache.block_size, self.cache.device)

    def store(
        self, layer: int, qkv: torch.Tensor, heads: Sequence[int], rope: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.cache.attention.store(layer, qkv, heads, rope, self.new_slots)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, window: int | None
    ) -> torch.Tensor:
        out, row = [], self.num_rows
        if self.tables is not None:
            out.append(self.cache.attention.decode(layer, q[:row], self.tables, scale=scale, window=window))
        for part in self.prefills:
            new_q, new_k, new_v = (x[row : row + part.query_len] for x in (q, k, v))
            out.append(self.cache.attention.prefill(layer, new_q, new_k, new_v, part, scale=scale, window=window))
            row += part.query_len
        return out[0] if len(out) == 1 else torch.cat(out)
