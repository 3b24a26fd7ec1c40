"""What comes out of an engine. No torch: a program that asks and does not compute reads it, too (mmdist.llm)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Output:
    """One step's news of a request; `finish_reason` (stop, length, error, abort or timeout) is set with the last one.

    delta: text that is new. token_id, logprob: this step's token and, when asked for, its entry of logprobs.
    num_tokens: generated so far. prompt_token_ids, token_ids, text, logprobs (one entry a token): all so far; the lists
    are the request's own and go on growing. stop_reason: the stop text or stop token that ended it; None for
    end-of-sequence and length. num_cached_tokens: of the prompt, those that needed no prefill.
    """

    id: str
    delta: str
    text: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[dict] | None
    finish_reason: str | None
    error: str | None = None
    token_id: int | None = None
    logprob: dict | None = None
    num_tokens: int = 0
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0

    def line(self) -> dict[str, Any]:
        """The answer as a file of answers has it."""
        line = {
            "id": self.id,
            "text": self.text,
            "token_ids": self.token_ids,
            "prompt_token_ids": self.prompt_token_ids,
            "finish_reason": self.finish_reason,
        }
        optional = {"error": self.error, "logprobs": self.logprobs}
        return line | {name: value for name, value in optional.items() if value is not None}


def failed(request_id: str, prompt_token_ids: list[int], error: str) -> Output:
    """The one output of a request that could not be begun."""
    return Output(request_id, "", "", prompt_token_ids, [], None, "error", error)


@dataclass
class Answer(Output):
    """One of a closed set of answers. label: its class; top: the best ones, with their logits."""

    label: int = -1
    top: list[dict[str, Any]] = field(default_factory=list)
    truncated: bool = False

    def line(self) -> dict[str, Any]:
        line = {"id": self.id, "answer": self.text, "label": self.label, "top": self.top}
        return line | ({"truncated": True} if self.truncated else {})
