"""What the caches of both Ascend chips share: rotating, and what is done where no operation does it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmdist.kernels import plain
from mmdist.kernels.npu import ROPE_DIMS, matmul_attention
from mmdist.kernels.paged import QKV, DecodeTables, PagedAttention
from mmdist.kernels.pages import Pages, Slots


class NpuPages(Pages):
    """Vectors in a tensor a layer, as the chip's operations want them."""

    def __init__(self, layers: list[torch.Tensor]):
        self.layers = layers

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def write(self, layer: int, slots: Slots, vectors: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("keys and values are written together")


class MatmulPagedAttention(PagedAttention):
    def decode(
        self, layer: int, q: torch.Tensor, tables: DecodeTables, *, scale: float, window: int | None
    ) -> torch.Tensor:
        """Over keys and values that are gathered."""
        keys, values = (pages.read(layer, tables.slots) for pages in (self.k, self.v))
        mask = tables.mask(window)
        return matmul_attention(q[:, None], keys, values, None if mask is None else mask[:, :, None], scale=scale)[:, 0]


class NpuPagedAttention(MatmulPagedAttention):
    def __init__(self, k: Pages, v: Pages):
        assert isinstance(k, NpuPages) and isinstance(v, NpuPages), "of the same kernels"
        self.k: NpuPages = k
        self.v: NpuPages = v

    def store(
        self, layer: int, qkv: torch.Tensor, heads: Sequence[int], rope: tuple[torch.Tensor, torch.Tensor], slots: Slots
    ) -> QKV:
        q, k, v = rotate(qkv, heads, rope)
        self.write(layer, k, v, slots)
        return q, k, v

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: Slots) -> None:
        """(tokens, kv_heads, head_dim) each."""
        raise NotImplementedError


def rotate(qkv: torch.Tensor, heads: Sequence[int], rope: tuple[torch.Tensor, torch.Tensor]) -> QKV:
    """plain.split_rotate, with each part end to end in memory."""
    if qkv.shape[-1] // sum(heads) not in ROPE_DIMS:
        q, k, v = plain.split_rotate(qkv, heads, rope)
    else:
        q, k, v = qkv.unflatten(-1, (sum(heads), -1)).split(list(heads), dim=1)
        cos, sin = (x[None] for x in rope)  # (1, tokens, 1, head_dim)
        q, k = torch.ops.npu.npu_apply_rotary_pos_emb(
            query=q[None].contiguous(), key=k[None].contiguous(), cos=cos, sin=sin, layout="BSND", rotary_mode="half"
        )
        q, k = q[0], k[0]
    return q.contiguous(), k.contiguous(), v.contiguous()


def sees_all(tables: DecodeTables, window: int | None) -> bool:
    return window is None or tables.longest <= window
