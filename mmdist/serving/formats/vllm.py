"""The format of vLLM's demo server (vllm.entrypoints.api_server): POST /generate with `prompt`.

The route is tgi.py's, as TGI has the same path. Errors have MindIE's shape: vLLM's own server has none.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import Request
from pydantic import Field
from starlette.responses import JSONResponse, Response, StreamingResponse

from mmdist.config import SamplingParams
from mmdist.serving.errors import ServeError
from mmdist.serving.formats import mindie
from mmdist.serving.formats.inputs import plain_text, read_prompt, truncate
from mmdist.serving.messages import Body, Content, as_list
from mmdist.serving.service import Service
from mmdist.serving.streams import Outputs, begin, collect, until_error

render_error = mindie.render_error
SAME_NAMES = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "stop_token_ids",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "ignore_eos",
)


class StructuredOutputs(Body):
    """An answer in JSON of a schema (any object with json_object), or of a regular expression."""

    json_: Annotated[str | dict[str, Any] | None, Field(alias="json")] = None
    json_object: bool = False
    regex: str | None = None

    def keys(self) -> dict[str, Any]:
        """-> SamplingParams' keys."""
        schema = {} if self.json_ is None and self.json_object else self.json_
        text = schema if isinstance(schema, str | None) else json.dumps(schema)
        return {"json_schema": text, "regex": self.regex}


class VllmParameters(Body):
    """vLLM's SamplingParams, with its defaults. best_of: n, as vLLM has no other any more."""

    n: Annotated[int, Field(gt=0)] = 1
    best_of: Annotated[int, Field(gt=0)] | None = None
    max_tokens: Annotated[int, Field(gt=0)] = 16
    min_tokens: Annotated[int, Field(ge=0)] = 0
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[str, float] = {}
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    structured_outputs: StructuredOutputs | None = None

    def sampling(self) -> SamplingParams:
        """UserError where a value is not legal."""
        guided = {} if self.structured_outputs is None else self.structured_outputs.keys()
        return SamplingParams(
            max_new_tokens=self.max_tokens,
            min_new_tokens=self.min_tokens,
            seed=self.seed,
            stop=as_list(self.stop),
            **{name: getattr(self, name) for name in SAME_NAMES},
            **guided,
        )

    def check(self, service: Service) -> None:
        """ServeError 422."""
        most = service.config.server.max_choices
        if self.n > most:
            raise ServeError(422, f"n={self.n}: at most {most} (server.max_choices)", param="n")
        if self.best_of not in (None, self.n):
            raise ServeError(422, f"best_of={self.best_of}: expected n={self.n}, or leave it out", param="best_of")


class VllmRequest(VllmParameters):
    prompt: Content
    stream: bool = False
    model: str | None = None
    truncate_prompt_tokens: Annotated[int, Field(gt=0)] | None = None


async def generate(request: Request, body: VllmRequest, service: Service) -> Response:
    """Prompt and answer as one text, for each of n."""
    body.check(service)
    if body.model not in (None, "None", service.model_name):  # "None" is how MindIE's examples write it
        raise ServeError(404, f"model {body.model!r} is not served; {service.model_name} is", param="model")
    params = body.sampling()
    prompt = await read_prompt(service, "prompt", body.prompt)
    if body.truncate_prompt_tokens is not None:
        prompt = await truncate(service, prompt, body.truncate_prompt_tokens, "truncate_prompt_tokens")
    outputs = service.generate(prompt, params, name=request.state.request_id, n=body.n)
    text = plain_text(body.prompt)
    if not body.stream:
        answers = await collect(request, outputs)
        return JSONResponse({"text": [text + output.text for output in answers]})
    outputs = await begin(request, outputs)
    if service.config.server.vllm_stream == "nul_delta":
        return StreamingResponse(deltas(body, outputs), media_type="application/octet-stream")
    return StreamingResponse(lines(body, text, outputs), media_type="application/x-ndjson")


async def lines(body: VllmRequest, text: str, outputs: Outputs) -> AsyncIterator[str]:
    """Prompt and answers so far, a line at a time."""
    texts = [text] * body.n
    async with aclosing(until_error(outputs)) as found:
        async for index, output in found:
            if isinstance(output, ServeError):
                yield f"{write(mindie.error_body(output))}\n"
                return
            texts[index] += output.delta
            yield f"{write({'text': texts})}\n"


async def deltas(body: VllmRequest, outputs: Outputs) -> AsyncIterator[str]:
    """What is new, each with a NUL behind it: MindIE's way."""
    async with aclosing(until_error(outputs)) as found:
        async for index, output in found:
            if isinstance(output, ServeError):
                yield f"{write(mindie.error_body(output))}\0"
                return
            yield f"{write({'text': [output.delta if other == index else '' for other in range(body.n)]})}\0"


def write(found: dict[str, Any]) -> str:
    return json.dumps(found, ensure_ascii=False)
