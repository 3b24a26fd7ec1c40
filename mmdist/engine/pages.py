"""Where the KV cache keeps its vectors: as they are, or as int8 with a scale for each token and head."""

from __future__ import annotations

import torch

MAX_INT8 = 127
SCALE_DTYPE = torch.float32


class Pages:
    """Vectors (layers, slots, kv_heads, head_dim) in the dtype of the model."""

    def __init__(self, size: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        self.values = torch.empty(size, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def write(self, layer: int, slots: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """Store (tokens, kv_heads, head_dim); returns them as they will be read."""
        self.values[layer].index_copy_(0, slots, vectors)
        return vectors

    def read(self, layer: int, slots: torch.Tensor | slice) -> torch.Tensor:
        """(slots, kv_heads, head_dim); a run of slots comes without a copy."""
        return take(self.values[layer], slots)


class Int8Pages:
    """Half the memory of 16 bits. What was just written is read as it is stored, so that an answer does not depend on
    where a prompt was cut into chunks."""

    def __init__(self, size: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        self.dtype = dtype
        self.values = torch.empty(size, dtype=torch.int8, device=device)
        self.scales = torch.empty(*size[:3], 1, dtype=SCALE_DTYPE, device=device)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def write(self, layer: int, slots: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        wide = vectors.to(SCALE_DTYPE)
        scale = (wide.abs().amax(-1, keepdim=True) / MAX_INT8).clamp(min=torch.finfo(SCALE_DTYPE).tiny)
        values = (wide / scale).round_().to(torch.int8)
        self.values[layer].index_copy_(0, slots, values)
        self.scales[layer].index_copy_(0, slots, scale)
        return (values * scale).to(self.dtype)

    def read(self, layer: int, slots: torch.Tensor | slice) -> torch.Tensor:
        return (take(self.values[layer], slots) * take(self.scales[layer], slots)).to(self.dtype)


def take(stored: torch.Tensor, slots: torch.Tensor | slice) -> torch.Tensor:
    return stored[slots] if isinstance(slots, slice) else stored.index_select(0, slots)


PAGES: dict[str, type[Pages] | type[Int8Pages]] = {"auto": Pages, "int8": Int8Pages}


def vector_bytes(kv_cache_dtype: str, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of the key (or value) of one token and head."""
    return head_dim * dtype.itemsize if kv_cache_dtype == "auto" else head_dim + SCALE_DTYPE.itemsize
