"""What every family shares: a processor on rank 0, and a model whose layers are cut over the ranks.

MultimodalModel generates: a vision encoder on rank 0 and a decoder over all ranks. EncoderModel answers in one forward
pass. Both are built on meta; see mmdist.weights for the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn

from mmdist.config import ModelConfig
from mmdist.layers.embedding import ParallelLMHead
from mmdist.models.decoder import Decoder, DecoderLayer, Step, decoder_shape
from mmdist.tp import TP
from mmdist.weights import Renames


@dataclass
class Prompt:
    """One request as the model takes it.

    token_ids: image tokens already expanded. image_positions: where in token_ids the rows of encode_images go.
    vision: the tensors encode_images takes; empty without pictures. memory: for families whose layers look at the
    pictures, what every rank is told about them (plain data; None without pictures), and memory_pictures: how many.
    truncated: the text was longer than the model takes, and its end is left out. picture_hashes: of each picture, once
    a cache has asked (mmdist.engine.pictures).
    """

    token_ids: list[int]
    image_positions: list[int] = field(default_factory=list)
    vision: dict[str, torch.Tensor] = field(default_factory=dict)
    memory: Any = None
    memory_pictures: int = 0
    truncated: bool = False
    picture_hashes: list[bytes] = field(default_factory=list)


class Processor(ABC):
    """Rank 0's door between people and tokens; a family implements it with transformers' processor."""

    tokenizer: Any  # transformers', tokenizers' or sentencepiece's, with the names of tokens
    stop: Sequence[str] = ()  # texts that end this family's answers
    placeholder: str = ""  # what stands for a picture in raw text; empty where a text does not show its picture
    takes_video: bool = False  # prompt() then also has videos=, each a list of PIL frames
    # Tokens of single bytes, where a broken one among neighbours makes all of them unreadable (transformers' decode).
    joined: Set[int] = frozenset()
    single_turn: bool = False  # the family has no conversation: a chat then asks each question by itself

    @abstractmethod
    def prompt(self, *, images: Sequence[Any], messages: list[dict] | None = None, text: str | None = None) -> Prompt:
        """Chat messages (with image parts in place) or raw text, and their PIL pictures -> Prompt."""

    @abstractmethod
    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text, without special tokens or with their names."""


