"""Answers with what some formats report of them: each token's text, why they ended, how long it took."""

from __future__ import annotations

import time
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from mmdist.engine.request import Output
from mmdist.serving.streams import Outputs, check_ended_well, unless_gone


@dataclass
class Answer:
    """index: among several answers. token_ids, deltas, logprobs: one entry a token.

    In ms, from when this object was made, None until there is one: prefill_time to the first token, decode_time from
    the last but one to the last, decode_times the sum of those.
    """

    index: int = 0
    text: str = ""
    num_prompt_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    deltas: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any] | None] = field(default_factory=list)
    finish_reason: str | None = None
    prefill_time: float | None = None
    decode_time: float | None = None
    decode_times: float | None = None
    moment: float = field(default_factory=time.perf_counter)

    def push(self, output: Output) -> None:
        """One that was stopped has no token, and leaves what there is."""
        if output.finish_reason is not None:
            self.finish_reason = finish_reason(output)
        if output.token_id is None:
            return
        self.text, self.num_prompt_tokens = output.text, len(output.prompt_token_ids)
        self.token_ids.append(output.token_id)
        self.deltas.append(output.delta)
        self.logprobs.append(output.logprob)
        self._take_time()

    def _take_time(self) -> None:
        now = time.perf_counter()
        passed, self.moment = round((now - self.moment) * 1000, 2), now
        if self.prefill_time is None:
            self.prefill_time = passed
        else:
            self.decode_time = passed
            self.decode_times = round((self.decode_times or 0) + passed, 2)


def finish_reason(output: Output) -> str | None:
    """In TGI's words; abort for a request that was stopped."""
    if output.finish_reason == "stop":
        return "eos_token" if output.stop_reason is None else "stop_sequence"
    return output.finish_reason


async def collect_answers(request: Request, outputs: Outputs) -> list[Answer]:
    """All of them, whole; ServeError as streams.collect."""

    async def run() -> list[Answer]:
        answers: dict[int, Answer] = {}
        start = time.perf_counter()
        async with aclosing(outputs):
            async for index, output in outputs:
                check_ended_well(output)
                answers.setdefault(index, Answer(index, moment=start)).push(output)
        return [answers[index] for index in sorted(answers)]

    return await unless_gone(request, run())
