"""The hot operations behind one interface. In plain torch they run everywhere and are the reference for the others."""

from __future__ import annotations

import torch

from mmdist.kernels import packed, plain
from mmdist.kernels.linear import Linear, PackedLinear, quantized_linear
from mmdist.kernels.paged import PagedAttention
from mmdist.kernels.pages import PAGES, Int8Pages, Pages, Size
from mmdist.quant import Quantized
from mmdist.tp import TP


class Kernels:
    """Those of plain torch; a device family's own override what they do better."""

    level = "plain"

    def __init__(self, device: torch.device):
        self.device = device

    def linear(self, weight: torch.Tensor) -> Linear | None:
        """A weight (out, in) made ready, which then holds its own copy; None where it is best as it is."""
        return PackedLinear(weight) if packed.can_pack(weight) else None

    def linear_over_blocks(self, blocks: torch.Tensor) -> Linear | None:
        """A bfloat16 weight (out, in) that lies in a file in blocks (mmdist.blocks), used there until settle(); None
        where these kernels read another order."""
        return None

    def settle(self) -> None:
        """Begin to move what is used in files to memory that is faster; the numbers stay the same."""

    def quantized_linear(self, weight: Quantized) -> Linear:
        return quantized_linear(weight)

    def linear_all_reduce(self, x: torch.Tensor, weight: torch.Tensor, tp: TP) -> torch.Tensor | None:
        """x W^T summed over the ranks, by one operation; None where there is none, or none that pays."""
        return None

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float,
        causal: bool = False,
        window: int | None = None,
    ) -> torch.Tensor:
        """q (batch, queries, heads, head_dim) over k, v (batch, context, kv_heads, head_dim) -> q's shape.

        Causal queries are the last of the context; window: how many keys each of them sees at most.
        """
        if not causal:
            return plain.full_attention(q, k, v, scale=scale)
        parts = zip(q, k, v, strict=True)
        return torch.stack([plain.prefill_attention(*part, scale=scale, window=window) for part in parts])

    def masked_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, *, scale: float
    ) -> torch.Tensor:
        """q (queries, heads, head_dim) over k, v (context, kv_heads, head_dim) -> q's shape. mask: which keys a query
        sees, (queries, context) bool."""
        return plain.masked_attention(q, k, v, None if mask.all() else mask, scale=scale)

    def quick_gelu(self, x: torch.Tensor) -> torch.Tensor:
        """x * sigmoid(1.702 x), CLIP's approximation of GELU."""
        return plain.quick_gelu(x)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """(..., hidden) -> (..., hidden)"""
        return plain.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x + y, and that normed; all (..., hidden)."""
        x = x + y
        return x, plain.rms_norm(x, weight, eps)

    def gated(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        """(..., gate | up) -> activation(gate) * up, half as wide."""
        gate, up = gate_up.chunk(2, dim=-1)
        return plain.find_activation(activation)(gate) * up

    def pages(self, kv_cache_dtype: str, size: Size, dtype: torch.dtype) -> Pages | Int8Pages:
        """Room for the keys, or the values, of a cache."""
        return PAGES[kv_cache_dtype](size, dtype, self.device)

    def paged_attention(self, k: Pages | Int8Pages, v: Pages | Int8Pages) -> PagedAttention:
        return PagedAttention(k, v, self.attention)

    def top_k(self, logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, vocab) -> the k largest in float32 and their places, each (rows, k), by falling logit and, among
        equals, rising place; k <= vocab."""
        return plain.top_k(logits, k)


PLAIN = Kernels(torch.device("cpu"))  # what layers have until they are loaded
