"""The Llama decoder (Llama, Vicuna, Yi, Mistral), tensor-parallel over a paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmdist.config import UserError
from mmdist.layers.attention import Attention, AttentionCache
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


# Per transformers model_type, where it keeps (attention bias, MLP bias, sliding window).
VARIANTS = {
    "llama": lambda config: (config.attention_bias, config.mlp_bias, None),
    "mistral": lambda config: (False, False, config.sliding_window),
}


def decoder_shape(config: Any) -> DecoderShape:
    """Read a transformers text config (class defaults already filled in)."""
    if config.model_type not in VARIANTS:
        raise UserError(f"text_config.model_type={config.model_type}: expected {', '.join(VARIANTS)}")
    attention_bias, mlp_bias, window = VARIANTS[config.model_type](config)
    return DecoderShape(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
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

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], cache: AttentionCache) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: Any, tp: TP):
        super().__init__()
        self.shape = decoder_shape(config)
        self.embed_tokens = VocabParallelEmbedding(self.shape.vocab_size, self.shape.hidden_size, tp)
        self.layers = nn.ModuleList(DecoderLayer(self.shape, tp, layer) for layer in range(self.shape.num_layers))
        self.norm = RMSNorm(self.shape.hidden_size, self.shape.rms_norm_eps)
        self.rope = RotaryEmbedding(config)

    def forward(self, embeds: torch.Tensor, positions: torch.Tensor, cache: AttentionCache) -> torch.Tensor:
        """(tokens, hidden) input embeddings at (tokens,) positions -> (tokens, hidden)."""
        rope = self.rope(positions, embeds.dtype)
        for layer in self.layers:
            embeds = layer(embeds, rope, cache)
        return self.norm(embeds)
