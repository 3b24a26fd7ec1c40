"""VLMo (base, base plus, large): question answering over a closed set of answers, and image-text retrieval.

Bao et al., arXiv:2111.02358; reference: microsoft/unilm, vlmo/modules/vlmo_module.py. Rank 0 embeds the inputs and
reads the result, the transformer is cut over the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig

from mmdist.config import ModelConfig, UserError
from mmdist.models.base import EncoderModel, Prompt
from mmdist.models.vlmo_blocks import BOTH, IMAGE, NORM_EPS, TEXT, Block, PositionBias
from mmdist.models.vlmo_processor import VlmoProcessor
from mmdist.tp import TP

BERT_NORM_EPS = 1e-12
FLOAT32 = 4


class VlmoConfig(PretrainedConfig):
    """What `weights_tools convert vlmo` writes. The defaults are VLMo base's, fine-tuned for VQAv2.

    head: vqa (num_answers classes) or retrieval. vlffn_start: the first block with one expert for text and picture
    (vqa only; retrieval keeps them apart throughout). max_text_len_of_initckpt: the text length that
    relative_position_bias tables were made for. Lengths in tokens, sizes in pixels.
    """

    model_type = "vlmo"

    head: str = "vqa"
    num_answers: int = 3129
    vocab_size: int = 30522
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    vlffn_start: int = 10
    image_size: int = 480
    patch_size: int = 16
    max_text_len: int = 40
    max_text_len_of_initckpt: int = 196
    relative_position_bias: bool = True
    absolute_positions: bool = False
    layer_scale: bool = True


class TextEmbeddings(nn.Module):
    """BERT's embeddings, positions included only in the variants that use them."""

    def __init__(self, config: Any):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(2, config.hidden_size)
        if config.absolute_positions:
            self.position_embeddings = nn.Embedding(config.max_text_len, config.hidden_size)
        self.absolute_positions = config.absolute_positions
        self.LayerNorm = nn.LayerNorm(config.hidden_size, BERT_NORM_EPS)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """(batch, tokens) -> (batch, tokens, hidden)."""
        x = self.word_embeddings(token_ids) + self.token_type_embeddings.weight[0]
        if self.absolute_positions:
            x = x + self.position_embeddings.weight[: token_ids.shape[1]]
        return self.LayerNorm(x)


class ImageEmbeddings(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        patches = (config.image_size // config.patch_size) ** 2
        self.proj = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        if config.absolute_positions:
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + patches, config.hidden_size))
        self.absolute_positions = config.absolute_positions

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, 3, size, size) -> (batch, 1 + patches, hidden), the class token first."""
        patches = self.proj(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(len(patches), -1, -1), patches), dim=1)
        return x + self.pos_embed if self.absolute_positions else x


class Embeddings(nn.Module):
    """Texts, pictures, or a text and a picture each, as one sequence of vectors; on rank 0 alone."""

    rank_zero_only = True

    def __init__(self, config: Any):
        super().__init__()
        self.text = TextEmbeddings(config)
        self.image = ImageEmbeddings(config)
        self.token_type_embeddings = nn.Embedding(2, config.hidden_size)

    def forward(self, token_ids: torch.Tensor | None, pixel_values: torch.Tensor | None) -> torch.Tensor:
        text_type, image_type = self.token_type_embeddings.weight
        parts = []
        if token_ids is not None:
            parts.append(self.text(token_ids) + text_type)
        if pixel_values is not None:
            parts.append(self.image(pixel_values) + image_type)
        return torch.cat(parts, dim=1)


class VqaHead(nn.Module):
    """The first token's state -> (batch, answers); on rank 0 alone, whose odd number of answers is not cut."""

    rank_zero_only = True

    def __init__(self, config: Any):
        super().__init__()
        width = config.hidden_size
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.pooler = nn.Linear(width, width)
        self.classifier = nn.Sequential(
            nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, config.num_answers)
        )

    def pool(self, hidden: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, hidden) -> (batch, hidden)."""
        return self.pooler(self.norm(hidden[:, 0])).tanh()

    def forward(self, hidden: torch.Tensor, kind: str) -> torch.Tensor:
        return self.classifier(self.pool(hidden)).float()


class RetrievalHead(nn.Module):
    """The first token's state -> (batch, hidden) of length one, comparable between texts and pictures."""

    rank_zero_only = True

    def __init__(self, config: Any):
        super().__init__()
        width = config.hidden_size
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.text_proj, self.image_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(()))

    def forward(self, hidden: torch.Tensor, kind: str) -> torch.Tensor:
        project = self.text_proj if kind == TEXT else self.image_proj
        return F.normalize(project(self.norm(hidden[:, 0])).float(), dim=-1)


