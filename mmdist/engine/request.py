"""What goes into the engine and what comes out."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

import torch

from mmdist.config import SamplingParams
from mmdist.engine.detokenizer import Detokenizer
from mmdist.models.base import Prompt


@dataclass
class Request:
    id: str
    prompt: Prompt
    params: SamplingParams


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


@dataclass(eq=False)
class Sequence:
    """A request on its way through the engine; on rank 0 only."""

    request: Request
    detokenizer: Detokenizer
    max_tokens: int  # of prompt and answer together
    generator: torch.Generator = field(init=False)
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[dict] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0  # tokens whose keys and values are in the cache
    image_embeds: torch.Tensor | None = None
    remembered: bool = False  # the ranks hold what its layers look at

    def __post_init__(self) -> None:
        seed = self.request.params.seed
        self.generator = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt.token_ids)

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + len(self.output_ids)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Prompt and answer as one list, cut to [start, stop)."""
        split = self.num_prompt_tokens
        return self.request.prompt.token_ids[start:stop] + self.output_ids[max(start - split, 0) : max(stop - split, 0)]
