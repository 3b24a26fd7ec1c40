"""OpenAI's format: /v1/chat/completions, /v1/completions and /v1/models, as OpenAI and vLLM answer them."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from mmdist.models.base import Prompt
from mmdist.serving.errors import ServeError
from mmdist.serving.formats.openai_answers import CompletionReply, Reply, render_error
from mmdist.serving.formats.openai_schema import ChatRequest, CompletionRequest, Sampling
from mmdist.serving.health import ServiceOf
from mmdist.serving.messages import read_messages
from mmdist.serving.service import Service
from mmdist.serving.streams import Outputs, begin, collect, merge, sse

__all__ = ["render_error", "router"]
router = APIRouter(prefix="/v1", tags=["OpenAI"])
STARTED = int(time.time())


@router.get("/models")
async def models(service: ServiceOf) -> dict[str, Any]:
    """The one model there is."""
    return {"object": "list", "data": [describe(service)]}


@router.get("/models/{model:path}")
async def model(model: str, service: ServiceOf) -> dict[str, Any]:
    check_model(service, model)
    return describe(service)


def describe(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": STARTED,
        "owned_by": "mmdist",
        "max_model_len": service.max_model_len,
    }


def check_model(service: Service, name: str | None) -> None:
    if name is not None and name != service.model_name:
        message = f"model {name} does not exist; this server has {service.model_name}"
        raise ServeError(404, message, param="model", code="model_not_found")


@router.post("/chat/completions", response_model=None)
async def chat_completions(body: ChatRequest, request: Request, service: ServiceOf) -> Response:
    """Answers to a conversation with pictures (and videos, where the family takes them)."""
    if service.encoder is not None and service.encoder.model.compares:
        raise ServeError(404, f"{service.model_name} compares pictures with texts; it is asked at /v1/retrieval")
    check_request(service, body, body.n)
    conversation = await read_messages(service, [message.turn for message in body.messages])
    prompt = await service.prompt(**conversation.arguments)
    name = body.request_id or request.state.request_id
    return await answer(request, body, generate(service, body, prompt, name), Reply(service, body, name))


@router.post("/completions", response_model=None)
async def completions(body: CompletionRequest, request: Request, service: ServiceOf) -> Response:
    """Continues texts, or tokens."""
    if service.encoder is not None:
        raise ServeError(404, f"{service.model_name} continues no text; ask it at /v1/chat/completions or /v1/vqa")
    check_request(service, body, len(body.prompt) * body.n)
    prompts = [await read_prompt(service, prompt) for prompt in body.prompt]
    echo = [echo_text(service, prompt) for prompt in body.prompt] if body.echo else []
    name = body.request_id or request.state.request_id
    outputs = merge([generate(service, body, prompt, name) for prompt in prompts], body.n)
    return await answer(request, body, outputs, CompletionReply(service, body, name, echo))


def check_request(service: Service, body: Sampling, num_answers: int) -> None:
    """What can be refused before pictures are read."""
    check_model(service, body.model)
    most = service.config.server.max_choices
    if num_answers > most:
        raise ServeError(422, f"{num_answers} answers; at most {most} to a request (server.max_choices)", param="n")
    service.check_room(num_answers)


async def read_prompt(service: Service, prompt: str | list[int]) -> Prompt:
    return await (service.prompt(text=prompt) if isinstance(prompt, str) else service.prompt(token_ids=prompt))


def echo_text(service: Service, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else service.processor.decode(prompt)


def generate(service: Service, body: Sampling, prompt: Prompt, name: str) -> Outputs:
    room = 1
    if service.encoder is None:
        room = find_room(service, prompt, "messages" if isinstance(body, ChatRequest) else "prompt")
    elif body.num_logprobs is not None or body.json_schema is not None:
        field = "logprobs" if body.num_logprobs is not None else "response_format"
        raise ServeError(422, f"{field}: {service.model_name} chooses one of the answers it knows", param=field)
    return service.generate(prompt, body.params(room), name=name, n=body.n)


def find_room(service: Service, prompt: Prompt, param: str) -> int:
    """Tokens that fit behind the prompt; ServeError where there is none."""
    length, most = len(prompt.token_ids), service.max_model_len
    assert most is not None, "engines that generate have a limit"
    if length >= most:
        pictures = len(prompt.image_positions)
        message = (
            f"the maximum context length is {most} tokens; the prompt alone has {length}, {pictures} of them of "
            "pictures (engine.max_model_len)"
        )
        raise ServeError(422, message, param=param, code="context_length_exceeded")
    return most - length


async def answer(request: Request, body: Sampling, outputs: Outputs, reply: Reply) -> Response:
    if body.stream:
        return sse(reply.events(await begin(request, outputs)))
    return await reply.whole_answer(partial(collect, request), outputs)
