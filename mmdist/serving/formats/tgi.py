"""Hugging Face TGI's format: POST /generate, /generate_stream and /, GET /info; with MindIE's parts as inputs.

/generate is vLLM's too: a body with `prompt` is its.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import Discriminator, Tag
from starlette.responses import JSONResponse, Response

from mmdist.engine.request import Output
from mmdist.models.base import Prompt
from mmdist.serving import VERSION
from mmdist.serving.errors import ServeError
from mmdist.serving.formats import vllm
from mmdist.serving.formats.answers import Answer, collect_answers, finish_reason
from mmdist.serving.formats.inputs import check_generates, plain_text, read_markdown_prompt, truncate
from mmdist.serving.formats.tgi_body import MAX_STOP, CompatRequest, TgiRequest
from mmdist.serving.health import ServiceOf
from mmdist.serving.service import Service
from mmdist.serving.streams import Outputs, begin, sse, until_error

router = APIRouter(tags=["TGI"])


def tag_request(body: Any) -> str:
    return "vLLM's" if isinstance(body, dict) and "prompt" in body else "TGI's"


GenerateRequest = Annotated[
    Annotated[vllm.VllmRequest, Tag("vLLM's")] | Annotated[TgiRequest, Tag("TGI's")], Discriminator(tag_request)
]


async def choose_format(request: Request) -> None:
    """So that also what is wrong with the body is said as vLLM's clients expect it."""
    with suppress(ValueError, RecursionError):  # no JSON: FastAPI says so
        if tag_request(await request.json()) == "vLLM's":
            request.state.render_error = vllm.render_error


@router.post("/generate", dependencies=[Depends(choose_format)])
async def generate(request: Request, body: GenerateRequest, service: ServiceOf) -> Response:
    """TGI's with `inputs`, vLLM's with `prompt`."""
    if isinstance(body, vllm.VllmRequest):
        return await vllm.generate(request, body, service)
    return JSONResponse(await answer(request, body, service))


@router.post("/generate_stream")
async def generate_stream(request: Request, body: TgiRequest, service: ServiceOf) -> Response:
    """One event a token; the last has generated_text, and details where they are asked for."""
    _, outputs = await start(request, body, service, stream=True)
    answer = Answer()
    return sse(events(body, service, answer, await begin(request, outputs)))


@router.post("/")
async def compat(request: Request, body: CompatRequest, service: ServiceOf) -> Response:
    """/generate_stream with stream, else /generate, whose answer comes in a list."""
    if body.stream:
        return await generate_stream(request, body, service)
    return JSONResponse([await answer(request, body, service)])


@router.get("/info")
async def info(service: ServiceOf) -> dict[str, Any]:
    """What is served, and its limits."""
    engine, server = service.engine_loop.engine, service.config.server
    model = {
        "model_id": service.model_name,
        "model_sha": None,
        "model_dtype": str(engine.model.dtype),
        "model_device_type": engine.device.type,
        "model_pipeline_tag": "image-text-to-text",
        "max_total_tokens": service.max_model_len,
    }
    return model | {
        "models": [model],
        "max_input_length": None if service.max_model_len is None else service.max_model_len - 1,
        "max_batch_total_tokens": service.config.engine.max_num_batched_tokens,
        "max_best_of": server.max_choices,
        "max_concurrent_requests": service.capacity,
        "max_stop_sequences": MAX_STOP,
        "max_waiting_tokens": 0,
        "waiting_served_ratio": 0.0,
        "validation_workers": 1,
        "version": VERSION,
        "sha": None,
        "docker_label": None,
    }


async def start(request: Request, body: TgiRequest, service: Service, *, stream: bool) -> tuple[Prompt, Outputs]:
    """ServeError 422 and what Service raises."""
    wanted = body.parameters
    wanted.check(service, stream=stream)
    for field in ("decoder_input_details", "top_n_tokens"):
        if getattr(wanted, field):
            check_generates(service, f"parameters.{field}")
    params = wanted.tgi_sampling(needs_logprobs=wanted.details or stream)
    wanted.seed = params.seed
    prompt = await read_markdown_prompt(service, "inputs", body.inputs)
    if wanted.truncate is not None:
        prompt = await truncate(service, prompt, wanted.truncate, "parameters.truncate")
    name = request.state.request_id
    return prompt, service.generate(prompt, params, name=name, n=wanted.best_of)


