"""Reference kernels of the attention operations and of the caches they read; see reference_ops."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from npu.chip import FRACTAL_NZ, HALVES, ND, TILE, Op, kernel

Tensor = torch.Tensor
EVERYTHING = 2147483647  # pre_tokens and next_tokens that leave nothing out
CAUSAL_SIDE = 2048  # of the mask that stands for all causal ones
MAX_GROUP = 64  # query heads that share a KV head
LAYOUTS = ("BSH", "BSND", "BNSD", "BNSD_BSND", "TND")


def attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, bias: Tensor | None = None) -> Tensor:
    """q (queries, heads, head_dim) over k, v (context, kv_heads, head_dim), in float32; hidden: (queries, context)."""
    groups = q.shape[1] // k.shape[1]
    wide = [x.transpose(0, 1).float() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(groups, 0) for x in wide[1:])
    scores = wide[0] @ keys.transpose(1, 2) * scale
    if bias is not None:
        scores = scores + bias.float()
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ values).transpose(0, 1).to(q.dtype)


def check_heads(op: Op, num_heads: int, num_kv_heads: int) -> int:
    """KV heads, where 0 means as many as query heads."""
    num_kv_heads = num_kv_heads or num_heads
    op.require(num_heads % num_kv_heads == 0, f"{num_heads} heads over {num_kv_heads} KV heads")
    op.require(num_heads // num_kv_heads <= MAX_GROUP, f"{num_heads} heads over {num_kv_heads} KV heads: over 64 each")
    op.require(num_heads <= 256, f"{num_heads} heads, over 256")
    return num_kv_heads


def by_sequence(op: Op, x: Tensor, layout: str, heads: int, ends: Sequence[int] | None = None) -> list[Tensor]:
    """A sequence's (tokens, heads, head_dim) each; ends: of the sequences of TND."""
    op.require(layout in LAYOUTS, f"input_layout {layout}, not {', '.join(LAYOUTS)}")
    wanted = {"BSH": 3, "TND": 3}.get(layout, 4)
    op.require(x.dim() == wanted, f"{x.dim()} dimensions in layout {layout}")
    if layout == "TND":
        assert ends is not None
        op.require(
            list(ends) == sorted(ends) and ends[-1] == x.shape[0], f"lengths {list(ends)} of {x.shape[0]} tokens"
        )
        parts = [x[first:last] for first, last in pairwise([0, *ends])]
    elif layout == "BSH":
        op.require(x.shape[-1] % heads == 0, f"{x.shape[-1]} numbers a token do not divide into {heads} heads")
        parts = list(x.unflatten(-1, (heads, -1)))
    else:
        parts = [part.transpose(0, 1) if layout.startswith("BNSD") else part for part in x]
    op.require(all(part.shape[1] == heads for part in parts), f"{parts[0].shape[1]} heads, said to be {heads}")
    return parts


def to_layout(op: Op, parts: list[Tensor], layout: str) -> Tensor:
    if layout == "TND":
        return torch.cat(parts)
    out = torch.stack(parts)
    if layout == "BSH":
        return out.flatten(2)
    return out.transpose(1, 2).contiguous() if layout == "BNSD" else out


def check_sizes(op: Op, parts: list[Tensor], *, batch: int, tokens: int) -> None:
    head_dim = parts[0].shape[-1]
    op.require(head_dim <= 512, f"head_dim {head_dim}, over 512")
    op.require(head_dim % TILE == 0, f"head_dim {head_dim}, not a multiple of 16")
    op.require(len(parts) <= batch, f"{len(parts)} sequences, over {batch}")
    op.require(max(len(part) for part in parts) <= tokens, f"over {tokens} tokens a sequence")


