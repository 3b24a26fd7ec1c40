"""Triton's format (KServe v2): health, metadata, text and tensors, with MindIE's getSlotCount and stopInfer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request
from starlette.responses import JSONResponse, Response

from mmdist.serving import VERSION
from mmdist.serving.errors import ServeError
from mmdist.serving.formats.answers import Answer, collect_answers
from mmdist.serving.formats.inputs import plain_text, read_prompt
from mmdist.serving.formats.triton_infer import (
    INPUTS,
    OUTPUTS,
    InferRequest,
    RequestName,
    TritonParameters,
    read_inputs,
    read_sampling,
    write_answer,
)
from mmdist.serving.formats.triton_tensors import JsonRoute, TensorRoute, read_tensors, write_tensors
from mmdist.serving.health import ServiceOf
from mmdist.serving.messages import Body, Content, as_list
from mmdist.serving.service import Service
from mmdist.serving.streams import Outputs, begin, sse, until_error

VERSIONS = ["1"]  # of the one model
router = APIRouter(tags=["Triton"])


async def check_model(model: Annotated[str, Path()], service: ServiceOf) -> None:
    if model != service.model_name:
        raise ServeError(404, f"model {model!r} is not served; {service.model_name} is")


async def check_version(version: Annotated[str, Path()]) -> None:
    if version not in VERSIONS:
        raise ServeError(404, f"version {version!r} is not served; {', '.join(VERSIONS)} is")


MODELS = {
    "/v2/models/{model}": [Depends(check_model)],
    "/v2/models/{model}/versions/{version}": [Depends(check_model), Depends(check_version)],
}


def at_model(method: str, path: str, route_class: type[JsonRoute] = JsonRoute) -> Callable:
    """A route below a model, with and without its version."""

    def register(function: Callable) -> Callable:
        for base, dependencies in MODELS.items():
            router.add_api_route(
                base + path, function, methods=[method], dependencies=dependencies, route_class_override=route_class
            )
        return function

    return register


class GenerateRequest(Body):
    """image: sources of the placeholders' pictures in a text."""

    id: RequestName | None = None
    text_input: Content
    image: str | list[str] | None = None
    parameters: TritonParameters = TritonParameters()


class StopRequest(Body):
    id: RequestName


@router.get("/v2/health/live")
async def live(service: ServiceOf) -> dict[str, bool]:
    """The server answers, busy or not."""
    check_sound(service)
    return {"live": True}


@router.get("/v2/health/ready")
async def ready(service: ServiceOf) -> dict[str, bool]:
    """Requests are taken: not while stopping, and not while the queue is full."""
    check_sound(service)
    check_idle(service)
    return {"ready": True}


@at_model("GET", "/ready")
async def model_ready(service: ServiceOf) -> dict[str, Any]:
    return {"name": service.model_name} | await ready(service)


def check_sound(service: Service) -> None:
    if service.problem is not None:
        raise ServeError(500, service.problem)


def check_idle(service: Service) -> None:
    """ServeError 503 where one more request is refused."""
    service.check_open()
    if service.is_full:
        raise ServeError(503, "the queue is full", retry_after=1)


@router.get("/v2")
async def server_metadata() -> dict[str, Any]:
    return {
        "name": "mmdist",
        "version": VERSION,
        "extensions": ["generate", "binary_tensor_data", "model_configuration"],
    }


@at_model("GET", "")
async def model_metadata(service: ServiceOf) -> dict[str, Any]:
    """Inputs and outputs of /infer."""
    return {
        "name": service.model_name,
        "versions": VERSIONS,
        "platform": "mmdist",
        "inputs": [{"name": name, "datatype": kind, "shape": [-1]} for name, kind in INPUTS.items()],
        "outputs": [{"name": name, "datatype": kind, "shape": [-1]} for name, kind in OUTPUTS.items()],
    }


@at_model("GET", "/config")
async def model_config(service: ServiceOf) -> dict[str, Any]:
    """Triton's model configuration, as far as there is one, with MindIE's names for the limits."""

    def described(tensors: dict[str, str]) -> list[dict[str, Any]]:
        return [
            {"name": name, "data_type": f"TYPE_{kind.replace('BYTES', 'STRING')}", "dims": [-1]}
            for name, kind in tensors.items()
        ]

    return {
        "name": service.model_name,
        "platform": "mmdist",
        "backend": "mmdist",
        "max_batch_size": 0,
        "input": described(INPUTS),
        "output": described(OUTPUTS),
        "maxSeqLen": service.max_model_len,
        "maxBatchSize": service.config.engine.max_num_seqs,
        "worldSize": service.engine_loop.engine.tp.size,
    }


