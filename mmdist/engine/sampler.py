"""From logits to the next token, one request at a time, so that none depends on its neighbours; on rank 0 only."""

from __future__ import annotations

import torch

from mmdist.config import SamplingParams
from mmdist.engine.request import Sequence


def sample(logits: torch.Tensor, sequence: Sequence) -> int:
    """(vocab,) float32 on the CPU -> the next token id. The order of the steps is vLLM's and transformers'."""
    params = sequence.request.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sequence.tokens(0, sequence.num_tokens))
        logits = penalize(logits, seen, params.repetition_penalty)
    if params.temperature == 0:
        return int(logits.argmax())
    probabilities = warp(logits / params.temperature, params).softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=sequence.generator))


def penalize(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """CTRL's repetition penalty (arXiv:1909.05858): positive logits divided, negative ones multiplied."""
    values = logits[seen]
    return logits.index_put((seen,), torch.where(values > 0, values / penalty, values * penalty))


def warp(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Rule out all but the top_k likeliest, then all but the likeliest that hold top_p of the probability."""
    if 0 < params.top_k < len(logits):
        kth = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if params.top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.index_fill(0, order[before >= params.top_p], -torch.inf)
    return logits


def logprobs_entry(logits: torch.Tensor, token_id: int, count: int) -> dict:
    """The token's natural log probability over the whole vocabulary, before any sampling change, and the best ones."""
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(min(count, len(logprobs)))
    top = [{"token_id": int(i), "logprob": float(p)} for p, i in zip(best.values, best.indices, strict=True)]
    return {"token_id": token_id, "logprob": float(logprobs[token_id]), "top": top}
