"""What every family shares: finding it by name, reading its config, the decoder with pictures put into its input."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn

from mmdist.config import ModelConfig, UserError
from mmdist.layers.attention import AttentionCache
from mmdist.layers.embedding import ParallelLMHead
from mmdist.models.decoder import Decoder, DecoderLayer, decoder_shape
from mmdist.tp import TP
from mmdist.weights import Renames


@dataclass
class Prompt:
    """One request as the model takes it.

    token_ids: image tokens already expanded. image_positions: where in token_ids the rows of encode_images go.
    vision: the tensors encode_images takes; empty without pictures.
    """

    token_ids: list[int]
    image_positions: list[int] = field(default_factory=list)
    vision: dict[str, torch.Tensor] = field(default_factory=dict)


class Processor(ABC):
    """Rank 0's door between people and tokens; a family implements it with transformers' processor."""

    @abstractmethod
    def prompt(self, *, images: Sequence[Any], messages: list[dict] | None = None, text: str | None = None) -> Prompt:
        """Chat messages (with image parts in place) or raw text, and their PIL pictures -> Prompt."""

    @abstractmethod
    def decode(self, token_ids: list[int]) -> str:
        """Text without special tokens."""


class MultimodalModel(nn.Module, ABC):
    """A vision encoder on rank 0 and a decoder cut over the ranks. Built on meta; see mmdist.weights for the rest."""

    config_class: ClassVar[Any]  # a transformers config
    renames: ClassVar[Renames]
    ignored: ClassVar[Sequence[str]] = ()

    def __init__(self, config: Any, tp: TP):
        super().__init__()
        self.config = config
        text = config.text_config
        self.decoder = Decoder(text, tp)
        self.lm_head = ParallelLMHead(text.vocab_size, text.hidden_size, tp)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.decoder.embed_tokens.weight

    @property
    def first_layer(self) -> DecoderLayer:
        return cast(DecoderLayer, self.decoder.layers[0])

    @property
    def hidden_size(self) -> int:
        return self.decoder.shape.hidden_size

    @property
    def num_layers(self) -> int:
        return self.decoder.shape.num_layers

    @property
    def head_dim(self) -> int:
        return self.decoder.shape.head_dim

    @property
    def num_kv_heads(self) -> int:
        """KV heads of this rank."""
        return self.first_layer.self_attn.num_kv_heads

    @property
    def max_model_len(self) -> int:
        return self.decoder.shape.max_model_len

    @property
    def num_all_reduces(self) -> int:
        """All-reduces of (tokens, hidden) in a forward pass: the embedding, then two a layer."""
        return 1 + 2 * self.num_layers

    @property
    def vocab_size(self) -> int:
        return self.decoder.shape.vocab_size

    @abstractmethod
    def vision_activations(self) -> int:
        """Numbers that live at once while rank 0 encodes pictures."""

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    @classmethod
    @abstractmethod
    def load_processor(cls, folder: Path, config: Any, options: ModelConfig) -> Processor:
        """The checkpoint's tokenizer, image processor and chat template."""

    @abstractmethod
    def encode_images(self, vision: dict[str, torch.Tensor]) -> torch.Tensor:
        """Prompt.vision -> (image tokens, hidden); rank 0 only."""

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        cache: AttentionCache,
        image_rows: torch.Tensor,
        image_embeds: torch.Tensor,
    ) -> torch.Tensor:
        """(tokens,) ids and positions -> (tokens, hidden); image_embeds replace the embeddings at image_rows."""
        embeds = self.decoder.embed_tokens(input_ids)
        if len(image_rows):
            embeds = embeds.index_copy(0, image_rows, image_embeds)
        return self.decoder(embeds, positions, cache)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, hidden) -> (rows, vocab), equal on every rank."""
        return self.lm_head(hidden)


def list_models() -> list[str]:
    """The families: the names of conf/model and mmdist/models."""
    own = {"__init__", "base", "decoder", "hub", "vision"}
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in own)


def find_model(name: str) -> type[MultimodalModel]:
    if name not in list_models() or find_spec(f"mmdist.models.{name}") is None:
        raise UserError(f"model={name}: no file mmdist/models/{name}.py; there are: {', '.join(list_models())}")
    return import_module(f"mmdist.models.{name}").MODEL


def load_model_config(family: type[MultimodalModel], folder: Path) -> Any:
    """config.json with its class defaults, refused when it is of another model type."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"checkpoint={folder}: no such folder; give a folder with config.json and *.safetensors")
    if not path.exists():
        raise UserError(f"checkpoint={folder}: no config.json in it; give a folder with config.json and *.safetensors")
    try:
        model_type = json.loads(path.read_text()).get("model_type")
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error}); copy it again") from error
    name = family.__module__.rpartition(".")[2]
    if model_type != family.config_class.model_type:
        raise UserError(
            f"{path}: model_type is {model_type}, model={name} wants "
            f"{family.config_class.model_type}; choose another model= ({', '.join(list_models())}) or checkpoint="
        )
    return family.config_class.from_pretrained(folder)


def build_model(family: type[MultimodalModel], config: Any, tp: TP, dtype: torch.dtype) -> MultimodalModel:
    """The model of one rank on `meta`: shapes, no memory."""
    check_world_size(config, tp.size)
    with torch.device("meta"):
        model = family(config, tp)
    return model.to(dtype).eval().requires_grad_(False)


def legal_world_sizes(config: Any) -> list[int]:
    """Every size that one decoder layer can be cut into, found by asking the layer."""
    shape = decoder_shape(config.text_config)
    return [size for size in range(1, shape.num_heads + 1) if fits(shape, size)]


def fits(shape: Any, size: int) -> bool:
    try:
        with torch.device("meta"):
            DecoderLayer(shape, TP(0, size), 0)
    except UserError:
        return False
    return True


def check_world_size(config: Any, size: int) -> None:
    shape = decoder_shape(config.text_config)
    if not fits(shape, size):
        legal = ", ".join(map(str, legal_world_sizes(config)))
        raise UserError(
            f"world_size={size}: {shape.num_heads} attention heads, {shape.num_kv_heads} KV heads and "
            f"intermediate_size {shape.intermediate_size} cannot be cut into {size} equal parts; legal sizes: {legal}"
        )