@at_model("GET", "/getSlotCount")
async def slot_count(service: ServiceOf) -> dict[str, int]:
    """Requests that are computed at once, and how many more of them there could be."""
    total = service.config.engine.max_num_seqs
    return {"total_slots": total, "free_slots": max(0, total - service.num_active)}


@at_model("POST", "/stopInfer")
async def stop(body: StopRequest, service: ServiceOf) -> dict[str, str]:
    """Ends a request by its id: it answers with what there is, and finish_reason abort."""
    if not service.cancel(body.id):
        raise ServeError(404, f"no request {body.id!r} is being answered", param="id")
    return {"id": body.id}


@at_model("POST", "/infer", TensorRoute)
async def infer(request: Request, body: InferRequest, service: ServiceOf) -> Response:
    """Tokens or a text in, tokens or a text out."""
    body.check()
    tensors = read_tensors(body.inputs, request.state.tensors)
    params = read_sampling(body.parameters, tensors)
    prompt = await read_inputs(service, tensors)
    name = body.id or request.state.request_id
    outputs = service.generate(prompt, params, name=name, **body.parameters.turn)
    (answer,) = await collect_answers(request, outputs)
    wanted, found = body.binary_outputs(), write_answer(body.parameters, tensors, answer)
    about = {"id": name, "model_name": service.model_name, "model_version": find_version(request)}
    binary = {output for output, is_binary in wanted.items() if is_binary}
    return write_tensors(about, {output: found[output] for output in wanted}, binary)


@at_model("POST", "/generate")
async def generate(request: Request, body: GenerateRequest, service: ServiceOf) -> Response:
    """A text or parts in, a text out."""
    if body.parameters.stream:
        raise ServeError(422, "parameters.stream: ask /generate_stream", param="parameters.stream")
    reply, outputs = await start(request, body, service)
    (answer,) = await collect_answers(request, outputs)
    return JSONResponse(reply | {"text_output": prefix(body) + answer.text} | details(body, answer))


@at_model("POST", "/generate_stream")
async def generate_stream(request: Request, body: GenerateRequest, service: ServiceOf) -> Response:
    """One event a token, with its text."""
    reply, outputs = await start(request, body, service)
    answer = Answer()
    return sse(events(body, reply, answer, await begin(request, outputs)))


async def start(request: Request, body: GenerateRequest, service: Service) -> tuple[dict[str, Any], Outputs]:
    """-> what all replies begin with, and the outputs."""
    params = body.parameters.triton_sampling()
    prompt = await read_prompt(service, "text_input", body.text_input, as_list(body.image))
    name = body.id or request.state.request_id
    about = {"id": name, "model_name": service.model_name, "model_version": find_version(request)}
    return about, service.generate(prompt, params, name=name, **body.parameters.turn)


def find_version(request: Request) -> str | None:
    """The one that the path has."""
    return request.path_params.get("version")


def prefix(body: GenerateRequest) -> str:
    return "" if body.parameters.exclude_input_in_output else plain_text(body.text_input)


def details(body: GenerateRequest, answer: Answer) -> dict[str, Any]:
    """Costs in ms. How long a request waited is not measured by itself: first_token_cost has it."""
    if not body.parameters.details:
        return {}
    found = {
        "finish_reason": answer.finish_reason,
        "generated_tokens": len(answer.token_ids),
        "first_token_cost": answer.prefill_time,
        "decode_cost": answer.decode_times,
        "batch_size": 1,
        "queue_wait_time": None,
    }
    return {"details": found}


async def events(body: GenerateRequest, reply: dict[str, Any], answer: Answer, outputs: Outputs) -> AsyncIterator[str]:
    async with aclosing(until_error(outputs)) as found:
        async for _, output in found:
            if isinstance(output, ServeError):
                yield event({"error": output.message})
                return
            text = output.delta if answer.token_ids else prefix(body) + output.delta
            answer.push(output)
            times = {"decode_time": answer.decode_time}
            times["prefill_time"] = answer.prefill_time if answer.decode_time is None else None
            yield event(reply | {"text_output": text} | details(body, answer) | times)


def event(found: dict[str, Any]) -> str:
    return f"data:{json.dumps(found, ensure_ascii=False)}\n\n"


def render_error(error: ServeError) -> Response:
    return JSONResponse({"error": error.message}, 400 if error.status == 422 else error.status)
