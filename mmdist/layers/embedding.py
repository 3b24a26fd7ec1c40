"""The two ends of a decoder that grow with the vocabulary, cut by its rows and padded where it does not divide."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from mmdist.kernels.kernels import PLAIN, Kernels
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
    """(rows, hidden) -> (rows, vocab), equal on every rank; or, from local(), the likeliest tokens alone."""

    cut_dim = 0

    def __init__(self, vocab_size: int, hidden_size: int, tp: TP):
        super().__init__([vocab_piece(vocab_size, tp)], tp)
        self.vocab_size = vocab_size
        self.first, self.last = self.pieces[0].local_range(tp)
        self.weight = nn.Parameter(torch.empty(self.pieces[0].local_size(tp), hidden_size))
        self.kernels = PLAIN

    def after_load(self, kernels: Kernels) -> None:
        super().after_load(kernels)
        self.kernels = kernels

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.gather(self.local(hidden))

    def local(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, hidden) -> the logits of this rank's part of the vocabulary, padding included."""
        return self.matmul(hidden)

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        """-> (rows, vocab), equal on every rank"""
        return self.tp.all_gather(local)[:, : self.vocab_size]

    def top_k(self, local: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k (at most vocab) largest logits in float32 and their ids, (rows, k), by falling logit, equal ones by
        rising id; the same on every rank."""
        size, k = self.last - self.first, min(k, self.vocab_size)
        if self.tp.size == 1:
            return self.kernels.top_k(local[:, :size], k)
        found = torch.full((len(local), 2, k), -torch.inf, device=local.device)
        found[:, 1] = self.vocab_size  # where this rank has fewer than k tokens
        if mine := min(k, size):
            found[:, 0, :mine], ids = self.kernels.top_k(local[:, :size], mine)
            found[:, 1, :mine] = ids + self.first  # float32 is exact to 2^24
        values, ids = self.tp.all_gather(found.flatten(1)).unflatten(1, (-1, 2, k)).unbind(2)
        values, order = values.flatten(1).sort(descending=True, stable=True)  # the ranks are in the order of their ids
        return values[:, :k], ids.flatten(1).gather(1, order)[:, :k].long()
