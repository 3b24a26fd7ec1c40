"""Attention over the paged cache by pointwise.c and attention.c: nothing is gathered, contexts may be long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import Structure, addressof, c_float, c_int, c_int64, c_long, c_void_p

import torch

from mmdist.kernels.paged import QKV, DecodeTables, PagedAttention
from mmdist.kernels.pages import Int8Pages, Pages, Slots
from mmdist.native.build import Native


class PagesStruct(Structure):
    """Pages of mmdist/native/pages.h"""

    _fields_ = [
        *((name, c_void_p) for name in ("k", "v", "k_scales", "v_scales")),
        *((name, c_int64) for name in ("blocks", "kv_heads", "block_size", "head_dim")),
    ]


class NativePagedAttention(PagedAttention):
    """Of a model in bfloat16; the cosines, sines and qkv come in it too."""

    def __init__(
        self, native: Native, k: Pages | Int8Pages, v: Pages | Int8Pages, attention: Callable[..., torch.Tensor]
    ):
        super().__init__(k, v, attention)
        scales = [pages.scales.data_ptr() if isinstance(pages, Int8Pages) else None for pages in (k, v)]
        self.struct = PagesStruct(k.values.data_ptr(), v.values.data_ptr(), *scales, *k.values.shape[1:])
        self.pages, self.head_dim = addressof(self.struct), k.values.shape[-1]
        pointer, number = c_void_p, c_long
        self._store = native.declare(
            "mmdist_rotate_store", None, pointer, number, pointer, number, number, pointer, pointer, pointer
        )
        self._decode = native.declare(
            "mmdist_decode_attention",
            c_int,
            *(pointer, number, pointer, number, pointer, number, number, pointer, number, pointer, number, c_float),
        )

    def store(
        self, layer: int, qkv: torch.Tensor, heads: Sequence[int], rope: tuple[torch.Tensor, torch.Tensor], slots: Slots
    ) -> QKV:
        qkv, (cos, sin), tokens = qkv.contiguous(), rope, qkv.shape[0]
        self._store(
            self.pages, layer, qkv.data_ptr(), tokens, heads[0], cos.data_ptr(), sin.data_ptr(),
            slots.numbers.data_ptr(),
        )  # fmt: skip
        q, k, v = torch.split_with_sizes(qkv.view(tokens, -1, self.head_dim), heads, 1)
        return q, k, v

    def decode(
        self, layer: int, q: torch.Tensor, tables: DecodeTables, *, scale: float, window: int | None
    ) -> torch.Tensor:
        """q: its heads side by side, its rows any distance apart."""
        out = q.new_empty(q.shape)
        failed = self._decode(
            self.pages, layer, q.data_ptr(), q.stride(0), out.data_ptr(), *out.shape[:2], *tables.addresses,
            window or 0, scale,
        )  # fmt: skip
        if failed:
            raise MemoryError(f"attention over {tables.longest} tokens")
        return out
