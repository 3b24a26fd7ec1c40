"""The vision encoder and its projector for one picture: what mmdist.models.mllama_vision computes, in fixed shapes."""

from __future__ import annotations

from typing import Any

import numpy as np

from weights_tools.static.blocks import MASKED, StaticShape, attend
from weights_tools.static.graph import FLOAT, INT32, Graph, WeightFile


class Tower:
    """config: transformers' MllamaVisionConfig. padded: patches of a tile, filled up to a multiple of 8."""

    def __init__(self, s: StaticShape, config: Any, padded: int, weights: WeightFile):
        self.g, self.s, self.config, self.padded = Graph("vit", weights), s, config, padded
        self.width, self.eps = config.hidden_size, config.norm_eps
        self.rows = s.num_tiles * padded

    def build(self) -> Graph:
        g, s, size = self.g, self.s, self.config.image_size
        pixels = g.input("pixel_values", [s.num_tiles, self.config.num_channels, size, size])
        ids = g.input("aspect_ratio_ids", [1, 1], INT32)
        mask = self.mask(g.input("aspect_ratio_mask", [1, s.num_tiles], INT32))
        states = [g.reshape(self.embed(pixels, ids), 1, self.rows, self.width)]
        for number in range(self.config.num_hidden_layers):
            states.append(self.layer(f"transformer.layers.{number}", states[-1], mask, gated=False))
        x = self.norm(states[-1], "layernorm_post")
        x = self.add_tiles("post_tile_positional_embedding", x, ids, self.padded)
        x = g.reshape(x, 1, self.rows, self.width)
        for number in range(self.config.num_global_layers):
            x = self.layer(f"global_transformer.layers.{number}", x, mask, gated=True)
        g.output(self.project(x, states), "cross_attention_states", [s.num_tiles, s.num_patches, s.hidden_size])
        return g

    def mask(self, used: str) -> str:
        """Of (1, tiles): (1, 1, rows, rows), where padding may not look at padding; what is real sees everything."""
        g, shape = self.g, (1, self.padded)
        real = np.arange(self.padded).reshape(shape) < self.s.num_patches
        used = g.reshape(g.op("Cast", used, to=FLOAT), self.s.num_tiles, 1)
        unused = g.op("Sub", g.const(1), g.op("Mul", used, g.const(real)))
        rows, columns = g.reshape(unused, 1, 1, self.rows, 1), g.reshape(unused, 1, 1, 1, self.rows)
        return g.op("Mul", g.op("MatMul", rows, columns), g.const(MASKED))

    def embed(self, pixels: str, ids: str) -> str:
        """-> (tiles, padded, width)"""
        g, s, patch = self.g, self.s, self.config.patch_size
        tiles, rows = s.num_tiles, s.num_patches
        x = g.op("Conv", pixels, g.weight("patch_embedding.weight"), kernel_shape=[patch] * 2, strides=[patch] * 2)
        x = g.transpose(g.reshape(x, tiles, self.width, rows - 1), 0, 2, 1)
        x = self.add_tiles("pre_tile_positional_embedding", x, ids, rows - 1)
        start = g.op("Expand", g.weight("class_embedding"), g.const([tiles, 1, self.width], np.int64))
        x = g.op("Concat", start, x, axis=1)
        gate = g.weight("gated_positional_embedding.gate")
        place = g.op("Mul", g.op("Sub", g.const(1), gate), g.weight("gated_positional_embedding.embedding"))
        by_tile = g.op("Gather", g.weight("gated_positional_embedding.tile_embedding.weight"), ids)
        by_tile = g.op("Mul", g.reshape(by_tile, tiles, rows, self.width), gate)
        x = self.norm(g.op("Add", g.op("Add", x, place), by_tile), "layernorm_pre")
        if self.padded == rows:
            return x
        return g.op("Concat", x, g.const(np.zeros((tiles, self.padded - rows, self.width))), axis=1)

    def add_tiles(self, name: str, x: str, ids: str, rows: int) -> str:
        """Each tile's own vector on its `rows` rows -> (tiles, rows, width)"""
        g, s = self.g, self.s
        added = g.reshape(g.op("Gather", g.weight(f"{name}.embedding.weight"), ids), s.num_tiles, 1, self.width)
        added = g.op("Mul", added, g.weight(f"{name}.gate"))
        return g.op("Add", g.reshape(x, s.num_tiles, rows, self.width), added)

    def norm(self, x: str, name: str) -> str:
        weights = (self.g.weight(f"{name}.{leaf}") for leaf in ("weight", "bias"))
        return self.g.op("LayerNormalization", x, *weights, axis=-1, epsilon=self.eps)

    def layer(self, name: str, x: str, mask: str, *, gated: bool) -> str:
        x = self.add(x, self.attention(f"{name}.self_attn", self.norm(x, f"{name}.input_layernorm"), mask),
                     f"{name}.gate_attn" if gated else None)  # fmt: skip
        mlp = self.mlp(f"{name}.mlp", self.norm(x, f"{name}.post_attention_layernorm"))
        return self.add(x, mlp, f"{name}.gate_ffn" if gated else None)

    def add(self, x: str, y: str, gate: str | None) -> str:
        return self.g.op("Add", x, y if gate is None else self.g.op("Mul", self.g.weight(gate), y))

    def attention(self, name: str, x: str, mask: str) -> str:
        g, heads = self.g, self.config.attention_heads
        head_dim = self.width // heads
        parts = (g.reshape(g.linear(x, f"{name}.{part}_proj"), 1, self.rows, heads, head_dim) for part in "qkv")
        q, k, v = (g.transpose(part, 0, 2, 1, 3) for part in parts)
        out = g.transpose(attend(g, q, k, v, mask, head_dim), 0, 2, 1, 3)
        return g.linear(g.reshape(out, 1, self.rows, self.width), f"{name}.o_proj")

    def mlp(self, name: str, x: str) -> str:
        """GELU by the error function, as torch exports it."""
        g = self.g
        x = g.linear(x, f"{name}.fc1", bias=True)
        bent = g.op("Add", g.op("Erf", g.op("Div", x, g.const(2**0.5))), g.const(1))
        return g.linear(g.op("Mul", g.op("Mul", x, bent), g.const(0.5)), f"{name}.fc2", bias=True)

    def project(self, x: str, states: list[str]) -> str:
        """The last states beside those of some layers, interleaved -> (tiles, patches, the decoder's hidden)."""
        g, s = self.g, self.s
        inner = [g.op("Unsqueeze", states[i], g.const([-1], np.int64)) for i in self.config.intermediate_layers_indices]
        joined = g.reshape(g.op("Concat", *inner, axis=-1), 1, self.rows, self.width * len(inner))
        joined = g.op("Concat", x, joined, axis=-1)
        joined = g.reshape(joined, s.num_tiles, self.padded, self.width * (1 + len(inner)))
        return g.linear(g.part(joined, 1, 0, s.num_patches), "projector", bias=True)
