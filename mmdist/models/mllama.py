"""Llama-3.2-Vision (11B, 90B): a decoder with cross-attention layers that look at tiles of the pictures.

Checkpoints: Hugging Face folders. The pictures' states come to every rank once; each keeps the keys and values of its
own heads while the request runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers  # classes are looked up when used: importing them here would triple the start-up time
from torch import nn
from transformers.models.mllama import processing_mllama

from mmdist.config import ModelConfig
from mmdist.kernels.kernels import PLAIN, Kernels
from mmdist.layers.attention import Context, kv_copies
from mmdist.layers.linear import ColumnParallelLinear, RowParallelLinear
from mmdist.layers.mlp import GatedMLP
from mmdist.layers.norm import RMSNorm
from mmdist.models.base import MultimodalModel, Processor, Prompt
from mmdist.models.decoder import Decoder, DecoderLayer, DecoderShape
from mmdist.models.hub import IGNORED, HubProcessor
from mmdist.models.mllama_vision import MllamaEncoder
from mmdist.plan import Piece
from mmdist.tp import TP

# As the hub's files have them, and as transformers 5 names its parameters.
RENAMES = {
    "language_model.model.": "decoder.",
    "language_model.lm_head.": "lm_head.",
    "vision_model.": "vision.tower.model.",
    "multi_modal_projector.": "vision.projector.",
    "model.language_model.": "decoder.",
    "model.vision_model.": "vision.tower.model.",
    "model.multi_modal_projector.": "vision.projector.",
}


@dataclass(frozen=True)
class Seen:
    """Which tokens see a picture: positions in [start, stop) (None: to the end), and how many of its tiles."""

    start: int
    stop: int | None
    num_tiles: int


class MllamaProcessor(HubProcessor):
    def make_prompt(self, inputs: dict[str, Any]) -> Prompt:
        token_ids = inputs.pop("input_ids")
        if "pixel_values" not in inputs:
            return Prompt(token_ids)
        ranges = processing_mllama.get_cross_attention_token_mask(token_ids, self.processor.image_token_id)
        num_tiles = inputs["aspect_ratio_mask"][0].sum(-1).tolist()
        seen = [
            Seen(start, None if stop in (-1, len(token_ids)) else stop, tiles)
            for (start, stop), tiles in zip(ranges, num_tiles, strict=True)
        ]
        names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
        vision = {name: inputs[name][0] for name in names}
        return Prompt(token_ids, vision=vision, memory=seen, memory_pictures=len(seen))


@dataclass
class PictureMemory:
    """Of one request, per cross-attention layer: keys and values (pictures * tiles * patches, kv_heads, head_dim)."""

    keys_values: dict[int, tuple[torch.Tensor, torch.Tensor]]
    seen: Sequence[Seen]
    max_num_tiles: int

    def mask(self, positions: torch.Tensor) -> torch.Tensor:
        """(tokens,) positions -> (tokens, pictures * tiles) bool: the tiles each token sees."""
        tiles = torch.arange(self.max_num_tiles, device=positions.device)
        masks = []
        for picture in self.seen:
            sees = positions >= picture.start
            if picture.stop is not None:
                sees = sees & (positions < picture.stop)
            masks.append(sees[:, None] & (tiles < picture.num_tiles))
        return torch.cat(masks, dim=1)


class CrossAttention(nn.Module):
    """Queries of the text over keys and values of the pictures, cut by heads; no positions."""

    def __init__(self, shape: DecoderShape, tp: TP, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, shape.head_dim
        tp.divide(shape.num_heads, "num_attention_heads")
        copies = kv_copies(shape.num_kv_heads, tp)
        q = Piece(shape.num_heads * shape.head_dim)
        kv = [Piece(shape.num_kv_heads * shape.head_dim, name, copies) for name in ("k_proj", "v_proj")]
        self.q_proj = ColumnParallelLinear(shape.hidden_size, [q], tp)
        self.kv_proj = ColumnParallelLinear(shape.hidden_size, kv, tp)
        self.q_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps)
        self.k_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps)
        self.o_proj = RowParallelLinear(shape.num_heads * shape.head_dim, shape.hidden_size, tp)
        self.kernels = PLAIN

    def after_load(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def keys_values(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, hidden) of the pictures -> normed keys, and values, each (rows, this rank's KV heads, head_dim)."""
        k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.kv_proj(states).chunk(2, dim=-1))
        return self.k_norm(k), v

    def forward(self, x: torch.Tensor, lens: list[int], memories: list[PictureMemory], masks: list[torch.Tensor]):
        """(tokens, hidden) of sequences of `lens` tokens, each with its memory and mask -> (tokens, hidden)."""
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))
        out = []
        for rows, memory, mask in zip(q.split(lens), memories, masks, strict=True):
            k, v = memory.keys_values[self.layer]
            # A token that sees no picture attends to all of them (transformers 4.46.3); only its MLP is then dropped.
            mask = mask | ~mask.any(1, keepdim=True)
            mask = mask.repeat_interleave(len(k) // mask.shape[1], dim=1)
            out.append(self.kernels.masked_attention(rows, k, v, mask, scale=self.head_dim**-0.5))
        return self.o_proj(torch.cat(out).flatten(1))


class CrossAttentionLayer(nn.Module):
    def __init__(self, shape: DecoderShape, tp: TP, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.cross_attn = CrossAttention(shape, tp, layer)
        self.cross_attn_attn_gate = nn.Parameter(torch.empty(1))
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = GatedMLP(shape.hidden_size, shape.intermediate_size, shape.activation, tp)
        self.cross_attn_mlp_gate = nn.Parameter(torch.empty(1))

    def forward(self, x: torch.Tensor, context: Context, rows: torch.Tensor | None = None) -> torch.Tensor:
        """As DecoderLayer's. Sequences without pictures pass by."""
        x = self.look_around(x, context)
        return x if rows is None else x[rows]

    def look_around(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        lens = list(context.query_lens)
        parts = zip(x.split(lens), context.positions.split(lens), context.memories, strict=True)
        looking = [(rows, positions, memory) for rows, positions, memory in parts if memory is not None]
        if not looking:
            return x
        rows, positions, memories = (list(column) for column in zip(*looking, strict=True))
        masks = [memory.mask(some) for some, memory in zip(positions, memories, strict=True)]
        changed = iter(self.look(torch.cat(rows), memories, masks).split([len(some) for some in rows]))
        kept = zip(x.split(lens), context.memories, strict=True)
        return torch.cat([some if memory is None else next(changed) for some, memory in kept])

    def look(self, x: torch.Tensor, memories: list[PictureMemory], masks: list[torch.Tensor]) -> torch.Tensor:
        lens = [len(mask) for mask in masks]
        x = x + self.cross_attn_attn_gate.tanh() * self.cross_attn(self.input_layernorm(x), lens, memories, masks)
        sees = torch.cat([mask.any(1) for mask in masks])[:, None]
        return x + self.cross_attn_mlp_gate.tanh() * (sees * self.mlp(self.post_attention_layernorm(x)))


class MllamaDecoder(Decoder):
    extra_embeddings = 8  # <|image|> among them: it can be read, not written

    def build_layer(self, config: Any, tp: TP, layer: int) -> nn.Module:
        if layer in config.cross_attention_layers:
            return CrossAttentionLayer(self.shape, tp, layer)
        cached = layer - sum(cross < layer for cross in config.cross_attention_layers)
        return DecoderLayer(self.shape, tp, cached)


class Mllama(MultimodalModel):
    config_class = transformers.MllamaConfig
    renames = RENAMES
    ignored = IGNORED

    def __init__(self, config: Any, tp: TP):
        super().__init__(config, tp)
        self.vision = MllamaEncoder(config)

    def build_decoder(self, config: Any, tp: TP) -> Decoder:
        return MllamaDecoder(config.text_config, tp)

    @classmethod
    def is_tied(cls, config: Any) -> bool:
        return False  # the embedding has more rows than the head

    @classmethod
    def load_processor(cls, folder: Path, config: Any, options: ModelConfig) -> Processor:
        return MllamaProcessor(transformers.MllamaProcessor.from_pretrained(folder), folder, options)

    @property
    def cross_layers(self) -> dict[int, CrossAttentionLayer]:
        layers = enumerate(self.decoder.layers)
        return {number: layer for number, layer in layers if isinstance(layer, CrossAttentionLayer)}

    @property
    def first_layer(self) -> DecoderLayer:
        return next(layer for layer in self.decoder.layers if isinstance(layer, DecoderLayer))

    @property
    def num_cached_layers(self) -> int:
        return self.num_layers - len(self.cross_layers)

    def memory_numbers(self) -> int:
        rows = self.config.vision_config.max_num_tiles * self.vision.num_patches
        return 2 * len(self.cross_layers) * rows * self.num_kv_heads * self.head_dim

    def encode_images(self, vision: dict[str, torch.Tensor]) -> torch.Tensor:
        """pixel_values (pictures, tiles, 3, size, size), aspect_ratio_ids (pictures,), aspect_ratio_mask (pictures,
        tiles) -> (pictures * tiles * patches, hidden), unused tiles included."""
        names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
        return self.vision(*(vision[name] for name in names)).flatten(0, 2)

    def remember(self, encoded: torch.Tensor, memory: Any) -> PictureMemory:
        keys_values = {number: layer.cross_attn.keys_values(encoded) for number, layer in self.cross_layers.items()}
        return PictureMemory(keys_values, memory, self.config.vision_config.max_num_tiles)

    def vision_activations(self) -> int:
        return self.vision.activations()


MODEL = Mllama
