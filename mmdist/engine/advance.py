"""One more token of an answer: chosen, put into words, and whether it is the last."""

from __future__ import annotations

from collections.abc import Set

from mmdist.engine.request import Output, Sequence
from mmdist.engine.sampler import Scores, logprobs_entry, sample
from mmdist.spans import Spans


def advance(sequence: Sequence, scores: Scores, eos_token_ids: Set[int], spans: Spans) -> Output:
    """Sample a sequence's next token and say what is new."""
    params, grammar = sequence.request.params, sequence.grammar
    with spans("sample"):
        token_id = sample(scores, sequence)
        if grammar is not None:
            grammar.accept(token_id)
    entry = None if params.logprobs is None else logprobs_entry(scores.logits, token_id, params.logprobs)
    if entry is not None:
        sequence.logprobs.append(entry)
    sequence.output_ids.append(token_id)
    with spans("detokenise"):
        reason, stop_reason = find_end(sequence, token_id, eos_token_ids)
        delta = sequence.detokenizer.take(finished=reason is not None)
    return Output(
        id=sequence.request.id,
        delta=delta,
        text=sequence.detokenizer.text,
        prompt_token_ids=sequence.request.prompt.token_ids,
        token_ids=sequence.output_ids,
        logprobs=None if entry is None else sequence.logprobs,
        finish_reason=reason,
        error=None if grammar is None else grammar.error,
        token_id=token_id,
        logprob=entry,
        num_tokens=len(sequence.output_ids),
        stop_reason=stop_reason,
        num_cached_tokens=sequence.num_cached_tokens or 0,
    )


def find_end(sequence: Sequence, token_id: int, eos_token_ids: Set[int]) -> tuple[str | None, str | int | None]:
    """finish_reason and stop_reason; the text of an end-of-sequence or stop token is left out, unless asked for."""
    detokenizer, grammar = sequence.detokenizer, sequence.grammar
    if grammar is not None and grammar.error is not None:
        return "error", None
    ended = token_id in sequence.end_ids
    complete = grammar is not None and grammar.complete
    full = sequence.num_tokens >= sequence.max_tokens
    has_text = not ended or sequence.request.params.include_stop_str_in_output
    stopped = has_text and detokenizer.push(token_id)
    if not stopped and (ended or complete or full):
        stopped = detokenizer.finish()
    if stopped:
        return "stop", detokenizer.stop_reason
    if ended or complete:
        return "stop", token_id if ended and token_id not in eos_token_ids else None
    return "length" if full else None, None
