"""910B (800I A2): one fused attention for prompts, decoding and pictures, in the layout its documents bind to no head
size (BSH); products fused with their all-reduce where a prompt is long."""

from __future__ import annotations

import torch

from mmdist.kernels import plain
from mmdist.kernels.npu import NpuKernels, padded_heads
from mmdist.kernels.npu_paged import NpuPagedAttention, NpuPages, sees_all
from mmdist.kernels.paged import DecodeTables, Prefill
from mmdist.kernels.pages import Int8Pages, Pages, Size, Slots
from mmdist.tp import TP

CAUSAL_SIDE = 2048  # of the one mask that stands for all causal ones
CAUSAL, EXPLICIT = 3, 0  # sparse_mode: right-aligned causal; the mask as given
REDUCE_SIZES = (2, 4, 8)  # ranks, in a full mesh
REDUCE_ROWS = 512  # below, the vendor advises against the fused product; not measured


class Kernels910B(NpuKernels):
    chip = "910b"
    quant_bits = (8, 4)
    quant_groups = True

    def linear(self, weight: torch.Tensor) -> None:
        return None  # ND as it is

    def linear_all_reduce(self, x: torch.Tensor, weight: torch.Tensor, tp: TP) -> torch.Tensor | None:
        rows = x.numel() // x.shape[-1]
        if tp.size not in REDUCE_SIZES or rows < REDUCE_ROWS or x.dtype != weight.dtype:
            return None
        hcom = tp.others.device_group(self.device)
        if hcom is None:
            return None
        y = torch.ops.npu.npu_mm_all_reduce_base(
            x1=x.flatten(0, -2).contiguous(), x2=weight.T, hcom=hcom, reduce_op="sum"
        )
        return y.view(*x.shape[:-1], -1)

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
        return fused_attention(q, k, v, hidden_by(mask), scale=scale)

    def masked_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, *, scale: float
    ) -> torch.Tensor:
        return fused_attention(q[None], k[None], v[None], hidden_by(mask), scale=scale)[0]

    def empty_pages(self, size: Size, dtype: torch.dtype) -> Pages:
        layers, blocks, kv_heads, block_size, head_dim = size
        shape = (blocks, block_size, kv_heads, head_dim)
        return BlockPages([torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(layers)])

    def paged_attention(self, k: Pages | Int8Pages, v: Pages | Int8Pages) -> NpuPagedAttention:
        assert isinstance(k, Pages) and isinstance(v, Pages)
        return PagedAttention910B(k, v)


def hidden_by(mask: torch.Tensor | None) -> torch.Tensor | None:
    """(queries, context), what is seen -> (1, queries, context), what is not."""
    return None if mask is None else (~mask)[None].contiguous()


def fused_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    hidden: torch.Tensor | None,
    *,
    scale: float,
    sparse_mode: int = EXPLICIT,
) -> torch.Tensor:
    """q (batch, queries, heads, head_dim) over k, v (batch, context, kv_heads, head_dim) -> q's shape."""
    heads, head_dim, kv_heads = q.shape[2], q.shape[3], k.shape[2]
    q, k, v = (x.flatten(2).contiguous() for x in padded_heads(q, k, v))
    out, _ = torch.ops.npu.npu_fused_infer_attention_score(
        query=q,
        key=k,
        value=v,
        atten_mask=hidden,
        num_heads=heads,
        num_key_value_heads=kv_heads,
        scale=scale,
        input_layout="BSH",
        sparse_mode=sparse_mode,
    )
    return out.unflatten(2, (heads, -1))[..., :head_dim]


class BlockPages(NpuPages):
    """A layer: (blocks, block_size, kv_heads, head_dim)."""

    def read(self, layer: int, slots: Slots) -> torch.Tensor:
        return self.layers[layer].flatten(0, 1)[slots.numbers]


class PagedAttention910B(NpuPagedAttention):
    def __init__(self, k: Pages, v: Pages):
        super().__init__(k, v)
        side, device = CAUSAL_SIDE, self.k.layers[0].device
        self.causal = torch.ones(side, side, dtype=torch.bool, device=device).triu_(1)

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: Slots) -> None:
        torch.ops.npu.npu_scatter_pa_kv_cache(
            key=k,
            value=v,
            key_cache=self.k.layers[layer],
            value_cache=self.v.layers[layer],
            slot_mapping=slots.int32,
            cache_mode="Norm",
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
        if window is not None and part.context_len > window:
            if not part.is_whole:
                k, v = self.k.read(layer, part.slots), self.v.read(layer, part.slots)
            hidden = hidden_by(plain.causal_mask(part.query_len, part.context_len, window, q.device))
            return fused_attention(q[None], k[None], v[None], hidden, scale=scale)[0]
        if part.is_whole:
            return fused_attention(q[None], k[None], v[None], self.causal, scale=scale, sparse_mode=CAUSAL)[0]
        return self.over_blocks(
            layer, q[None], part.tables[0], [part.context_len], scale=scale, hidden=self.causal, sparse_mode=CAUSAL
        )[0]

    def decode(
        self, layer: int, q: torch.Tensor, tables: DecodeTables, *, scale: float, window: int | None
    ) -> torch.Tensor:
        if not sees_all(tables, window):
            return super().decode(layer, q, tables, scale=scale, window=window)
        return self.over_blocks(layer, q[:, None], tables.block_tables, tables.lens, scale=scale)[:, 0]

    def over_blocks(
        self,
        layer: int,
        q: torch.Tensor,
        block_tables: torch.Tensor,
        context_lens: list[int],
        *,
        scale: float,
        hidden: torch.Tensor | None = None,
        sparse_mode: int = EXPLICIT,
    ) -> torch.Tensor:
        """q (sequences, queries, heads, head_dim), the last of contexts in the cache -> the same shape."""
        heads = q.shape[2]
        keys, values = self.k.layers[layer], self.v.layers[layer]
        out, _ = torch.ops.npu.npu_fused_infer_attention_score(
            query=q.flatten(2).contiguous(),
            key=keys.flatten(2),
            value=values.flatten(2),
            atten_mask=hidden,
            actual_seq_lengths_kv=context_lens,
            block_table=block_tables,
            block_size=keys.shape[1],
            num_heads=heads,
            num_key_value_heads=keys.shape[2],
            scale=scale,
            input_layout="BSH",
            sparse_mode=sparse_mode,
        )
        return out.unflatten(2, (heads, -1))


KERNELS = Kernels910B
