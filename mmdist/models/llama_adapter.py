"""LLaMA-Adapter v2 multimodal (7B; BIAS and LORA-BIAS): a picture becomes prompts that the last layers look at.

Gao et al., arXiv:2304.15010; reference: OpenGVLab/LLaMA-Adapter, llama_adapter_v2_multimodal7b. Checkpoints: what
`weights_tools convert llama_adapter` writes. Rank 0 turns the picture into query_len rows; every rank keeps their keys
and values, of its own heads, for each layer that looks at them while the request runs.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, PretrainedConfig
from transformers.configuration_utils import SubConfigSpec

from mmdist.config import ModelConfig, UserError
from mmdist.kernels.kernels import PLAIN, Kernels
from mmdist.layers.attention import Attention, Context
from mmdist.layers.lora import add_lora
from mmdist.models.base import MultimodalModel, Processor
from mmdist.models.decoder import Decoder, DecoderLayer, DecoderShape, decoder_shape
from mmdist.models.llama_adapter_processor import LlamaAdapterProcessor
from mmdist.models.llama_adapter_vision import LlamaAdapterEncoder, encoder_activations
from mmdist.plan import Piece, Shard
from mmdist.tp import TP

KeysValues = tuple[torch.Tensor, torch.Tensor]


class LlamaAdapterConfig(PretrainedConfig):
    """What `weights_tools convert llama_adapter` writes; the defaults are those of the published 7B.

    query_len: prompts a picture becomes; query_layer: how many of the last layers look at them. v_*: of the blocks
    that read CLIP's tokens. lora_rank: of the low-rank additions to all linear layers, None without.
    """

    model_type = "llama_adapter"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(LlamaConfig),
        "vision_config": SubConfigSpec(CLIPVisionConfig),
    }

    text_config: dict | PretrainedConfig | None = None
    vision_config: dict | PretrainedConfig | None = None
    query_len: int = 10
    query_layer: int = 31
    v_embed_dim: int = 768
    v_intermediate_size: int = 3072
    v_depth: int = 8
    v_num_heads: int = 16
    lora_rank: int | None = None
    tie_word_embeddings: bool = False


class AdapterAttention(Attention):
    """Self-attention plus, per head and scaled by its gate, attention to the picture's prompts: two softmaxes."""

    def __init__(self, shape: DecoderShape, tp: TP, layer: int, *, query_len: int, with_lora: bool):
        heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
        super().__init__(shape.hidden_size, *heads, tp, layer=layer, bias=shape.attention_bias)
        self.adapter_query = nn.Parameter(torch.empty(query_len, shape.hidden_size))
        self.gate_piece = Piece(shape.num_heads)
        self.gate = nn.Parameter(torch.empty(1, self.heads[0], 1, 1))
        self.new_gate = nn.Parameter(torch.empty(1, 1, 1, 1)) if with_lora else None
        self.kernels = PLAIN

    def after_load(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def shards(self) -> dict[str, Shard]:
        return {"gate": Shard(1, (self.gate_piece,))}

    def keys_values(self, rows: torch.Tensor) -> KeysValues:
        """(..., query_len, hidden) of pictures -> keys and gated values, (..., this rank's heads, query_len, head_dim).

        By the weights alone, without norm, positions, bias or low-rank addition.
        """
        projected = self.qkv_proj.matmul(rows + self.adapter_query)
        _, k, v = projected.unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=-2)
        gate = self.gate.tanh() if self.new_gate is None else self.gate.tanh() * self.new_gate
        return k.transpose(-3, -2), v.transpose(-3, -2) * gate[0]

    def look(self, q: torch.Tensor, context: Context) -> torch.Tensor:
        """q (tokens, heads, head_dim) over each sequence's prompts -> the same shape."""
        out, first = [], 0
        kept = [memory[self.layer] for memory in context.memories]
        for length, group in groupby(zip(context.query_lens, kept, strict=True), key=lambda pair: pair[0]):
            k, v = (torch.stack(parts) for parts in zip(*(pair for _, pair in group), strict=True))
            last = first + len(k) * length
            rows = q[first:last].unflatten(0, (len(k), length))
            out.append(
                self.kernels.attention(rows, k.transpose(1, 2), v.transpose(1, 2), scale=self.scale).flatten(0, 1)
            )
            first = last
        return torch.cat(out)

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        q, k, v = context.cache.store(self.layer, self.qkv_proj(x), self.heads, context.rope)
        out = context.cache.attend(self.layer, q, k, v, scale=self.scale, window=self.window)
        return self.o_proj((out + self.look(q, context)).flatten(1))


class LlamaAdapterDecoder(Decoder):
    def __init__(self, config: Any, tp: TP):
        self.adapter = config
        super().__init__(config.text_config, tp)

    def build_layer(self, config: Any, tp: TP, layer: int) -> nn.Module:
        return build_layer(self.adapter, self.shape, tp, layer)


def build_layer(config: LlamaAdapterConfig, shape: DecoderShape, tp: TP, layer: int) -> DecoderLayer:
    """A layer of Llama; the last query_layer of them look at the picture."""
    built = DecoderLayer(shape, tp, layer)
    if layer >= shape.num_layers - config.query_layer:
        with_lora = config.lora_rank is not None
        built.self_attn = AdapterAttention(shape, tp, layer, query_len=config.query_len, with_lora=with_lora)
    if config.lora_rank is not None:
        add_lora(built.self_attn, config.lora_rank, tp)
        add_lora(built.mlp, config.lora_rank, tp)
    return built


class LlamaAdapter(MultimodalModel):
    config_class = LlamaAdapterConfig
    tower_name = "vision"

    def __init__(self, config: Any, tp: TP):
        super().__init__(config, tp)
        self.vision: nn.Module = LlamaAdapterEncoder(config)

    def build_decoder(self, config: Any, tp: TP) -> Decoder:
        return LlamaAdapterDecoder(config, tp)

    @classmethod
    def build_layer(cls, config: Any, tp: TP) -> nn.Module:
        shape = decoder_shape(config.text_config)
        return build_layer(config, shape, tp, shape.num_layers - 1)

    @classmethod
    def load_processor(cls, folder: Path, config: Any, options: ModelConfig) -> Processor:
        if options.chat_template is not None:
            raise UserError("model.chat_template: LLaMA-Adapter has one prompt, Alpaca's; leave it out")
        return LlamaAdapterProcessor(folder, config)

    @property
    def adapters(self) -> dict[int, AdapterAttention]:
        attentions = enumerate(layer.self_attn for layer in self.decoder.layers)
        return {number: attention for number, attention in attentions if isinstance(attention, AdapterAttention)}

    def memory_numbers(self) -> int:
        return 2 * len(self.adapters) * self.config.query_len * self.num_kv_heads * self.head_dim

    def vision_activations(self) -> int:
        return encoder_activations(self.config)

    def encode_images(self, vision: dict[str, torch.Tensor]) -> torch.Tensor:
        """pixel_values (1, 3, size, size) -> (query_len, hidden)."""
        return self.vision(vision["pixel_values"].to(self.dtype))[0]

    def remember(self, encoded: torch.Tensor, memory: Any) -> dict[int, KeysValues]:
        """By the number of the layer."""
        return {number: attention.keys_values(encoded) for number, attention in self.adapters.items()}


MODEL = LlamaAdapter
