"""Where the KV cache keeps its vectors: as they are, or as int8 with a scale for each token and head.

In blocks of tokens, within a block head by head, so that who attends with one head reads a stream of memory.
"""

from __future__ import annotations

from functools import cached_property

import torch

MAX_INT8 = 127
SCALE_DTYPE = torch.float32
Size = tuple[int, int, int, int, int]  # layers, blocks, kv_heads, block_size, head_dim


class Slots:
    """Places of tokens: slot = block * block_size + place in the block, any shape."""

    def __init__(self, numbers: torch.Tensor, block_size: int):
        self.numbers, self.block_size = numbers, block_size

    @cached_property
    def int32(self) -> torch.Tensor:
        return self.numbers.to(torch.int32)

    @cached_property
    def index(self) -> tuple[torch.Tensor, slice, torch.Tensor]:
        """What picks (*shape, kv_heads, ...) out of a layer."""
        return self.numbers // self.block_size, slice(None), self.numbers % self.block_size


class Pages:
    """Vectors (layers, blocks, kv_heads, block_size, head_dim) in the dtype of the model."""

    def __init__(self, size: Size, dtype: torch.dtype, device: torch.device):
        self.values = torch.empty(size, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def write(self, layer: int, slots: Slots, vectors: torch.Tensor) -> torch.Tensor:
        """Store (tokens, kv_heads, head_dim); returns them as they will be read."""
        self.values[layer][slots.index] = vectors
        return vectors

    def read(self, layer: int, slots: Slots) -> torch.Tensor:
        """(*slots, kv_heads, head_dim)"""
        return self.values[layer][slots.index]


class Int8Pages:
    """Half the memory of 16 bits. What was just written is read as it is stored, so that an answer does not depend on
    where a prompt was cut into chunks."""

    def __init__(self, size: Size, dtype: torch.dtype, device: torch.device):
        self.dtype = dtype
        self.values = torch.empty(size, dtype=torch.int8, device=device)
        self.scales = torch.empty(*size[:-1], 1, dtype=SCALE_DTYPE, device=device)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def write(self, layer: int, slots: Slots, vectors: torch.Tensor) -> torch.Tensor:
        wide = vectors.to(SCALE_DTYPE)
        scale = (wide.abs().amax(-1, keepdim=True) / MAX_INT8).clamp(min=torch.finfo(SCALE_DTYPE).tiny)
        values = (wide / scale).round_().to(torch.int8)
        self.values[layer][slots.index] = values
        self.scales[layer][slots.index] = scale
        return (values * scale).to(self.dtype)

    def read(self, layer: int, slots: Slots) -> torch.Tensor:
        return (self.values[layer][slots.index] * self.scales[layer][slots.index]).to(self.dtype)


PAGES: dict[str, type[Pages] | type[Int8Pages]] = {"auto": Pages, "int8": Int8Pages}


def vector_bytes(kv_cache_dtype: str, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of the key (or value) of one token and head."""
    return head_dim * dtype.itemsize if kv_cache_dtype == "auto" else head_dim + SCALE_DTYPE.itemsize
