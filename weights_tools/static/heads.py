"""The decoder's two ends: token ids to states, the last state to logits, and logits to the next token."""

from __future__ import annotations

import numpy as np

from weights_tools.static.blocks import StaticShape, rms_norm
from weights_tools.static.graph import FLOAT, INT32, INT64, Graph, WeightFile

CANDIDATES = 50  # tokens the sampling head chooses among, as published


def embedding(name: str, s: StaticShape, weights: WeightFile, rows: int) -> Graph:
    g = Graph(name, weights)
    ids = g.input("input_ids", [1, rows], INT32)
    g.output(g.op("Gather", g.weight("embed_tokens.weight"), ids), "hidden_states", [1, rows, s.hidden_size])
    return g


def lm_head(s: StaticShape, weights: WeightFile) -> Graph:
    """The last norm and the head, of one row."""
    g = Graph("lm_head", weights)
    x = g.input("hidden_states", [1, s.hidden_size])
    logits = g.linear(rms_norm(g, x, "decoder.norm", s.eps), "lm_head")
    g.output(logits, "m_logits", [1, s.vocab_size])
    return g


def greedy_head(s: StaticShape) -> Graph:
    g = Graph("greedy_head")
    logits = g.input("m_logits", [1, s.vocab_size])
    token = g.ops("TopK", 2, logits, g.const([1], np.int64))[1]
    g.output(token, "token", [1, 1], INT64)
    return g


def penalty_sample_head(s: StaticShape) -> Graph:
    """The likeliest tokens and their probabilities, after penalty, temperature and top_p, in the engine's order.

    input_ids: tokens to be penalised, the rest filled up with any of them. Unlike the published head, which keeps
    the 5 likeliest tokens whatever top_p, this keeps no more than hold top_p of the probability (one at least).
    """
    g, count = Graph("penalty_sample_head"), min(CANDIDATES, s.vocab_size)
    logits = g.input("m_logits", [1, s.vocab_size])
    seen = g.input("input_ids", [1, s.seq_length], INT32)
    top_p, temperature, penalty = (g.input(name, [1]) for name in ("top_p", "temperature", "penalty"))
    values = g.op("GatherElements", logits, seen, axis=1)
    less = g.op("Less", values, g.const(0))
    values = g.op("Where", less, g.op("Mul", values, penalty), g.op("Div", values, penalty))
    logits = g.op("ScatterElements", logits, seen, values, axis=1)
    likeliest, tokens = g.ops("TopK", 2, logits, g.const([count], np.int64))
    probs = g.op("Softmax", g.op("Div", likeliest, temperature), axis=-1)
    before = g.op("Sub", g.op("CumSum", probs, g.const(1, np.int64)), probs)
    kept = g.op("Mul", probs, g.op("Cast", g.op("Less", before, top_p), to=FLOAT))
    total = g.op("ReduceSum", kept, g.const([1], np.int64), keepdims=1)
    g.output(g.op("Div", kept, total), "probs", [1, count])
    g.output(tokens, "token", [1, count], INT64)
    return g
