"""VLMo's multiway transformer, cut over the ranks: shared attention, and a feed-forward expert for each kind of token.

Bao et al., arXiv:2111.02358; the arithmetic is that of microsoft/unilm, vlmo/modules/multiway_transformer.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mmdist.kernels.kernels import Kernels
from mmdist.layers.linear import ColumnParallelLinear, RowParallelLinear
from mmdist.plan import Piece, Shard
from mmdist.tp import TP

NORM_EPS = 1e-6
# The experts that may work on a kind of input, by the names their weights have.
TEXT, IMAGE, BOTH = "text", "image", "vl"


class MultiwayAttention(nn.Module):
    """(batch, tokens, hidden) -> the same; queries and values have a bias, keys have none."""

    def __init__(self, hidden_size: int, num_heads: int, tp: TP):
        super().__init__()
        self.num_heads = tp.divide(num_heads, "num_attention_heads")
        self.scale = (hidden_size // num_heads) ** -0.5
        self.qkv = ColumnParallelLinear(hidden_size, [Piece(hidden_size)] * 3, tp)
        rows = self.qkv.local_sizes[0]
        self.q_bias, self.v_bias = nn.Parameter(torch.empty(rows)), nn.Parameter(torch.empty(rows))
        self.proj = RowParallelLinear(hidden_size, hidden_size, tp, bias=True)

    def shards(self) -> dict[str, Shard]:
        (piece, *_) = self.qkv.pieces
        return {"q_bias": Shard(0, (piece,)), "v_bias": Shard(0, (piece,))}

    def forward(self, x: torch.Tensor, mask: torch.Tensor, position_bias: torch.Tensor | None) -> torch.Tensor:
        """mask: (batch, tokens) of the keys; position_bias: (heads, tokens, tokens). Scores are float32."""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = self.qkv.matmul(x, bias).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = (q * self.scale).float() @ k.float().transpose(-2, -1)
        if position_bias is not None:
            scores += position_bias
        scores.masked_fill_(~mask[:, None, None], -torch.inf)
        mixed = scores.softmax(-1).to(v.dtype) @ v
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Expert(nn.Module):
    """fc2(gelu(fc1(x))), cut by its intermediate dimension."""

    def __init__(self, hidden_size: int, intermediate_size: int, tp: TP):
        super().__init__()
        self.fc1 = ColumnParallelLinear(hidden_size, [Piece(intermediate_size)], tp, bias=True)
        self.fc2 = RowParallelLinear(intermediate_size, hidden_size, tp, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention over all tokens, then the experts: text and picture apart, or from `vlffn_start` on one for both."""

    def __init__(self, config: Any, tp: TP, layer: int):
        super().__init__()
        hidden_size = config.hidden_size
        self.text_len = config.max_text_len
        self.inner_size = tp.divide(config.intermediate_size, "intermediate_size")
        self.fused = config.head == "vqa" and layer >= config.vlffn_start
        self.norm1 = nn.LayerNorm(hidden_size, NORM_EPS)
        self.attn = MultiwayAttention(hidden_size, config.num_attention_heads, tp)
        for name in ("vl",) if self.fused else ("text", "imag"):
            self.add_module(f"norm2_{name}", nn.LayerNorm(hidden_size, NORM_EPS))
            self.add_module(f"mlp_{name}", Expert(hidden_size, config.intermediate_size, tp))
        if config.layer_scale:
            self.gamma_1: nn.Parameter | float = nn.Parameter(torch.empty(hidden_size))
            self.gamma_2: nn.Parameter | float = nn.Parameter(torch.empty(hidden_size))
        else:
            self.gamma_1 = self.gamma_2 = 1.0

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor, position_bias: torch.Tensor | None, kind: str
    ) -> torch.Tensor:
        x = x + self.gamma_1 * self.attn(self.norm1(x), mask, position_bias)
        return torch.cat([self.feed_forward(part, name) for name, part in self.route(x, kind)], dim=1)

    def route(self, x: torch.Tensor, kind: str) -> list[tuple[str, torch.Tensor]]:
        """Which expert takes which tokens; with both kinds in the input, the text comes first."""
        if kind == BOTH and not self.fused:
            return [("text", x[:, : self.text_len]), ("imag", x[:, self.text_len :])]
        return [({TEXT: "text", IMAGE: "imag", BOTH: "vl"}[kind], x)]

    def feed_forward(self, x: torch.Tensor, name: str) -> torch.Tensor:
        norm, expert = self.get_submodule(f"norm2_{name}"), self.get_submodule(f"mlp_{name}")
        return x + self.gamma_2 * expert(norm(x))


