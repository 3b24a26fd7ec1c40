"""Self-attention cut by heads; the KV cache it is handed stores, looks up and attends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from mmdist.layers.linear import ColumnParallelLinear, RowParallelLinear
from mmdist.plan import Piece
from mmdist.tp import TP


class AttentionCache(Protocol):
    """What a layer needs of the KV cache for one step."""

    def store(
        self, layer: int, qkv: torch.Tensor, heads: Sequence[int], rope: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(tokens, q | k | v) with so many heads each -> q, k, v (tokens, heads, head_dim): q and k rotated, k and v
        stored and as they will be read. qkv may be overwritten."""
        ...

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, window: int | None
    ) -> torch.Tensor:
        """With what store() gave: q (tokens, heads, head_dim) -> the same shape."""
        ...


@dataclass
class Context:
    """What the layers see of a step besides their input.

    rope: cosines and sines of the (tokens,) positions. query_lens: tokens of each sequence, which lie end to end;
    memories: what each sequence's pictures left to look at, None without.
    """

    rope: tuple[torch.Tensor, torch.Tensor]
    cache: AttentionCache
    positions: torch.Tensor
    query_lens: Sequence[int]
    memories: Sequence[Any]


def kv_copies(num_kv_heads: int, tp: TP) -> int:
    """KV heads cannot be cut below one, so this many neighbouring ranks hold the same head."""
    copies = tp.size // num_kv_heads if tp.size % num_kv_heads == 0 else 1
    TP(size=tp.size // copies).divide(num_kv_heads, "num_key_value_heads")
    return copies


class Attention(nn.Module):
    """Grouped-query attention with rotary positions: (tokens, hidden) -> (tokens, hidden)."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        tp: TP,
        *,
        layer: int,
        bias: bool = False,
        window: int | None = None,
    ):
        super().__init__()
        self.layer, self.head_dim, self.window = layer, head_dim, window
        self.scale = head_dim**-0.5
        tp.divide(num_heads, "num_attention_heads")
        copies = kv_copies(num_kv_heads, tp)
        pieces = [
            Piece(num_heads * head_dim, "q_proj"),
            Piece(num_kv_heads * head_dim, "k_proj", copies),
            Piece(num_kv_heads * head_dim, "v_proj", copies),
        ]
        self.qkv_proj = ColumnParallelLinear(hidden_size, pieces, tp, bias=bias)
        self.heads = [size // head_dim for size in self.qkv_proj.local_sizes]  # of q, k and v on this rank
        self.num_kv_heads = self.heads[1]
        self.o_proj = RowParallelLinear(num_heads * head_dim, hidden_size, tp, bias=bias)

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        q, k, v = context.cache.store(self.layer, self.qkv_proj(x), self.heads, context.rope)
        out = context.cache.attend(self.layer, q, k, v, scale=self.scale, window=self.window)
        return self.o_proj(out.flatten(1))