class Masks:
    """What atten_mask, sparse_mode and the token windows hide from each sequence."""

    def __init__(self, op: Op, mask: Tensor | None, sparse_mode: int, pre_tokens: int, next_tokens: int):
        op.require(0 <= sparse_mode <= 4, f"sparse_mode {sparse_mode}, not 0 to 4")
        op.require(sparse_mode in (0, 3), f"sparse_mode {sparse_mode} is not emulated")
        self.op, self.mask, self.sparse_mode = op, mask, sparse_mode
        self.pre_tokens, self.next_tokens = pre_tokens, next_tokens
        if mask is not None:
            legal = (torch.bool, torch.int8, torch.uint8)
            op.require(mask.dtype in legal, f"atten_mask is {mask.dtype}, not bool, int8 or uint8")
            op.contiguous(atten_mask=mask)
        if sparse_mode == 3:
            square = mask is not None and tuple(mask.shape[-2:]) == (CAUSAL_SIDE, CAUSAL_SIDE)
            op.require(square, "sparse_mode 3 takes an atten_mask of (2048, 2048)")
            assert mask is not None
            upper = torch.ones(CAUSAL_SIDE, CAUSAL_SIDE, dtype=torch.bool).triu(1)
            op.require(torch.equal(mask.bool().view(CAUSAL_SIDE, -1), upper), "atten_mask is not the causal triangle")

    def hidden(self, number: int, batch: int, queries: int, context: int) -> Tensor | None:
        """(queries, context) bool for sequence `number` of `batch`."""
        if self.mask is None:
            return None
        places = torch.arange(context) - torch.arange(queries)[:, None]
        if self.sparse_mode == 3:
            return places > context - queries
        own = self.mask[number] if self.mask.dim() > 2 and self.mask.shape[0] == batch and batch > 1 else self.mask
        own = own.reshape(-1, own.shape[-1]) if queries > 1 else own.reshape(1, -1)
        fits = own.shape[0] >= queries and own.shape[1] >= context
        self.op.require(fits, f"atten_mask is {tuple(self.mask.shape)} for {queries} queries and {context} keys")
        # Counted from the first token of both, whatever their lengths.
        hidden = own[:queries, :context].bool() | (places > self.next_tokens) | (places < -self.pre_tokens)
        self.op.require(
            not hidden.all(1).any(), "a query sees nothing: its row is undefined with inner_precise 0 and 1"
        )
        return hidden


def lengths(op: Op, given: Sequence[int] | None, parts: list[Tensor], what: str) -> list[int]:
    """One for each sequence."""
    if given is None:
        return [len(part) for part in parts]
    op.require(len(given) == 1 or len(given) >= len(parts), f"{len(given)} {what} for {len(parts)} sequences")
    own = list(given) * len(parts) if len(given) == 1 else list(given)[: len(parts)]
    op.require(all(0 < n <= len(p) for n, p in zip(own, parts, strict=True)), f"{what} {own} beyond the tensor")
    return own


# Caches