class Model(nn.Module, ABC):
    """What plan, weights and launcher need of any family."""

    config_class: ClassVar[Any]  # a transformers config
    renames: ClassVar[Renames] = {}
    ignored: ClassVar[Sequence[str]] = ()

    @classmethod
    @abstractmethod
    def num_heads(cls, config: Any) -> int:
        """Attention heads; no world size is larger."""

    @classmethod
    @abstractmethod
    def describe_layer(cls, config: Any) -> str:
        """In words, what has to divide into the ranks."""

    @classmethod
    @abstractmethod
    def build_layer(cls, config: Any, tp: TP) -> nn.Module:
        """One layer cut for `tp`; UserError when it cannot be."""

    @classmethod
    @abstractmethod
    def load_processor(cls, folder: Path, config: Any, options: ModelConfig) -> Processor:
        """The checkpoint's tokenizer, image processor and chat template."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @abstractmethod
    def numbers_reduced(self) -> int:
        """Numbers all-reduced for each token of a forward pass."""


class MultimodalModel(Model):
    """A vision encoder on rank 0 and a decoder cut over the ranks.

    tower_name: the module whose place a ready-made graph can take (mmdist.models.tower).
    """

    tower_name: ClassVar[str] = "vision.tower"

    def __init__(self, config: Any, tp: TP):
        super().__init__()
        self.config = config
        text = config.text_config
        self.decoder = self.build_decoder(config, tp)
        self.lm_head = ParallelLMHead(text.vocab_size, text.hidden_size, tp)
        if self.is_tied(config):
            self.lm_head.weight = self.decoder.embed_tokens.weight

    @classmethod
    def is_tied(cls, config: Any) -> bool:
        """True where the head's weight is the embedding's."""
        return config.tie_word_embeddings

    @classmethod
    def num_heads(cls, config: Any) -> int:
        return decoder_shape(config.text_config).num_heads

    @classmethod
    def describe_layer(cls, config: Any) -> str:
        shape = decoder_shape(config.text_config)
        heads = f"{shape.num_heads} attention heads, {shape.num_kv_heads} KV heads"
        return f"{heads} and intermediate_size {shape.intermediate_size}"

    @classmethod
    def build_layer(cls, config: Any, tp: TP) -> nn.Module:
        return DecoderLayer(decoder_shape(config.text_config), tp, 0)

    def build_decoder(self, config: Any, tp: TP) -> Decoder:
        return Decoder(config.text_config, tp)

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
    def num_cached_layers(self) -> int:
        """Layers that keep keys and values of the tokens."""
        return self.num_layers

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

    def numbers_reduced(self) -> int:
        """All-reduces of (tokens, hidden): the embedding, then two a layer."""
        return (1 + 2 * self.num_layers) * self.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.decoder.shape.vocab_size

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    @abstractmethod
    def vision_activations(self) -> int:
        """Numbers that live at once while rank 0 encodes pictures."""

    def memory_numbers(self) -> int:
        """Numbers that `remember` keeps of one picture on this rank."""
        return 0

    @abstractmethod
    def encode_images(self, vision: dict[str, torch.Tensor]) -> torch.Tensor:
        """Prompt.vision -> (rows, width): image tokens, or what `remember` takes; rank 0 only."""

    def split_pictures(self, vision: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Prompt.vision -> of each picture (or frame) alone all that its rows depend on."""
        return [dict(zip(vision, parts, strict=True)) for parts in zip(*vision.values(), strict=True)]

    def picture_rows(self, vision: dict[str, torch.Tensor], num_rows: int) -> list[int]:
        """How many of the `num_rows` rows that encode_images makes of Prompt.vision are each picture's."""
        count = len(next(iter(vision.values())))
        return [num_rows // count] * count

    def remember(self, encoded: torch.Tensor, memory: Any) -> Any:
        """encode_images' rows and Prompt.memory -> what the layers look at while the request runs; on every rank."""
        raise NotImplementedError(f"{type(self).__name__} puts pictures into its input; Prompt.memory must be None")

    def forward(self, step: Step) -> torch.Tensor:
        """-> (tokens, hidden), or step.rows of it; image_embeds replace the embeddings at image_rows."""
        embeds = self.decoder.embed_tokens(step.input_ids)
        if len(step.image_rows):
            embeds = embeds.index_copy(0, step.image_rows, step.image_embeds)
        return self.decoder(embeds, step)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, hidden) -> (rows, vocab), equal on every rank."""
        return self.lm_head(hidden)


class EncoderModel(Model):
    """Answers in one forward pass: rank 0 embeds the inputs and reads the result, the layers are cut over all ranks.

    A batch holds prompts of one kind (say pictures alone): a word of the family's own that says how its layers take it.
    """

    @property
    @abstractmethod
    def compares(self) -> bool:
        """True when the head gives features to compare pictures and texts by, False when it gives scores of answers."""

    @abstractmethod
    def activations(self, num_seqs: int) -> int:
        """Bytes of the largest tensors that live at once in a batch of `num_seqs` prompts."""

    @abstractmethod
    def kind(self, prompt: Prompt) -> str:
        """The kind of batch a prompt belongs into; UserError when this checkpoint has no use for it."""

    @abstractmethod
    def embed(self, prompts: Sequence[Prompt], kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        """-> (batch, tokens, hidden), and a (batch, tokens) bool mask on the CPU; rank 0 only."""

    @abstractmethod
    def forward(self, hidden: torch.Tensor, mask: torch.Tensor, kind: str) -> torch.Tensor:
        """(batch, tokens, hidden) -> the same, on every rank."""

    @abstractmethod
    def head(self, hidden: torch.Tensor, kind: str) -> torch.Tensor:
        """(batch, tokens, hidden) -> (batch, scores or features) in float32; rank 0 only."""

    @abstractmethod
    def compare(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """Features of both -> (images, texts) logits; rank 0 only."""
