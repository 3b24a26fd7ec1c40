"""From scores to the next token, one request at a time, so that none depends on its neighbours; on rank 0 only.

Most requests need but a few of the likeliest tokens (one, or top_k), which the ranks find without gathering the logits.
Equal logits are taken in the order of their ids, so that the world size changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmdist.config import SamplingParams
from mmdist.engine.request import Sequence
from mmdist.kernels import plain

MAX_CANDIDATES = 256  # beyond, gathering the logits costs less


@dataclass
class Scores:
    """What one token is chosen by: float32 logits on the CPU, of the whole vocabulary or (ids) the likeliest tokens,
    these by falling logit."""

    logits: torch.Tensor
    ids: torch.Tensor | None = None


def num_candidates(params: SamplingParams) -> int:
    """How many of the likeliest tokens are enough to choose from; 0: it takes the whole vocabulary."""
    if params.logprobs is not None or params.repetition_penalty != 1.0:
        return 0
    if params.temperature == 0:
        return 1
    return params.top_k if 0 < params.top_k <= MAX_CANDIDATES else 0


def sample(scores: Scores, sequence: Sequence) -> int:
    """The next token id. The order of the steps is vLLM's and transformers'."""
    params, logits, ids = sequence.request.params, scores.logits, scores.ids
    if params.repetition_penalty != 1.0:
        logits = penalize(logits, torch.tensor(sequence.tokens(0, sequence.num_tokens)), params.repetition_penalty)
    if ids is None:
        logits, ids = likeliest(logits, params)
    if params.temperature == 0:
        return int(ids[0])
    return int(ids[torch.multinomial(probabilities(logits, params), 1, generator=sequence.generator)])


def penalize(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """CTRL's repetition penalty (arXiv:1909.05858): positive logits divided, negative ones multiplied."""
    seen = seen[seen < len(logits)]  # <|image|> of some families can be read, not written
    values = logits[seen]
    return logits.index_put((seen,), torch.where(values > 0, values / penalty, values * penalty))


def likeliest(logits: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits and ids to choose from: the best, the top_k likeliest, or all."""
    count = 1 if params.temperature == 0 else params.top_k
    if not 0 < count < len(logits):
        return logits, torch.arange(len(logits))
    values, ids = plain.top_k(logits[None], count)
    return values[0], ids[0]


def probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """After temperature, and without all but the likeliest tokens that hold top_p of the probability."""
    logits = logits / params.temperature
    if params.top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.index_fill(0, order[before >= params.top_p], -torch.inf)
    return logits.softmax(-1)


def logprobs_entry(logits: torch.Tensor, token_id: int, count: int) -> dict:
    """The token's natural log probability over the whole vocabulary, before any sampling change, and the best ones."""
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(min(count, len(logprobs)))
    top = [{"token_id": int(i), "logprob": float(p)} for p, i in zip(best.values, best.indices, strict=True)]
    return {"token_id": token_id, "logprob": float(logprobs[token_id]), "top": top}
