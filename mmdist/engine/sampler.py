"""From scores to the next token, one request at a time, so that none depends on its neighbours; on rank 0 only.

Most requests need but a few of the likeliest tokens (one, or top_k), which the ranks find without gathering the logits.
Equal logits are taken in the order of their ids, so that the world size changes nothing.
"""

from __future__ import annotations

import math
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


def num_candidates(sequence: Sequence) -> int:
    """How many of the likeliest tokens are enough to choose the next from; 0: it takes the whole vocabulary."""
    params = sequence.request.params
    if params.logprobs is not None or sequence.processors.change(len(sequence.output_ids)):
        return 0
    if params.temperature == 0:
        return 1
    return params.top_k if 0 < params.top_k <= MAX_CANDIDATES else 0


def sample(scores: Scores, sequence: Sequence) -> int:
    """The next token id. The order of the steps is vLLM's."""
    params, logits, ids = sequence.request.params, scores.logits, scores.ids
    if ids is None:
        logits, ids = likeliest(sequence.processors.apply(logits, sequence.output_ids), params)
    if params.temperature == 0:
        return int(ids[0])
    return int(ids[torch.multinomial(probabilities(logits, params), 1, generator=sequence.generator)])


def likeliest(logits: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits and ids to choose from: the best, the top_k likeliest, or all."""
    count = 1 if params.temperature == 0 else params.top_k
    if not 0 < count < len(logits):
        return logits, torch.arange(len(logits))
    values, ids = plain.top_k(logits[None], count)
    return values[0], ids[0]


def probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """After temperature, min_p, top_p and typical_p, each of which takes tokens away."""
    logits = logits / params.temperature
    if params.min_p > 0:
        logits = logits.masked_fill(logits < logits.max() + math.log(params.min_p), -torch.inf)
    if params.top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        beyond = order[1:][before[1:] >= params.top_p]  # the likeliest stays, however small top_p is
        logits = logits.index_fill(0, beyond, -torch.inf)
    if params.typical_p < 1:
        logits = keep_typical(logits, params.typical_p)
    return logits.softmax(-1)


def keep_typical(logits: torch.Tensor, mass: float) -> torch.Tensor:
    """Locally typical sampling (arXiv:2202.00666): the tokens whose information is nearest to the entropy, as many as
    hold `mass` of the probability; the rest is -inf."""
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs * logprobs.exp()).nansum()
    distance = (entropy + logprobs).abs()
    ordered, order = distance.sort(stable=True)
    last = int((logprobs[order].exp().cumsum(-1) < mass).sum())
    return logits.masked_fill(distance > ordered[min(last, len(ordered) - 1)], -torch.inf)


def logprobs_entry(logits: torch.Tensor, token_id: int, count: int) -> dict:
    """The token's natural log probability over the whole vocabulary, before any sampling change, and the best ones."""
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(min(count, len(logprobs)))
    top = [{"token_id": int(i), "logprob": float(p)} for p, i in zip(best.values, best.indices, strict=True)]
    return {"token_id": token_id, "logprob": float(logprobs[token_id]), "top": top}
