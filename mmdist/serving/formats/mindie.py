"""MindIE's native format: POST /infer with texts or parts, /infer_token with tokens, /v1/tokenizer counts them.

Source of the errors' shape: http_rest_resource of MindIE's server; a type it does not name is "validation".
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field, model_validator
from starlette.responses import JSONResponse, Response

from mmdist.engine.detokenizer import Detokenizer
from mmdist.engine.request import Output
from mmdist.models.base import Prompt
from mmdist.serving.errors import ServeError
from mmdist.serving.formats.answers import Answer, collect_answers
from mmdist.serving.formats.inputs import check_generates, read_prompt
from mmdist.serving.formats.parameters import MindieParameters
from mmdist.serving.health import ServiceOf
from mmdist.serving.messages import Body, Content
from mmdist.serving.service import Service
from mmdist.serving.streams import Outputs, begin, sse, until_error

router = APIRouter(tags=["MindIE"])
TokenIds = Annotated[list[int], Field(min_length=1)]


class InferTokenRequest(Body):
    input_id: TokenIds
    stream: bool = False
    parameters: MindieParameters = MindieParameters()


class InferRequest(Body):
    """One of inputs and input_id."""

    inputs: Content | None = None
    input_id: TokenIds | None = None
    stream: bool = False
    parameters: MindieParameters = MindieParameters()

    @model_validator(mode="after")
    def check_one(self) -> InferRequest:
        if (self.inputs is None) == (self.input_id is None):
            raise ValueError("expected one of inputs and input_id")
        return self


class TokenizerRequest(Body):
    inputs: Content


@router.post("/infer")
async def infer(request: Request, body: InferRequest, service: ServiceOf) -> Response:
    """An answer, or with stream its tokens as they come."""
    if body.inputs is None:
        check_generates(service, "input_id")
        prompt = await service.prompt(token_ids=body.input_id)
    else:
        prompt = await read_prompt(service, "inputs", body.inputs)
    return await respond(request, body, service, prompt)


@router.post("/infer_token")
async def infer_token(request: Request, body: InferTokenRequest, service: ServiceOf) -> Response:
    """/infer of tokens."""
    check_generates(service, "/infer_token")
    return await respond(request, body, service, await service.prompt(token_ids=body.input_id))


@router.post("/v1/tokenizer")
async def tokenizer(body: TokenizerRequest, service: ServiceOf) -> dict[str, Any]:
    """How many tokens a prompt has, and their texts; tokens that make up one character have one text."""
    check_generates(service, "/v1/tokenizer")
    prompt = await read_prompt(service, "inputs", body.inputs)
    count, most = len(prompt.token_ids), service.max_model_len
    if most is not None and count > most:
        raise ServeError(422, f"inputs has {count} tokens, at most {most} are served", param="inputs")
    pieces = Detokenizer(partial(service.processor.decode, skip_special_tokens=False), [])
    texts = []
    for token_id in prompt.token_ids:
        pieces.push(token_id)
        texts.append(pieces.take(finished=False))
    return {"token_number": count, "tokens": [text for text in texts if text]}


async def respond(
    request: Request, body: InferRequest | InferTokenRequest, service: Service, prompt: Prompt
) -> Response:
    wanted = body.parameters
    params = wanted.sampling()
    name = request.state.request_id
    outputs = service.generate(prompt, params, name=name, **wanted.turn)
    if body.stream:
        answer = Answer()
        return sse(events(wanted, answer, await begin(request, outputs)))
    (answer,) = await collect_answers(request, outputs)
    return JSONResponse(result(wanted, answer))


def result(wanted: MindieParameters, answer: Answer) -> dict[str, Any]:
    found: dict[str, Any] = {"generated_text": answer.text}
    if wanted.details:
        found["details"] = {
            "finish_reason": answer.finish_reason,
            "generated_tokens": len(answer.token_ids),
            "generated_token_ids": answer.token_ids,
            "seed": wanted.seed_of(0),
        }
    return found


async def events(wanted: MindieParameters, answer: Answer, outputs: Outputs) -> AsyncIterator[str]:
    """prefill_time with the first token, decode_time with the others, in ms; the whole text with the last."""
    async with aclosing(until_error(outputs)) as found:
        async for _, output in found:
            if isinstance(output, ServeError):
                yield event(error_body(output))
                return
            answer.push(output)
            yield event(step(wanted, answer, output))


def step(wanted: MindieParameters, answer: Answer, output: Output) -> dict[str, Any]:
    """The last has no text of its token: generated_text has it."""
    is_last = answer.finish_reason is not None
    times = {
        "prefill_time": answer.prefill_time if answer.decode_time is None else None,
        "decode_time": answer.decode_time,
    }
    token = {"id": [] if output.token_id is None else [output.token_id], "text": None if is_last else output.delta}
    return times | (result(wanted, answer) if is_last else {}) | {"token": token}


def event(found: dict[str, Any]) -> str:
    return f"data: {json.dumps(found, ensure_ascii=False)}\n\n"


STATUSES = {504: 424}
TYPES = {
    422: "Input Validation Error",
    424: "Generation Error",
    500: "Incomplete Generation",
    503: "Service Unavailable",
}


def error_body(error: ServeError) -> dict[str, str]:
    return {
        "error": error.message,
        "error_type": TYPES.get(STATUSES.get(error.status, error.status), "validation"),
    }


def render_error(error: ServeError) -> Response:
    return JSONResponse(error_body(error), STATUSES.get(error.status, error.status))
