"""The Llama decoder (Llama, Vicuna, Yi, Mistral), tensor-parallel over a paged KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from mmdist.config import UserError
from mmdist.layers.attention import Attention, AttentionCache, Context
from mmdist.layers.embedding import VocabParallelEmbedding
from mmdist.layers.mlp import GatedMLP
from mmdist.layers.norm import RMSNorm
from mmdist.layers.rope import RotaryEmbedding
from mmdist.tp import TP


@dataclass(frozen=True)
class DecoderShape:
    """What the model types this decoder serves say differently, in one form."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    activation: str
    max_model_len: int
    attention_bias: bool
    mlp_bias: bool
    window: int | None


# Per transformers model_type, where it keeps (head_dim, attention bias, MLP bias, sliding window).
VARIANTS = {
    "llama": lambda config: (config.head_dim, config.attention_bias, config.mlp_bias, None),
    "mistral": lambda config: (config.head_dim, False, False, config.sliding_window),
    "mllama_text_model": lambda config: (config.hidden_size // config.num_attention_heads, False, False, None),
}


def decoder_shape(config: Any) -> DecoderShape:
    """Read a transformers text config (class defaults already filled in)."""
    if config.model_type not in VARIANTS:
        raise UserError(f"text_config.model_type={config.model_type}: expected {', '.join(VARIANTS)}")
    head_dim, attention_bias, mlp_bias, window = VARIANTS[config.model_type](config)
    return DecoderShape(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.rms_norm_eps,
        activation=config.hidden_act,
        max_model_len=config.max_position_embeddings,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        window=window,
    )


class DecoderLayer(nn.Module):
    def __init__(self, shape: DecoderShape, tp: TP, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(
            shape.hidden_size,
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            tp,
            layer=layer,
            bias=shape.attention_bias,
            window=shape.window,
        )
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = GatedMLP(shape.hidden_size, shape.intermediate_size, shape.activation, tp, bias=shape.mlp_bias)

    def forward(self, x: torch.Tensor, context: Context, rows: torch.Tensor | None = None) -> torch.Tensor:
        """(tokens, hidden) -> (tokens, hidden), or of `rows` alone: what no one asks for after the last layer."""
        attended = self.self_attn(self.input_layernorm(x), context)
        if rows is not None:
            x, attended = x[rows], attended[rows]
        if not x.shape[0]:
            return x
        x, normed = self.post_attention_layernorm.add(x, attended)
        return x + self.mlp(normed)


@dataclass
class Step:
    """One forward pass: sequences laid end to end.

    input_ids, positions: (tokens,). image_embeds replace the embeddings at image_rows. query_lens: tokens of each
    sequence; memories: what MultimodalModel.remember made of its pictures, None without. rows: the tokens whose
    hidden states are asked for; None: all.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    image_rows: torch.Tensor
    image_embeds: torch.Tensor
    cache: AttentionCache
    query_lens: Sequence[int]
    memories: Sequence[Any]
    rows: torch.Tensor | None = None


class Decoder(nn.Module):
    extra_embeddings: ClassVar[int] = 0  # rows of the embedding table beyond the vocabulary

    def __init__(self, config: Any, tp: TP):
        super().__init__()
        self.shape = decoder_shape(config)
        num_embeddings = self.shape.vocab_size + self.extra_embeddings
        self.embed_tokens = VocabParallelEmbedding(num_embeddings, self.shape.hidden_size, tp)
        self.layers = nn.ModuleList(self.build_layer(config, tp, layer) for layer in range(self.shape.num_layers))
        self.norm = RMSNorm(self.shape.hidden_size, self.shape.rms_norm_eps)
        self.rope = RotaryEmbedding(config, self.shape.head_dim)

    def build_layer(self, config: Any, tp: TP, layer: int) -> nn.Module:
        return DecoderLayer(self.shape, tp, layer)

    def forward(self, embeds: torch.Tensor, step: Step) -> torch.Tensor:
        """(tokens, hidden) input embeddings -> (tokens, hidden), or step.rows of it."""
        rope = self.rope(step.positions, embeds.dtype)
        context = Context(rope, step.cache, step.positions, step.query_lens, step.memories)
        *before, last = self.layers
        for layer in before:
            embeds = layer(embeds, context)
        return self.norm(last(embeds, context, step.rows))