HEADS: dict[str, Any] = {"vqa": VqaHead, "retrieval": RetrievalHead}


class Vlmo(EncoderModel):
    config_class = VlmoConfig

    def __init__(self, config: Any, tp: TP):
        super().__init__()
        self.config = config
        if config.head not in HEADS:
            raise UserError(f"head={config.head} in config.json: expected {', '.join(HEADS)}")
        self.embeddings = Embeddings(config)
        self.blocks = nn.ModuleList(Block(config, tp, layer) for layer in range(config.num_hidden_layers))
        self.position_bias = PositionBias(config, tp) if config.relative_position_bias else None
        self.output = HEADS[config.head](config)

    @classmethod
    def num_heads(cls, config: Any) -> int:
        return config.num_attention_heads

    @classmethod
    def describe_layer(cls, config: Any) -> str:
        return f"{config.num_attention_heads} attention heads and intermediate_size {config.intermediate_size}"

    @classmethod
    def build_layer(cls, config: Any, tp: TP) -> nn.Module:
        return Block(config, tp, 0)

    @classmethod
    def load_processor(cls, folder: Path, config: Any, options: ModelConfig) -> VlmoProcessor:
        return VlmoProcessor(folder, config)

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.token_type_embeddings.weight.dtype

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def compares(self) -> bool:
        return self.config.head == "retrieval"

    def numbers_reduced(self) -> int:
        return 2 * len(self.blocks) * self.hidden_size

    def activations(self, num_seqs: int) -> int:
        """Of a text and a picture each: the residual stream, and an attention or the experts' inner states."""
        config, block, itemsize = self.config, cast(Block, self.blocks[0]), self.dtype.itemsize
        num_tokens = config.max_text_len + 1 + (config.image_size // config.patch_size) ** 2
        pixels = num_seqs * 3 * config.image_size**2 * (FLOAT32 + itemsize)
        residual = 4 * num_seqs * num_tokens * config.hidden_size * itemsize
        qkv = num_seqs * num_tokens * sum(block.attn.qkv.local_sizes) * (2 * itemsize + FLOAT32)
        pairs = block.attn.num_heads * num_tokens**2  # scores and weights in float32, the weights again to be used
        attention = qkv + num_seqs * pairs * (2 * FLOAT32 + itemsize) + pairs * (FLOAT32 + itemsize)
        experts = 2 * num_seqs * num_tokens * block.inner_size * itemsize
        return max(pixels, residual + max(attention, experts))

    def kind(self, prompt: Prompt) -> str:
        """What is in a prompt: text, image, or vl for both."""
        has_image, has_text = bool(prompt.vision), bool(prompt.token_ids)
        if self.compares and has_image and has_text:
            raise UserError("VLMo for retrieval takes a picture or a text, not a question about a picture")
        if not self.compares and not (has_image and has_text):
            raise UserError("VLMo answers a question about a picture; give both")
        return BOTH if has_image and has_text else IMAGE if has_image else TEXT

    def embed(self, prompts: Sequence[Prompt], kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        device, dtype = self.embeddings.token_type_embeddings.weight.device, self.dtype
        token_ids = self.pad([prompt.token_ids for prompt in prompts]).to(device) if kind != IMAGE else None
        pixel_values = None
        if kind != TEXT:
            pixel_values = torch.cat([prompt.vision["pixel_values"] for prompt in prompts]).to(device, dtype)
        hidden = self.embeddings(token_ids, pixel_values)
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool)
        if kind != IMAGE:
            lens = torch.tensor([len(prompt.token_ids) for prompt in prompts])
            mask[:, : self.config.max_text_len] = torch.arange(self.config.max_text_len) < lens[:, None]
        return hidden, mask

    def pad(self, token_ids: list[list[int]]) -> torch.Tensor:
        """(texts, max_text_len); [PAD] is token 0 and masked."""
        rows = pad_sequence([torch.tensor(ids) for ids in token_ids], batch_first=True)
        return F.pad(rows, (0, self.config.max_text_len - rows.shape[1]))

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor, kind: str) -> torch.Tensor:
        for layer, block in enumerate(self.blocks):
            position_bias = None if self.position_bias is None else self.position_bias(layer, kind)
            hidden = block(hidden, mask, position_bias, kind)
        return hidden

    def head(self, hidden: torch.Tensor, kind: str) -> torch.Tensor:
        return self.output(hidden, kind)

    def compare(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        return self.output.logit_scale.float().exp() * images @ texts.T


MODEL = Vlmo
