"""The decoder's layers, each in two forms: of a whole prompt, and of one token over what earlier ones left.

Laid out as TPU-MLIR fuses it best: tokens before heads up to the products, each KV head stored once and repeated just
before them. A picture's keys and values lie heads first, so that a token's queries meet them as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weights_tools.static.graph import INT32, Graph, WeightFile

MASKED = -9984.0  # what an unseen place adds to its score: -10000 as bfloat16 has it, so the same in any dtype


@dataclass(frozen=True)
class StaticShape:
    """The sizes all files agree on. vision_rows: tiles * patches, as many keys as a picture has."""

    seq_length: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    eps: float
    num_tiles: int
    num_patches: int

    @property
    def vision_rows(self) -> int:
        return self.num_tiles * self.num_patches

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads


def rms_norm(g: Graph, x: str, name: str, eps: float) -> str:
    square = g.op("Pow", x, g.const(2))
    mean = g.op("ReduceMean", square, axes=[-1], keepdims=1)
    root = g.op("Sqrt", g.op("Add", mean, g.const(eps)))
    return g.op("Mul", g.weight(f"{name}.weight"), g.op("Mul", x, g.op("Div", g.const(1), root)))


def gated_mlp(g: Graph, x: str) -> str:
    gate = g.linear(x, "mlp.gate_proj")
    silu = g.op("Mul", gate, g.op("Sigmoid", gate))
    return g.linear(g.op("Mul", silu, g.linear(x, "mlp.up_proj")), "mlp.down_proj")


def rotate(g: Graph, x: str, cos: str, sin: str, half: int) -> str:
    """(1, rows, heads, 2 * half) by (1, rows, 1, 2 * half)."""
    first, second = g.part(x, 3, 0, half), g.part(x, 3, half, 2 * half)
    turned = g.op("Concat", g.op("Neg", second), first, axis=-1)
    return g.op("Add", g.op("Mul", x, cos), g.op("Mul", turned, sin))


def repeat_heads(g: Graph, x: str, axis: int, sizes: Sequence[int], group: int) -> str:
    """Each KV head of (1, ...) `group` times along its axis."""
    wide = [*sizes[: axis + 1], group, *sizes[axis + 1 :]]
    x = g.op("Unsqueeze", x, g.const([axis + 1], np.int64))
    x = g.op("Expand", x, g.const(wide, np.int64))
    return g.reshape(x, *sizes[:axis], sizes[axis] * group, *sizes[axis + 1 :])


def attend(g: Graph, q: str, k: str, v: str, mask: str, head_dim: int) -> str:
    """q (1, heads, rows, head_dim) over k, v (1, heads, keys, head_dim), with what mask adds to the scores."""
    scores = g.op("Div", g.op("MatMul", q, g.transpose(k, 0, 1, 3, 2)), g.const(head_dim**0.5))
    return g.op("MatMul", g.op("Softmax", g.op("Add", scores, mask), axis=-1), v)


def self_block(
    name: str, s: StaticShape, weights: WeightFile, rope: tuple[np.ndarray, np.ndarray], *, cached: bool
) -> Graph:
    """rope: cosines and sines, (seq_length, head_dim) each. cached: one token, after seq_length places of history."""
    g, rows = Graph(name, weights), 1 if cached else s.seq_length
    keys = s.seq_length + 1 if cached else rows
    x = g.input("input_states", [1, rows, s.hidden_size])
    positions = g.input("position_ids", [1, rows], INT32)
    mask = g.input("attention_mask", [1, 1, rows, keys])
    h = rms_norm(g, x, "input_layernorm", s.eps)
    heads = {"q": s.num_heads, "k": s.num_kv_heads, "v": s.num_kv_heads}
    q, k, v = (
        g.reshape(g.linear(h, f"self_attn.{part}_proj"), 1, rows, count, s.head_dim) for part, count in heads.items()
    )
    tables = (g.op("Gather", g.const(table), positions) for table in rope)
    cos, sin = (g.op("Unsqueeze", table, g.const([2], np.int64)) for table in tables)
    q, k = (rotate(g, x, cos, sin, s.head_dim // 2) for x in (q, k))
    past = [k, v]
    if cached:
        shape = [1, s.seq_length, s.num_kv_heads, s.head_dim]
        history = [g.input(f"history_{part}", shape) for part in "kv"]
        k, v = (g.op("Concat", old, new, axis=1) for old, new in zip(history, past, strict=True))
    sizes = [1, keys, s.num_kv_heads, s.head_dim]
    q, k, v = (g.transpose(x, 0, 2, 1, 3) for x in (q, *(repeat_heads(g, x, 2, sizes, s.group) for x in (k, v))))
    out = g.transpose(attend(g, q, k, v, mask, s.head_dim), 0, 2, 1, 3)
    x = g.op("Add", x, g.linear(g.reshape(out, 1, rows, s.num_heads * s.head_dim), "self_attn.o_proj"))
    x = g.op("Add", x, gated_mlp(g, rms_norm(g, x, "post_attention_layernorm", s.eps)))
    g.output(x, "hidden_states", [1, rows, s.hidden_size])
    for part, value in zip("kv", past, strict=True):
        g.output(value, f"past_{part}", [1, rows, s.num_kv_heads, s.head_dim])
    return g


def cross_block(name: str, s: StaticShape, weights: WeightFile) -> Graph:
    """A prompt that looks at a picture; also the picture's keys and values, for the tokens to come.

    text_row_mask: 1 for the rows that see the picture, 0 for the others, which the layer's MLP passes by.
    """
    g, rows, width = Graph(name, weights), s.seq_length, s.num_heads * s.head_dim
    x = g.input("input_states", [1, rows, s.hidden_size])
    states = g.input("cross_attention_states", [s.num_tiles, s.num_patches, s.hidden_size])
    row_mask = g.input("text_row_mask", [1, rows, 1])
    mask = g.input("attention_mask", [1, 1, rows, s.vision_rows])
    q = queries(g, x, s, rows)
    states = g.reshape(states, 1, s.vision_rows, s.hidden_size)
    sizes = [1, s.vision_rows, s.num_kv_heads, s.head_dim]
    k, v = (g.reshape(g.linear(states, f"cross_attn.{part}_proj"), *sizes) for part in "kv")
    k, v = (g.transpose(x, 0, 2, 1, 3) for x in (rms_norm(g, k, "cross_attn.k_norm", s.eps), v))
    sizes = [1, s.num_kv_heads, s.vision_rows, s.head_dim]
    wide_k, wide_v = (repeat_heads(g, x, 1, sizes, s.group) for x in (k, v))
    out = g.transpose(attend(g, g.transpose(q, 0, 2, 1, 3), wide_k, wide_v, mask, s.head_dim), 0, 2, 1, 3)
    g.output(look(g, x, g.reshape(out, 1, rows, width), s, row_mask), "hidden_states", [1, rows, s.hidden_size])
    for part, value in (("k", k), ("v", v)):
        g.output(value, f"past_{part}", sizes)
    return g


def cross_block_cached(name: str, s: StaticShape, weights: WeightFile) -> Graph:
    """One token, which sees the picture; its queries that share a KV head meet it as rows of one product."""
    g = Graph(name, weights)
    x = g.input("input_states", [1, 1, s.hidden_size])
    mask = g.input("attention_mask", [1, 1, 1, s.vision_rows])
    k, v = (g.input(f"history_{part}", [1, s.num_kv_heads, s.vision_rows, s.head_dim]) for part in "kv")
    q = g.reshape(queries(g, x, s, 1), 1, s.num_kv_heads, s.group, s.head_dim)
    out = g.reshape(attend(g, q, k, v, mask, s.head_dim), 1, 1, s.num_heads * s.head_dim)
    g.output(look(g, x, out, s, None), "hidden_states", [1, 1, s.hidden_size])
    return g


def queries(g: Graph, x: str, s: StaticShape, rows: int) -> str:
    """(1, rows, heads, head_dim), normed."""
    q = g.linear(rms_norm(g, x, "input_layernorm", s.eps), "cross_attn.q_proj")
    return rms_norm(g, g.reshape(q, 1, rows, s.num_heads, s.head_dim), "cross_attn.q_norm", s.eps)


def look(g: Graph, x: str, attended: str, s: StaticShape, row_mask: str | None) -> str:
    """What both gates let through; the file has their tanh."""
    attended = g.linear(attended, "cross_attn.o_proj")
    x = g.op("Add", x, g.op("Mul", g.weight("cross_attn_attn_gate"), attended))
    mlp = gated_mlp(g, rms_norm(g, x, "post_attention_layernorm", s.eps))
    mlp = mlp if row_mask is None else g.op("Mul", row_mask, mlp)
    return g.op("Add", x, g.op("Mul", g.weight("cross_attn_mlp_gate"), mlp))
