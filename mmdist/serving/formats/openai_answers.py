"""Answers as OpenAI's clients read them: whole, or in chunks; with log probabilities and usage."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse, Response

from mmdist.engine.request import Output
from mmdist.models.base import Processor
from mmdist.serving import VERSION
from mmdist.serving.errors import ServeError
from mmdist.serving.formats.openai_schema import Sampling
from mmdist.serving.messages import token_text
from mmdist.serving.service import Service
from mmdist.serving.streams import Outputs, check_ended_well

STATUSES = {422: 400}
CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}
LEAST_LOGPROB = -9999.0  # JSON has no infinity
BROKEN = "\ufffd"


def fingerprint(service: Service) -> str:
    """Changes with what can change an answer: version, checkpoint, ranks, numbers' formats."""
    config = service.config
    settings = (config.model, config.checkpoint, config.world_size, config.dtype, config.quant, config.hardware)
    return f"mmdist-{VERSION}-{hashlib.sha256(repr(settings).encode()).hexdigest()[:8]}"


class Logprobs:
    """An answer's tokens, one after the other; special ones by name, also where the text leaves them out."""

    def __init__(self, processor: Processor, skip_special_tokens: bool, text_offset: int):
        self.processor, self.skip_special_tokens = processor, skip_special_tokens
        self.before: list[int] = []
        self.text_offset = text_offset

    def chat(self, entry: dict[str, Any]) -> dict[str, Any]:
        """{"token", "logprob", "bytes", "top_logprobs"} of the next token."""
        top = [self._one(other) for other in entry["top"]]
        chosen = self._one(entry)
        self.before.append(entry["token_id"])
        return chosen | {"top_logprobs": top}

    def _one(self, entry: dict[str, Any]) -> dict[str, Any]:
        """bytes: null for a part of a character, whose text is U+FFFD."""
        text = token_text(self.processor, self.before, entry["token_id"])
        encoded = None if BROKEN in text else list(text.encode())
        return {"token": text, "logprob": max(entry["logprob"], LEAST_LOGPROB), "bytes": encoded}

    def completion(self, entry: dict[str, Any]) -> dict[str, Any]:
        """The next token's place in each list of a completion's logprobs; the token is among its alternatives."""
        shown = token_text(self.processor, self.before, entry["token_id"], skip_special_tokens=self.skip_special_tokens)
        told = self.chat(entry)
        top = {told["token"]: told["logprob"]}
        for other in told["top_logprobs"]:
            top.setdefault(other["token"], other["logprob"])
        offset, self.text_offset = self.text_offset, self.text_offset + len(shown)
        return {
            "tokens": [told["token"]],
            "token_logprobs": [told["logprob"]],
            "top_logprobs": [top],
            "text_offset": [offset],
        }


