"""The two ends of a decoder that grow with the vocabulary, cut by its rows and padded where it does not divide."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from mmdist.layers.linear import ParallelWeight
from mmdist.plan import Piece, Shard
from mmdist.tp import TP


def vocab_piece(vocab_size: int, tp: TP) -> Piece:
    return Piece(vocab_size, padded=-(-vocab_size // tp.size) * tp.size)


class VocabParallelEmbedding(nn.Module):
    """(tokens,) ids -> (tokens, hidden), equal on every rank."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: TP):
        super().__init__()
        self.tp = tp
        self.piece = vocab_piece(vocab_size, tp)
        self.first, self.last = self.piece.local_range(tp)
        self.weight = nn.Parameter(torch.empty(self.piece.local_size(tp), hidden_size))

    def shards(self) -> dict[str, Shard]:
        return {"weight": Shard(0, (self.piece,))}

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.tp.size == 1:
            return F.embedding(input_ids, self.weight)
        mine = (input_ids >= self.first) & (input_ids < self.last)
        rows = F.embedding(torch.where(mine, input_ids - self.first, 0), self.weight)
        return self.tp.all_reduce(rows * mine[:, None])


class ParallelLMHead(ParallelWeight):
    """(rows, hidden) -> (rows, vocab), equal on every rank."""

    cut_dim = 0

    def __init__(self, vocab_size: int, hidden_size: int, tp: TP):
        super().__init__([vocab_piece(vocab_size, tp)], tp)
        self.vocab_size = vocab_size
        self.weight = nn.Parameter(torch.empty(self.pieces[0].local_size(tp), hidden_size))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.tp.all_gather(self.matmul(hidden))[:, : self.vocab_size]