def check_table(op: Op, block_table: Tensor, context_lens: Sequence[int], num_blocks: int, block_size: int) -> None:
    op.dtype((torch.int32,), block_table=block_table)
    op.require(block_table.dim() == 2 and len(block_table) == len(context_lens), f"block_table {block_table.shape}")
    needed = [-(-length // block_size) for length in context_lens]
    op.require(
        block_table.shape[1] >= max(needed), f"block_table has {block_table.shape[1]} columns, not {max(needed)}"
    )
    used = torch.cat([row[:count] for row, count in zip(block_table, needed, strict=True)])
    op.require(bool((used >= 0).all() and (used < num_blocks).all()), f"block_table names a block beyond {num_blocks}")


def gathered(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """cache: (blocks, block_size, kv_heads, head_dim) -> (length, kv_heads, head_dim)"""
    return cache[table[: -(-length // cache.shape[1])].long()].flatten(0, 1)[:length]


def fractal_cache(op: Op, cache: Tensor, num_kv_heads: int, head_dim: int) -> Tensor:
    """A view of (blocks, kv_heads * head_dim / 16, block_size, 16) as (blocks, block_size, kv_heads, head_dim)."""
    op.format(FRACTAL_NZ, cache=cache)
    blocks, _, block_size, _ = cache.shape
    op.shape(cache, (blocks, num_kv_heads * head_dim // TILE, block_size, TILE), "the cache")
    return cache.view(blocks, num_kv_heads, head_dim // TILE, block_size, TILE).permute(0, 3, 1, 2, 4)


def atb_caches(op: Op, caches: Sequence[Tensor], num_kv_heads: int, head_dim: int) -> list[Tensor]:
    """Both caches as (blocks, block_size, kv_heads, head_dim or its tiles), of which the last dims can be flattened."""
    for cache in caches:
        tiled = cache.dim() == 4 and (cache.shape[3] == TILE or not op.chip.is_310p)
        op.require(tiled, f"the cache is {tuple(cache.shape)}, not of 4 dimensions, the last 16 on a 310P")
    block_size = caches[0].shape[2] if op.chip.is_310p else caches[0].shape[1]
    op.require(block_size % TILE == 0 and block_size <= 128, f"block_size {block_size}, not in sixteens up to 128")
    op.require(0 < head_dim <= 256, f"head_dim {head_dim}, not 1 to 256")
    if not op.chip.is_310p:
        op.format(ND, key_cache=caches[0], value_cache=caches[1])
        for cache in caches:
            op.shape(cache, (len(cache), block_size, num_kv_heads, head_dim), "the cache")
        return list(caches)
    op.require(head_dim % TILE == 0, f"head_dim {head_dim}, not a multiple of 16")
    op.require(block_size * head_dim <= 128 * 128, f"block_size {block_size} * head_dim {head_dim} is over 16384")
    return [fractal_cache(op, cache, num_kv_heads, head_dim) for cache in caches]


def put(op: Op, vectors: Tensor, cache: Tensor, slots: Tensor) -> None:
    """vectors (tokens, kv_heads, head_dim) to their slots of a cache as atb_caches gives it."""
    blocks, block_size = cache.shape[:2]
    op.shape(slots, (len(vectors),), "the slots")
    legal = bool((slots >= 0).all() and (slots < blocks * block_size).all())
    op.require(legal, f"a slot outside 0 to {blocks * block_size - 1}")
    op.require(len(slots.unique()) == len(slots), "a slot is given twice")
    numbers = slots.long()
    cache[numbers // block_size, numbers % block_size] = vectors.reshape(len(vectors), *cache.shape[2:])


@kernel("atb::_npu_reshape_and_cache")
def npu_reshape_and_cache(
    op: Op, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_indices: Tensor
) -> None:
    op.dtype(HALVES, key=key, value=value, key_cache=key_cache, value_cache=value_cache)
    op.dtype((torch.int32,), slot_indices=slot_indices)
    op.contiguous(key=key, value=value, slot_indices=slot_indices)
    op.require(key.dim() == 3, f"key has {key.dim()} dimensions, not 3")
    caches = atb_caches(op, (key_cache, value_cache), key.shape[1], key.shape[2])
    for vectors, cache in zip((key, value), caches, strict=True):
        put(op, vectors, cache, slot_indices)


@kernel("npu::npu_scatter_pa_kv_cache")
def npu_scatter_pa_kv_cache(
    op: Op,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    op.only_on_a2()
    op.none(compress_lens=compress_lens, compress_seq_offsets=compress_seq_offsets, seq_lens=seq_lens)
    op.dtype((*HALVES, torch.float32, torch.int8), key=key, value=value, key_cache=key_cache, value_cache=value_cache)
    op.dtype((torch.int32, torch.int64), slot_mapping=slot_mapping)
    op.contiguous(key=key, value=value, key_cache=key_cache, value_cache=value_cache, slot_mapping=slot_mapping)
    op.require(key.dim() == 3 and key_cache.dim() == 4, f"key {tuple(key.shape)}, key_cache {tuple(key_cache.shape)}")
    for vectors, cache in ((key, key_cache), (value, value_cache)):
        heads, head_dim = vectors.shape[1:]
        if cache_mode == "Norm":
            op.format(ND, cache=cache)
            op.shape(cache, (*cache.shape[:2], heads, head_dim), "the cache")
            put(op, vectors, cache, slot_mapping)
        else:
            put(op, vectors, fractal_cache(op, cache, heads, head_dim), slot_mapping)


# NNAL (ATB): tokens of all sequences end to end


def check_atb(op: Op, query: Tensor, others: dict[str, Tensor], out: Tensor) -> None:
    op.dtype(HALVES, query=query, **others, out=out)
    op.contiguous(query=query, out=out, **others)
    op.require(query.dim() == 3, f"query has {query.dim()} dimensions, not 3")
    op.shape(out, tuple(query.shape), "out")
    head_dim = query.shape[-1]
    op.require(not op.chip.is_310p or head_dim % TILE == 0, f"head_dim {head_dim}, not a multiple of 16")


def host_lengths(op: Op, seq_len: Tensor, tokens: int) -> list[int]:
    op.place("cpu", seq_len=seq_len)
    op.dtype((torch.int32,), seq_len=seq_len)
    found = seq_len.tolist()
    op.require(sum(found) == tokens, f"seq_len {found} of {tokens} tokens")
    return found


def additive_mask(op: Op, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(queries, context); on a 310P it comes as (1, context / 16, queries, 16) in FRACTAL_NZ."""
    op.require(mask.dtype == dtype, f"mask is {mask.dtype}, not {dtype}")
    if not op.chip.is_310p:
        op.format(ND, mask=mask)
        return mask.reshape(-1, mask.shape[-1])
    op.format(FRACTAL_NZ, mask=mask)
    tiled = mask.dim() == 4 and mask.shape[0] == 1 and mask.shape[2] % TILE == 0 and mask.shape[3] == TILE
    op.require(tiled, f"mask is {tuple(mask.shape)}, not (1, context / 16, queries, 16)")
    return mask[0].transpose(0, 1).flatten(1)


def flash(op: Op, q: Tensor, k: Tensor, v: Tensor, lens: list[int], scale: float, mask: Tensor | None) -> Tensor:
    """Each sequence over itself."""
    out, ends = [], list(accumulate(lens))
    for first, last in pairwise([0, *ends]):
        length, rows = last - first, slice(first, last)
        if mask is not None:
            fits = min(mask.shape) >= length
            op.require(fits, f"a mask of {tuple(mask.shape)} for {length} tokens")
        bias = None if mask is None else mask[:length, :length]
        out.append(attend(q[rows], k[rows], v[rows], None, scale, bias))
    return torch.cat(out)


@kernel("atb::_npu_flash_attention")
def npu_flash_attention(
    op: Op,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    seq_len: Tensor,
    scale_value: float,
    num_heads: int,
    num_kv_heads: int,
    out: Tensor,
) -> None:
    check_atb(op, query, {"key": key, "value": value}, out)
    kv_heads, (tokens, _, head_dim) = check_heads(op, num_heads, num_kv_heads), query.shape
    op.shape(query, (tokens, num_heads, head_dim), "query")
    for name, x in (("key", key), ("value", value)):
        op.shape(x, (tokens, kv_heads, head_dim), name)
    op.require(not op.chip.is_310p or tokens % TILE == 0, f"{tokens} tokens, not a multiple of 16")
    lens = host_lengths(op, seq_len, tokens)
    out.copy_(flash(op, query, key, value, lens, scale_value, additive_mask(op, mask, query.dtype)))


@kernel("atb::_npu_flash_attention_unpad")
def npu_flash_attention_unpad(
    op: Op,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seq_len: Tensor,
    scale_value: float,
    num_heads: int,
    num_kv_heads: int,
    out: Tensor,
) -> None:
    """Without a mask: pictures."""
    check_atb(op, query, {"key": key, "value": value}, out)
    kv_heads, (tokens, _, head_dim) = check_heads(op, num_heads, num_kv_heads), query.shape
    op.require(not 64 < head_dim < 128, f"head_dim {head_dim}: between 64 and 128 heads are filled up to 128")
    op.shape(query, (tokens, num_heads, head_dim), "query")
    for name, x in (("key", key), ("value", value)):
        op.shape(x, (tokens, kv_heads, head_dim), name)
    out.copy_(flash(op, query, key, value, host_lengths(op, seq_len, tokens), scale_value, None))


@kernel("atb::_npu_paged_attention")
def npu_paged_attention(
    op: Op,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    block_table: Tensor,
    context_lens: Tensor,
    out: Tensor,
    *,
    workspace: Tensor | None = None,
) -> None:
    """One query a sequence."""
    op.none(workspace=workspace)
    check_atb(op, query, {"key_cache": key_cache, "value_cache": value_cache}, out)
    check_heads(op, num_heads, num_kv_heads)
    batch, _, head_dim = query.shape
    op.shape(query, (batch, num_heads, head_dim), "query")
    op.require(not op.chip.is_310p or batch <= 2048, f"{batch} sequences, over 2048")
    keys, values = atb_caches(op, (key_cache, value_cache), num_kv_heads, head_dim)
    op.dtype((torch.int32,), context_lens=context_lens)
    lens = context_lens.tolist()
    check_table(op, block_table, lens, len(keys), keys.shape[1])
    for row, (table, length) in enumerate(zip(block_table, lens, strict=True)):
        k, v = (gathered(cache, table, length).reshape(length, num_kv_heads, head_dim) for cache in (keys, values))
        out[row] = attend(query[row : row + 1], k, v, None, scale_value)[0]


@kernel("atb::_npu_paged_attention_splitfuse")
def npu_paged_attention_splitfuse(
    op: Op,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    mask: Tensor,
    seq_len: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    out: Tensor,
) -> None:
    """seq_len[i] queries, the last of context_lens[i] tokens; mask: a row for each query, end to end."""
    check_atb(op, query, {"key_cache": key_cache, "value_cache": value_cache}, out)
    check_heads(op, num_heads, num_kv_heads)
    tokens, _, head_dim = query.shape
    op.shape(query, (tokens, num_heads, head_dim), "query")
    keys, values = atb_caches(op, (key_cache, value_cache), num_kv_heads, head_dim)
    op.dtype((torch.int32,), context_lens=context_lens)
    lens, contexts = host_lengths(op, seq_len, tokens), context_lens.tolist()
    check_table(op, block_table, contexts, len(keys), keys.shape[1])
    bias = additive_mask(op, mask, query.dtype)
    fits = bias.shape[0] >= tokens and bias.shape[1] >= max(contexts)
    op.require(fits, f"a mask of {tuple(bias.shape)} for {tokens} queries and {max(contexts)} keys")
    rows = pairwise([0, *accumulate(lens)])
    for (first, last), table, length in zip(rows, block_table, contexts, strict=True):
        k, v = (gathered(cache, table, length).reshape(length, num_kv_heads, head_dim) for cache in (keys, values))
        out[first:last] = attend(query[first:last], k, v, None, scale_value, bias[first:last, :length])


# aclnn: sequences in a layout


@kernel("npu::npu_prompt_flash_attention")
def npu_prompt_flash_attention(
    op: Op,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    num_heads: int = 1,
    scale_value: float = 1.0,
    pre_tokens: int = EVERYTHING,
    next_tokens: int = 0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    sparse_mode: int = 0,
    **others: object,
) -> Tensor:
    op.none(**others)
    op.dtype(HALVES, query=query, key=key, value=value)
    op.contiguous(query=query, key=key, value=value)
    op.format(ND, query=query, key=key, value=value)
    if op.chip.is_310p:
        op.require(num_key_value_heads == 0, f"num_key_value_heads={num_key_value_heads}: no grouped queries (GQA)")
        op.none(actual_seq_lengths=actual_seq_lengths, actual_seq_lengths_kv=actual_seq_lengths_kv)
        op.require(sparse_mode == 0, f"sparse_mode {sparse_mode}, not 0")
        op.require(next_tokens in (0, EVERYTHING), f"next_tokens {next_tokens}, not 0 or 2147483647")
        op.require(pre_tokens == EVERYTHING, f"pre_tokens {pre_tokens}, not 2147483647")
    op.require(input_layout != "TND", "input_layout TND")
    kv_heads = check_heads(op, num_heads, num_key_value_heads)
    masks = Masks(op, atten_mask, sparse_mode, pre_tokens, next_tokens)
    parts = [by_sequence(op, x, input_layout, n) for x, n in ((query, num_heads), (key, kv_heads), (value, kv_heads))]
    small = op.chip.is_310p
    check_sizes(op, parts[0], batch=128 if small else 65536, tokens=65535 if small else 20971520)
    return sequences(op, parts, masks, actual_seq_lengths, actual_seq_lengths_kv, scale_value, input_layout)


def sequences(
    op: Op,
    parts: list[list[Tensor]],
    masks: Masks,
    query_lens: Sequence[int] | None,
    context_lens: Sequence[int] | None,
    scale: float,
    layout: str,
) -> Tensor:
    """Attention of each sequence of (q, k, v) lists; what lies beyond a sequence's own length is 0."""
    queries, keys, values = parts
    op.require(len(queries) == len(keys) == len(values), f"{len(queries)} queries and {len(keys)} keys")
    op.require(keys[0].shape[-1] == queries[0].shape[-1], "query and key differ in head_dim")
    q_lens, k_lens = lengths(op, query_lens, queries, "query lengths"), lengths(op, context_lens, keys, "key lengths")
    out = [torch.zeros_like(q) for q in queries]
    for i, (q_len, k_len) in enumerate(zip(q_lens, k_lens, strict=True)):
        hidden = masks.hidden(i, len(queries), q_len, k_len)
        out[i][:q_len] = attend(queries[i][:q_len], keys[i][:k_len], values[i][:k_len], hidden, scale)
    return to_layout(op, out, layout)


def paged(
    op: Op, cache: Tensor, heads: int, block_table: Tensor, context_lens: Sequence[int], block_size: int
) -> list[Tensor]:
    """A sequence's (tokens, heads, head_dim) each, out of (blocks, block_size, H) or (blocks, heads, block_size, D)."""
    if cache.dim() == 4:
        op.shape(cache, (len(cache), heads, block_size, cache.shape[-1]), "the cache")
        cache = cache.transpose(1, 2)
    else:
        op.require(cache.shape[-1] <= 65535, f"{cache.shape[-1]} numbers a token of the cache, over 65535")
        op.shape(cache, (len(cache), block_size, cache.shape[-1]), "the cache")
        cache = cache.unflatten(-1, (heads, -1))
    check_table(op, block_table, context_lens, len(cache), block_size)
    return [gathered(cache, table, length) for table, length in zip(block_table, context_lens, strict=True)]


@kernel("npu::npu_incre_flash_attention")
def npu_incre_flash_attention(
    op: Op,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    block_table: Tensor | None = None,
    num_heads: int = 1,
    scale_value: float = 1.0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    block_size: int = 0,
    inner_precise: int = 1,
    **others: object,
) -> Tensor:
    op.none(**others)
    op.dtype(HALVES, query=query, key=key, value=value)
    op.contiguous(query=query, key=key, value=value)
    op.require(input_layout in ("BSH", "BSND", "BNSD"), f"input_layout {input_layout}")
    kv_heads = check_heads(op, num_heads, num_key_value_heads)
    queries = by_sequence(op, query, input_layout, num_heads)
    op.require(all(len(part) == 1 for part in queries), "one query a sequence")
    if block_table is None:
        parts = [by_sequence(op, x, input_layout, kv_heads) for x in (key, value)]
    else:
        op.require(actual_seq_lengths is not None, "block_table wants actual_seq_lengths")
        op.require(key.dim() == 3 or input_layout == "BNSD", "a cache of 4 dimensions wants input_layout BNSD")
        op.require(block_size > 0 and block_size % TILE == 0, f"block_size {block_size}, not a multiple of 16")
        assert actual_seq_lengths is not None
        parts = [paged(op, x, kv_heads, block_table, actual_seq_lengths, block_size) for x in (key, value)]
        actual_seq_lengths = None
    small = op.chip.is_310p
    check_sizes(op, queries, batch=256 if small else 65535, tokens=1)
    op.require(max(map(len, parts[0])) <= (65536 if small else 262144), "too many tokens a sequence")
    masks = Masks(op, atten_mask, 0, EVERYTHING, EVERYTHING)
    return sequences(op, [queries, *parts], masks, None, actual_seq_lengths, scale_value, input_layout)


@kernel("npu::npu_fused_infer_attention_score")
def npu_fused_infer_attention_score(
    op: Op,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    block_table: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = EVERYTHING,
    next_tokens: int = EVERYTHING,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    block_size: int = 0,
    softmax_lse_flag: bool = False,
    **others: object,
) -> tuple[Tensor, Tensor]:
    op.only_on_a2()
    op.none(**{name: value for name, value in others.items() if value not in (0, None)})
    op.require(not softmax_lse_flag, "softmax_lse is not emulated")
    op.dtype(HALVES, query=query, key=key, value=value)
    op.contiguous(query=query, key=key, value=value)
    op.format(ND, query=query, key=key, value=value)
    op.shape(value, tuple(key.shape), "value")
    kv_heads = check_heads(op, num_heads, num_key_value_heads)
    lens, kv_lens = actual_seq_lengths, actual_seq_lengths_kv
    if input_layout == "TND":
        op.require(lens is not None and kv_lens is not None, "TND wants both actual_seq_lengths")
        op.require(sparse_mode == (0 if atten_mask is None else 3), "TND: sparse_mode 0 without a mask, 3 with one")
    queries = by_sequence(op, query, input_layout, num_heads, lens)
    lens = None if input_layout == "TND" else lens
    is_prompt = max(map(len, queries)) > 1
    check_sizes(op, queries, batch=65536, tokens=20971520)
    if block_table is None:
        parts = [by_sequence(op, x, input_layout, kv_heads, kv_lens) for x in (key, value)]
        kv_lens = None if input_layout == "TND" else kv_lens
    else:
        check_blocks(op, key, input_layout, kv_lens, block_size, is_prompt)
        assert kv_lens is not None
        parts = [paged(op, x, kv_heads, block_table, kv_lens, block_size) for x in (key, value)]
        if atten_mask is not None and sparse_mode == 0:
            enough = atten_mask.shape[-1] >= block_table.shape[1] * block_size
            op.require(enough, f"atten_mask has {atten_mask.shape[-1]} columns, fewer than the block table holds")
        kv_lens = None
    masks = Masks(op, atten_mask, sparse_mode if is_prompt else 0, pre_tokens, next_tokens)
    out = sequences(op, [queries, *parts], masks, lens, kv_lens, scale, input_layout)
    return out, torch.zeros(1)


# In a graph: its results and its workspace lie where they are given, so that its lengths can be given anew


@kernel("npu::_npu_fused_infer_attention_score_get_max_workspace")
def get_max_workspace(op: Op, query: Tensor, key: Tensor, value: Tensor, **others: object) -> Tensor:
    """For any lengths; how large it is on a chip is not documented."""
    return torch.empty(query.nbytes, dtype=torch.uint8)


@kernel("npu::npu_fused_infer_attention_score.out")
def npu_fused_infer_attention_score_out(
    op: Op, query: Tensor, key: Tensor, value: Tensor, *, workspace: Tensor, out: list[Tensor], **others: Any
) -> tuple[Tensor, Tensor]:
    op.require(workspace.nbytes >= query.nbytes, f"a workspace of {workspace.nbytes} bytes, {query.nbytes} are needed")
    found, _ = npu_fused_infer_attention_score(op, query, key, value, **others)
    op.dtype(out=out[0], query=query)
    op.shape(out[0], tuple(found.shape), "out")
    out[0].copy_(found)
    return out[0], out[1]


def check_blocks(
    op: Op, cache: Tensor, layout: str, kv_lens: Sequence[int] | None, block_size: int, is_prompt: bool
) -> None:
    op.require(kv_lens is not None, "block_table wants actual_seq_lengths_kv")
    op.require(cache.dim() == 3 or layout in ("BNSD", "TND"), f"input_layout {layout} wants a cache of 3 dimensions")
    step, least = (128, 128) if is_prompt else (TILE, TILE)
    legal = block_size % step == 0 and least <= block_size <= 512
    op.require(legal, f"block_size {block_size}, not a multiple of {step} from {least} to 512")


@kernel("npu::npu_fusion_attention_v3")
def npu_fusion_attention_v3(
    op: Op,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = EVERYTHING,
    next_tockens: int = EVERYTHING,
    inner_precise: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Tensor | None = None,
    actual_seq_kvlen: Tensor | None = None,
    sparse_mode: int = 0,
    *others: object,
    **more: object,
) -> tuple[Tensor, ...]:
    """What torch_npu makes of scaled_dot_product_attention; made for training, so a 310P has it not."""
    op.only_on_a2()
    op.none(pse=pse, padding_mask=padding_mask, prefix=prefix, qlen=actual_seq_qlen, kvlen=actual_seq_kvlen)
    op.require(keep_prob == 1.0, "dropout is not emulated")
    op.dtype((*HALVES, torch.float32), query=query, key=key, value=value)
    heads = key.shape[1] if input_layout == "BNSD" else head_num
    parts = [by_sequence(op, x, input_layout, n) for x, n in ((query, head_num), (key, heads), (value, heads))]
    masks = Masks(op, atten_mask, 0, pre_tockens, next_tockens)
    out = sequences(op, parts, masks, None, None, scale, input_layout)
    return (out, *(torch.zeros(0) for _ in range(5)))