@dataclass
class Usage:
    """Tokens so far. Answers to one prompt share it; those after the first find it in the cache, which is no saving."""

    n: int
    prompts: dict[int, Output] = field(default_factory=dict)  # the first output of each prompt
    generated: dict[int, int] = field(default_factory=dict)

    def take(self, index: int, output: Output) -> None:
        self.prompts.setdefault(index // self.n, output)
        self.generated[index] = max(output.num_tokens, self.generated.get(index, 0))

    def tell(self) -> dict[str, Any]:
        prompt = sum(len(output.prompt_token_ids) for output in self.prompts.values())
        completion = sum(self.generated.values())
        cached = sum(output.num_cached_tokens for output in self.prompts.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class Reply:
    """The answers to one request. n: to each prompt. echo: by prompt, what its answers begin with."""

    whole, part, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, service: Service, body: Sampling, request_id: str, echo: list[str] | None = None):
        self.service, self.body, self.echo = service, body, echo or []
        self.usage = Usage(body.n)
        self.logprobs: dict[int, Logprobs] = {}
        self.begun: set[int] = set()
        self.head = {
            "id": f"{self.prefix}-{request_id}",
            "object": self.part if body.stream else self.whole,
            "created": int(time.time()),
            "model": service.model_name,
            "system_fingerprint": fingerprint(service),
        }

    def echoed(self, index: int) -> str:
        return self.echo[index // self.body.n] if self.echo else ""

    def take(self, index: int, output: Output) -> Any:
        """Count an output; -> its logprobs, in the shape of a chunk's."""
        self.usage.take(index, output)
        if output.logprob is None:
            return None
        if index not in self.logprobs:
            offset = len(self.echoed(index))
            self.logprobs[index] = Logprobs(self.service.processor, self.body.skip_special_tokens, offset)
        return self.tell_logprob(self.logprobs[index], output.logprob)

    def tell_logprob(self, logprobs: Logprobs, entry: dict[str, Any]) -> dict[str, Any]:
        return {"content": [logprobs.chat(entry)], "refusal": None}

    def choice(self, index: int, output: Output, logprobs: Any) -> dict[str, Any]:
        message = {"role": "assistant", "content": output.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, **self.end(output)}

    def first_deltas(self, index: int) -> list[dict[str, Any]]:
        """What comes before an answer's first text."""
        return [self.delta(index, {"role": "assistant", "content": ""})]

    def text_delta(self, index: int, text: str) -> dict[str, Any]:
        return self.delta(index, {"content": text} if text else {})

    @staticmethod
    def delta(index: int, delta: dict[str, str]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def end(self, output: Output) -> dict[str, Any]:
        ids = {"token_ids": output.token_ids} if self.body.return_token_ids else {}
        return {"finish_reason": output.finish_reason, "stop_reason": output.stop_reason, **ids}

    async def whole_answer(self, collect: Callable[[Outputs], Any], outputs: Outputs) -> Response:
        """collect: outputs -> each answer's last one."""
        told: dict[int, list[Any]] = {}

        async def watch() -> AsyncGenerator[tuple[int, Output], None]:
            async with aclosing(outputs):
                async for index, output in outputs:
                    told.setdefault(index, []).append(self.take(index, output))
                    yield index, output

        last = await collect(watch())
        choices = [self.choice(index, output, join(told[index])) for index, output in enumerate(last)]
        ids = self.prompt_ids() if self.body.return_token_ids else {}
        return JSONResponse({**self.head, "choices": choices, "usage": self.usage.tell(), **ids})

    def prompt_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": self.usage.prompts[0].prompt_token_ids}

    async def events(self, outputs: Outputs) -> AsyncIterator[str]:
        """The answers as server-sent events; what fails on the way ends them with an error instead of [DONE]."""
        options = self.body.stream_options
        try:
            async with aclosing(outputs):
                async for index, output in outputs:
                    check_ended_well(output)
                    for choice in self.chunk_choices(index, output):
                        yield self.chunk([choice])
        except ServeError as error:
            yield event(error_body(error))
            return
        if options is not None and options.include_usage:
            yield event({**self.head, "choices": [], "usage": self.usage.tell()})
        yield "data: [DONE]\n\n"

    def chunk(self, choices: list[dict[str, Any]]) -> str:
        options = self.body.stream_options
        usage: dict[str, Any] = {}
        if options is not None and options.continuous_usage_stats:
            usage = {"usage": self.usage.tell()}
        elif options is not None and options.include_usage:
            usage = {"usage": None}
        return event({**self.head, "choices": choices, **usage})

    def chunk_choices(self, index: int, output: Output) -> list[dict[str, Any]]:
        """None where a token has brought no text that is certain."""
        logprobs = self.take(index, output)
        choices = [] if index in self.begun else self.first_deltas(index)
        self.begun.add(index)
        finished = output.finish_reason is not None
        if output.delta or logprobs is not None or finished or self.body.return_token_ids:
            choice = self.text_delta(index, output.delta) | {"logprobs": logprobs}
            choice |= self.end(output) if finished else {}
            if self.body.return_token_ids:
                choice["token_ids"] = [] if output.token_id is None else [output.token_id]
            choices.append(choice)
        return choices


class CompletionReply(Reply):
    whole, part, prefix = "text_completion", "text_completion", "cmpl"

    def tell_logprob(self, logprobs: Logprobs, entry: dict[str, Any]) -> dict[str, Any]:
        return logprobs.completion(entry)

    def choice(self, index: int, output: Output, logprobs: Any) -> dict[str, Any]:
        text = self.echoed(index) + output.text
        return {"index": index, "text": text, "logprobs": logprobs, **self.end(output)}

    def first_deltas(self, index: int) -> list[dict[str, Any]]:
        return [self.text_delta(index, self.echoed(index))] if self.echoed(index) else []

    def text_delta(self, index: int, text: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}


def join(told: list[Any]) -> Any:
    """The logprobs of an answer's chunks as one: their lists behind each other."""
    told = [one for one in told if one is not None]
    if not told:
        return None
    lists = [name for name, value in told[0].items() if value is not None]
    return told[0] | {name: [item for one in told for item in one[name]] for name in lists}


def event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def error_body(error: ServeError) -> dict[str, Any]:
    status = STATUSES.get(error.status, error.status)
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    code = error.code or CODES.get(status)
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": code}}


def render_error(error: ServeError) -> Response:
    return JSONResponse(error_body(error), STATUSES.get(error.status, error.status))
