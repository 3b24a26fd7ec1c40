"""Whether the server lives, is ready and can answer; what Prometheus reads."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from PIL import Image
from starlette.responses import JSONResponse, Response

from mmdist.config import SamplingParams
from mmdist.serving.errors import ServeError
from mmdist.serving.service import Service

ANSWER_S = 5  # that the ranks may take to say they are there
router = APIRouter(tags=["operations"])


async def find_service(request: Request) -> Service:
    return request.app.state.service


ServiceOf = Annotated[Service, Depends(find_service)]


@router.get("/health/live")
async def live() -> dict[str, str]:
    """The HTTP server answers."""
    return {"status": "ok"}


@router.get("/health/ready")
async def ready(service: ServiceOf) -> dict[str, str]:
    """Requests are taken: not while stopping, and not while the queue is full."""
    service.check_open()
    if service.is_full:
        raise ServeError(503, "the queue is full", retry_after=1)
    return {"status": "ok"}


@router.get("/health")
async def health(service: ServiceOf, probe: Annotated[bool, Query()] = False) -> dict[str, str]:
    """Every rank answers; with probe=true one token is generated as well."""
    await check_ranks(service)
    if probe:
        await generate_one(service)
    return {"status": "ok"}


@router.get("/metrics")
async def metrics(service: ServiceOf) -> Response:
    """In Prometheus' text format."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


async def check_ranks(service: Service) -> None:
    """ServeError 503 unless all ranks are there: asked one by one when idle; while a step is computed, which takes all
    of them, it is enough that none has ended."""
    service.check_open()
    engine_loop = service.engine_loop
    if engine_loop.step_began is not None:
        return
    answer = asyncio.wrap_future(engine_loop.call(engine_loop.engine.keep_alive))
    done, _ = await asyncio.wait([answer], timeout=ANSWER_S)
    service.check_open()
    if answer.cancelled() or (not done and engine_loop.step_began is None):
        raise ServeError(503, f"the ranks did not answer within {ANSWER_S} s")


async def generate_one(service: Service) -> None:
    """Of a question about a picture, which every family takes; a checkpoint for retrieval looks at the picture."""
    picture, name = Image.new("RGB", (16, 16)), f"probe {time.monotonic()}"
    if service.encoder is not None and service.encoder.model.compares:
        await service.compute(service.encoder.features([await service.prompt(images=[picture])]), name=name)
        return
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    prompt = await service.prompt(messages=[question], images=[picture])
    async for _, output in service.generate(prompt, SamplingParams(max_new_tokens=1), name=name):
        if output.finish_reason in ("error", "timeout"):
            raise ServeError(503, output.error or output.finish_reason)


def render_error(error: ServeError) -> Response:
    return JSONResponse({"error": error.message}, 400 if error.status == 422 else error.status)
