"""The hot operations in plain torch: always there, and the reference for any faster kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from mmdist.config import UserError

# By transformers' names (transformers.activations.ACT2FN).
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def find_activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    if name not in ACTIVATIONS:
        raise UserError(f"activation {name} in config.json: expected {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """(..., hidden) -> (..., hidden); the mean square is taken in float32."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def top_k(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See Kernels.top_k; torch.topk alone leaves it open which of equal logits it takes, and their order."""
    if k == 1:
        ids = logits.argmax(-1, keepdim=True)
        return logits.gather(-1, ids).float(), ids
    kths = logits.topk(k).values[:, -1]
    ids = torch.stack([largest_places(row, kth, k) for row, kth in zip(logits, kths, strict=True)])
    return logits.gather(-1, ids).float(), ids


def largest_places(row: torch.Tensor, kth: torch.Tensor, k: int) -> torch.Tensor:
    """(k,); kth: the k-th largest number."""
    among = (~(row < kth)).nonzero()[:, 0]  # in order of place; NaN is the largest
    return among[row[among].sort(descending=True, stable=True).indices[:k]]


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate (tokens, heads, head_dim) by (tokens, 1, head_dim); dimension i pairs with i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def split_rotate(
    qkv: torch.Tensor, heads: Sequence[int], rope: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens, q | k | v) with so many heads each -> rotated q and k, and v: (tokens, heads, head_dim) each."""
    q, k, v = qkv.unflatten(-1, (sum(heads), -1)).split(list(heads), dim=1)
    return apply_rope(q, *rope), apply_rope(k, *rope), v


def causal_mask(query_len: int, context_len: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(query, context) bool: the last `query_len` positions see themselves and what came before, within `window`."""
    query = torch.arange(context_len - query_len, context_len, device=device)[:, None]
    context = torch.arange(context_len, device=device)
    seen = context <= query
    return seen if window is None else seen & (context > query - window)


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def full_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float) -> torch.Tensor:
    """q (batch, queries, heads, head_dim) over all of k, v (batch, context, kv_heads, head_dim) -> q's shape."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped).transpose(1, 2)


def prefill_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, window: int | None
) -> torch.Tensor:
    """One sequence: q (query, heads, head_dim) over k, v (context, kv_heads, head_dim) -> q's shape.

    The queries are the last positions of the context.
    """
    query_len, context_len = q.shape[0], k.shape[0]
    if q.device.type == "cpu" and q.shape[1] != k.shape[1]:
        return grouped_prefill_attention(q, k, v, scale=scale, window=window)
    whole = query_len == context_len and (window is None or context_len <= window)
    mask = None if whole else causal_mask(query_len, context_len, window, q.device)
    grouped = q.shape[1] != k.shape[1]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=whole, scale=scale, enable_gqa=grouped)
    return out[0].transpose(0, 1)


def grouped_prefill_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, window: int | None, rows: int = 64
) -> torch.Tensor:
    """prefill_attention for CPUs where query heads share KV heads: `rows` queries at a time, the heads of a group
    stacked in one product. torch's own kernel repeats the KV heads and takes twice as long in bfloat16."""
    query_len, heads, head_dim = q.shape
    context_len, kv_heads, _ = k.shape
    before = context_len - query_len
    q = (q * scale).view(query_len, kv_heads, -1, head_dim)
    keys, values = k.permute(1, 2, 0), v.transpose(0, 1)
    out = torch.empty_like(q)
    for first in range(0, query_len, rows):
        last = min(first + rows, query_len)
        start = 0 if window is None else max(0, before + first + 1 - window)
        seen = slice(start, before + last)
        stacked = q[first:last].permute(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
        scores = torch.bmm(stacked, keys[:, :, seen]).view(kv_heads, -1, last - first, seen.stop - seen.start)
        hide(scores, window)
        mixed = torch.bmm(scores.softmax(-1).flatten(1, 2), values[:, seen])
        out[first:last] = mixed.view(kv_heads, -1, last - first, head_dim).permute(2, 0, 1, 3)
    return out.view(query_len, heads, head_dim)


def hide(scores: torch.Tensor, window: int | None) -> None:
    """Rule out, in place, what the last queries of (..., query, context) scores may not see."""
    query_len, context_len = scores.shape[-2:]
    if window is None:  # all before the queries themselves is seen by each of them
        scores = scores[..., context_len - query_len :]
        context_len = query_len
    scores.masked_fill_(~causal_mask(query_len, context_len, window, scores.device), -torch.inf)


def decode_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, *, scale: float
) -> torch.Tensor:
    """One query a sequence: q (batch, heads, head_dim), k, v (batch, context, kv_heads, head_dim) -> q's shape.

    mask: (batch, 1, 1, context) bool where contexts differ in length. Query heads that share a KV head go in as
    rows of one product, so KV heads are never repeated.
    """
    batch, heads, head_dim = q.shape
    grouped = q.view(batch, k.shape[2], -1, head_dim)
    out = F.scaled_dot_product_attention(grouped, k.transpose(1, 2), v.transpose(1, 2), mask, scale=scale)
    return out.reshape(batch, heads, head_dim)


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, *, scale: float
) -> torch.Tensor:
    """q (query, heads, head_dim) over k, v (context, kv_heads, head_dim) -> q's shape.

    mask: (query, context) bool, None where all is seen. Query heads that share a KV head go in as rows of one product.
    """
    query, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    stacked = q.view(query, kv_heads, -1, head_dim).permute(1, 2, 0, 3).reshape(1, kv_heads, -1, head_dim)
    if mask is not None:
        mask = mask.repeat(heads // kv_heads, 1)
    out = F.scaled_dot_product_attention(stacked, k.transpose(0, 1)[None], v.transpose(0, 1)[None], mask, scale=scale)
    return out.view(kv_heads, -1, query, head_dim).permute(2, 0, 1, 3).reshape(query, heads, head_dim)