class PositionBias(nn.Module):
    """What attention adds to its scores for where two tokens stand, in every layer and head.

    table: (distances, layers * heads), the columns of a layer side by side, so each layer's are cut by themselves.
    Its rows: the (2w - 1)^2 distances of a w x w window of patches, three for the class token, text to picture,
    picture to text, then the distances in a text of up to `max_text_len_of_initckpt` tokens and three for its [CLS].
    """

    def __init__(self, config: Any, tp: TP):
        super().__init__()
        self.window, self.text_len = config.image_size // config.patch_size, config.max_text_len
        self.initial_text_len = config.max_text_len_of_initckpt
        self.pieces = (Piece(config.num_attention_heads),) * config.num_hidden_layers
        columns = sum(piece.local_size(tp) for piece in self.pieces)
        self.table = nn.Parameter(torch.empty(self.num_distances(), columns))
        self.index: dict[str, torch.Tensor] = {}

    def shards(self) -> dict[str, Shard]:
        return {"table": Shard(1, self.pieces)}

    def num_distances(self) -> int:
        return self.num_image_distances() + 2 + 2 * self.initial_text_len

    def num_image_distances(self) -> int:
        return (2 * self.window - 1) ** 2 + 3

    def after_load(self, kernels: Kernels) -> None:
        """Compute the rows of the table for each pair of tokens; no checkpoint needs to store them."""
        text, image = self.text_index(), self.image_index()
        first = self.num_image_distances()
        text_to_image = torch.full((len(text), len(image)), first)
        both = torch.cat((torch.cat((text, text_to_image), 1), torch.cat((text_to_image.T + 1, image), 1)))
        self.index = {name: x.to(kernels.device) for name, x in ((TEXT, text), (IMAGE, image), (BOTH, both))}

    def image_index(self) -> torch.Tensor:
        """(1 + patches, 1 + patches); the class token is first."""
        w, last = self.window, self.num_image_distances() - 1
        rows, columns = (axis.flatten() for axis in torch.meshgrid(torch.arange(w), torch.arange(w), indexing="ij"))
        down, right = (axis[:, None] - axis + w - 1 for axis in (rows, columns))
        return with_first_token(down * (2 * w - 1) + right, last)

    def text_index(self) -> torch.Tensor:
        """(text_len, text_len); [CLS] is first."""
        places = torch.arange(self.text_len - 1)
        zero = self.num_image_distances() + self.initial_text_len  # the row of a token and itself
        return with_first_token(places - places[:, None] + zero, self.num_distances() - 1)

    def forward(self, layer: int, kind: str) -> torch.Tensor:
        """(heads, tokens, tokens) in float32; made anew for each layer, since all together they would fill a card."""
        table = self.table.unflatten(1, (len(self.pieces), -1))[:, layer]
        return F.embedding(self.index[kind], table).permute(2, 0, 1).float()


def with_first_token(pairs: torch.Tensor, last: int) -> torch.Tensor:
    """Put a token in front: from it to all is row last - 2 of the table, from all to it last - 1, to itself last."""
    index = F.pad(pairs, (1, 0, 1, 0), value=last - 2)
    index[:, 0] = last - 1
    index[0, 0] = last
    return index