async def answer(request: Request, body: TgiRequest, service: Service) -> dict[str, Any]:
    prompt, outputs = await start(request, body, service, stream=False)
    answers = await collect_answers(request, outputs)
    best, *others = sorted(answers, key=mean_logprob, reverse=True)
    found = {"generated_text": full_text(body, best.text)}
    if not body.parameters.details:
        return found
    details = describe(service, body, prompt, best)
    if others:
        sequences = [
            {"generated_text": full_text(body, other.text)} | describe(service, body, prompt, other) for other in others
        ]
        details["best_of_sequences"] = sequences
    return found | {"details": details}


def mean_logprob(answer: Answer) -> float:
    """What best_of chooses by."""
    return sum(entry["logprob"] for entry in answer.logprobs if entry is not None) / max(len(answer.logprobs), 1)


def full_text(body: TgiRequest, text: str) -> str:
    return plain_text(body.inputs) + text if body.parameters.return_full_text else text


def describe(service: Service, body: TgiRequest, prompt: Prompt, answer: Answer) -> dict[str, Any]:
    """details of an answer that came as a whole. prefill: the prompt's tokens; their log probabilities are not kept."""
    found = summary(body, answer)
    ids = prompt.token_ids if body.parameters.decoder_input_details else []
    found["prefill"] = [{"id": i, "text": token_name(service, i), "logprob": None} for i in ids]
    steps = list(zip(answer.token_ids, answer.deltas, answer.logprobs, strict=True))
    found["tokens"] = [token(service, i, delta, entry) for i, delta, entry in steps]
    if body.parameters.top_n_tokens:
        found["top_tokens"] = [top_tokens(service, entry) for _, _, entry in steps]
    return found


def summary(body: TgiRequest, answer: Answer) -> dict[str, Any]:
    return {
        "finish_reason": answer.finish_reason,
        "generated_tokens": len(answer.token_ids),
        "seed": body.parameters.seed_of(answer.index),
        "prompt_tokens": answer.num_prompt_tokens,
    }


def token(service: Service, token_id: int, delta: str, entry: dict[str, Any] | None) -> dict[str, Any]:
    """The texts of an answer's tokens join to its text; special ones have their names, which are not part of it."""
    logprob = None if entry is None else entry["logprob"]
    special = not delta and is_special(service, token_id)
    return {
        "id": token_id,
        "text": token_name(service, token_id) if special else delta,
        "logprob": logprob,
        "special": special,
    }


def token_name(service: Service, token_id: int) -> str:
    return service.processor.decode([token_id], skip_special_tokens=False)


def is_special(service: Service, token_id: int) -> bool:
    return not service.processor.decode([token_id]) and bool(token_name(service, token_id))


def top_tokens(service: Service, entry: dict[str, Any] | None) -> list[dict[str, Any]]:
    return [
        {
            "id": one["token_id"],
            "text": token_name(service, one["token_id"]),
            "logprob": one["logprob"],
            "special": is_special(service, one["token_id"]),
        }
        for one in (entry or {}).get("top", [])
    ]


async def events(body: TgiRequest, service: Service, answer: Answer, outputs: Outputs) -> AsyncIterator[str]:
    async with aclosing(until_error(outputs)) as found:
        async for _, output in found:
            if isinstance(output, ServeError):
                yield event(error_body(output))
                return
            answer.push(output)
            yield event(step(body, service, answer, output))


def step(body: TgiRequest, service: Service, answer: Answer, output: Output) -> dict[str, Any]:
    """index counts from 1. A request that was stopped ends without a token."""
    token_id = output.token_id
    found: dict[str, Any] = {
        "index": len(answer.token_ids),
        "token": None if token_id is None else token(service, token_id, output.delta, output.logprob),
        "generated_text": None,
        "details": None,
    }
    if body.parameters.top_n_tokens:
        found["top_tokens"] = top_tokens(service, output.logprob)
    if finish_reason(output) is not None:
        found["generated_text"] = full_text(body, answer.text)
        if body.parameters.details:
            found["details"] = summary(body, answer) | {"input_length": answer.num_prompt_tokens}
    return found


def event(found: dict[str, Any]) -> str:
    return f"data:{json.dumps(found, ensure_ascii=False)}\n\n"


STATUSES = {400: 422, 504: 424}  # TGI's own for what others number otherwise
TYPES = {422: "validation", 424: "generation", 429: "overloaded", 500: "incomplete_generation", 503: "unavailable"}


def error_body(error: ServeError) -> dict[str, str]:
    status = STATUSES.get(error.status, error.status)
    message = f"Input validation error: {error.message}" if status == 422 else error.message
    return {"error": message, "error_type": TYPES.get(status, "validation")}


def render_error(error: ServeError) -> Response:
    return JSONResponse(error_body(error), STATUSES.get(error.status, error.status))
