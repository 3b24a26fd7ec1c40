"""310P (300I DUO): float16, weights in FRACTAL_NZ, attention by NNAL's operations over a cache in the same tiles."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mmdist.config import UserError
from mmdist.kernels import plain
from mmdist.kernels.linear import Linear
from mmdist.kernels.npu import NpuKernels, matmul_attention, padded_heads
from mmdist.kernels.npu_paged import NpuPagedAttention, NpuPages, sees_all
from mmdist.kernels.paged import DecodeTables, Prefill
from mmdist.kernels.pages import Int8Pages, Pages, Size, Slots

FRACTAL_NZ = 29  # aclFormat; tiles of 16 x 16
TILE = 16
MAX_BLOCK_NUMBERS = 128 * 128  # block_size * head_dim (vllm-ascend, _ATTENTION_BLOCK_SIZE_LIMIT)
MAX_BATCH = 128  # of npu_prompt_flash_attention
PAIRED_QUERIES = 16  # from so many on, repeating KV heads for a fused operation pays


class Kernels310P(NpuKernels):
    chip = "310p"
    quant_bits = (8,)
    quant_groups = False

    def linear(self, weight: torch.Tensor) -> Linear | None:
        if weight.dtype != torch.float16 or weight.shape[0] % TILE or weight.shape[1] % TILE:
            return None
        return FractalLinear(weight)

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
        mask = plain.causal_mask(q.shape[1], k.shape[1], window, q.device) if causal else None
        parts = zip(*(x.split(MAX_BATCH) for x in (q, k, v)), strict=True)
        return torch.cat([prompt_attention(*part, mask=mask, scale=scale) for part in parts])

    def masked_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, *, scale: float
    ) -> torch.Tensor:
        return prompt_attention(q[None], k[None], v[None], mask=mask, scale=scale)[0]

    def empty_pages(self, size: Size, dtype: torch.dtype) -> Pages:
        layers, blocks, kv_heads, block_size, head_dim = size
        if block_size * head_dim > MAX_BLOCK_NUMBERS:
            raise UserError(
                f"engine.block_size={block_size}: at most {MAX_BLOCK_NUMBERS // head_dim} of this model's heads"
            )
        shape = (blocks, kv_heads * head_dim // TILE, block_size, TILE)
        parts = [fractal(torch.zeros(shape, dtype=dtype, device=self.device)) for _ in range(layers)]
        return FractalPages(parts, head_dim)

    def paged_attention(self, k: Pages | Int8Pages, v: Pages | Int8Pages) -> NpuPagedAttention:
        assert isinstance(k, Pages) and isinstance(v, Pages)
        return PagedAttention310P(k, v)


class FractalLinear:
    def __init__(self, weight: torch.Tensor):
        self.weight = fractal(weight.detach())

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, self.weight, bias)


def fractal(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.npu.npu_format_cast(input=x, acl_format=FRACTAL_NZ)


def prompt_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """q (batch, queries, heads, head_dim) over k, v (batch, context, kv_heads, head_dim) -> q's shape; mask: (queries,
    context) bool, what is seen. The operation knows no shared KV heads: they are repeated; few queries do without."""
    heads, head_dim, groups = q.shape[2], q.shape[3], q.shape[2] // k.shape[2]
    if groups > 1 and q.shape[1] < PAIRED_QUERIES:
        return matmul_attention(q, k, v, mask, scale=scale)
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    q, k, v = (x.flatten(2).contiguous() for x in padded_heads(q, k, v))
    out = torch.ops.npu.npu_prompt_flash_attention(
        query=q,
        key=k,
        value=v,
        atten_mask=None if mask is None else (~mask).contiguous(),
        num_heads=heads,
        scale_value=scale,
        next_tokens=2147483647,  # the default, 0, would cut what the mask does not
        input_layout="BSH",
    )
    return out.unflatten(2, (heads, -1))[..., :head_dim]


class FractalPages(NpuPages):
    """A layer: (blocks, kv_heads * head_dim / 16, block_size, 16) in FRACTAL_NZ."""

    def __init__(self, layers: list[torch.Tensor], head_dim: int):
        super().__init__(layers)
        self.head_dim = head_dim

    def read(self, layer: int, slots: Slots) -> torch.Tensor:
        return self.layers[layer][slots.index].flatten(-2).unflatten(-1, (-1, self.head_dim))


class PagedAttention310P(NpuPagedAttention):
    def __init__(self, k: Pages, v: Pages):
        super().__init__(k, v)
        self.last_mask: tuple[tuple[int, int, int | None], torch.Tensor] | None = None

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: Slots) -> None:
        torch.ops.atb._npu_reshape_and_cache(
            key=k,
            value=v,
            key_cache=self.k.layers[layer],
            value_cache=self.v.layers[layer],
            slot_indices=slots.int32,
        )

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
        if part.is_whole:
            return self.flash(q, k, v, scale=scale, window=window)
        table, context_lens = part.tables
        out = torch.empty_like(q)
        torch.ops.atb._npu_paged_attention_splitfuse(
            query=q.contiguous(),
            key_cache=self.k.layers[layer],
            value_cache=self.v.layers[layer],
            block_table=table,
            context_lens=context_lens,
            mask=self.mask(part.query_len, part.context_len, window, q.device),
            seq_len=torch.tensor([part.query_len], dtype=torch.int32),  # on the host
            num_kv_heads=k.shape[1],
            num_heads=q.shape[1],
            scale_value=scale,
            out=out,
        )
        return out

    def flash(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, window: int | None
    ) -> torch.Tensor:
        """A whole prompt; tokens come in sixteens, and what is added at the end is seen by none."""
        tokens = len(q)
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, -tokens % TILE)).contiguous() for x in (q, k, v))
        out = torch.empty_like(q)
        torch.ops.atb._npu_flash_attention(
            query=q,
            key=k,
            value=v,
            mask=self.mask(len(q), len(q), window, q.device),
            seq_len=torch.tensor([len(q)], dtype=torch.int32),  # on the host
            scale_value=scale,
            num_heads=q.shape[1],
            num_kv_heads=k.shape[1],
            out=out,
        )
        return out[:tokens]

    def mask(self, query_len: int, context_len: int, window: int | None, device: torch.device) -> torch.Tensor:
        """causal_mask, 0 where a key is seen, else -inf, in FRACTAL_NZ: (1, context / 16, query, 16), both rounded up.

        The layers of a step ask for the same one after the other.
        """
        wanted = (query_len, context_len, window)
        if self.last_mask is None or self.last_mask[0] != wanted:
            seen = plain.causal_mask(query_len, context_len, window, device)
            hidden = torch.zeros(seen.shape, dtype=torch.float16, device=device).masked_fill_(~seen, -torch.inf)
            hidden = F.pad(hidden, (0, -context_len % TILE, 0, -query_len % TILE))
            tiles = hidden.unflatten(1, (-1, TILE)).transpose(0, 1)[None].contiguous()
            self.last_mask = wanted, fractal(tiles)
        return self.last_mask[1]

    def decode(
        self, layer: int, q: torch.Tensor, tables: DecodeTables, *, scale: float, window: int | None
    ) -> torch.Tensor:
        if not sees_all(tables, window):
            return super().decode(layer, q, tables, scale=scale, window=window)
        q = q.contiguous()
        out = torch.empty_like(q)
        kv_heads = self.k.layers[layer].shape[1] * TILE // q.shape[2]
        torch.ops.atb._npu_paged_attention(
            query=q,
            key_cache=self.k.layers[layer],
            value_cache=self.v.layers[layer],
            num_kv_heads=kv_heads,
            num_heads=q.shape[1],
            scale_value=scale,
            block_table=tables.block_tables,
            context_lens=tables.context_lens,
            out=out,
        )
        return out


KERNELS = Kernels310P
