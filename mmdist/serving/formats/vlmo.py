"""VLMo, which answers at once: /v1/vqa, the likeliest of the answers it knows, and /v1/retrieval, pictures and texts
compared. Errors have OpenAI's shape."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Annotated, Any

import torch
from fastapi import APIRouter, Body, Request
from pydantic import Field, model_validator

from mmdist.config import SamplingParams
from mmdist.engine.encoder import Answer, EncoderEngine
from mmdist.models.base import Prompt
from mmdist.serving import messages
from mmdist.serving.errors import ServeError
from mmdist.serving.formats.openai import check_model
from mmdist.serving.formats.openai_answers import render_error
from mmdist.serving.health import ServiceOf
from mmdist.serving.messages import Source, check_count, read_images
from mmdist.serving.service import Service
from mmdist.serving.streams import collect, merge, unless_gone

__all__ = ["render_error", "router"]
router = APIRouter(prefix="/v1", tags=["VLMo"])
PICTURE = (  # a red square
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEUlEQVR42mN4oKCAFTEMLQkAUmxIAUwY"
    "Lx4AAAAASUVORK5CYII="
)
MAX_TEXTS = 1000
DEFAULT_TOP = 5
Text = Annotated[str, Field(min_length=1)]


class Question(messages.Body):
    question: Text
    image: Source


class VqaRequest(messages.Body):
    """A question about a picture, or several of them as inputs."""

    model: str | None = None
    question: Text | None = None
    image: Source | None = None
    inputs: list[Question] | None = Field(None, min_length=1, description="instead of question and image")
    top_k: int = Field(DEFAULT_TOP, ge=1, description="answers named to each question")

    @model_validator(mode="after")
    def check_inputs(self) -> VqaRequest:
        one = (self.question, self.image)
        if self.inputs is not None and one != (None, None):
            raise ServeError(422, "inputs: not with question and image", param="inputs")
        if self.inputs is None and None in one:
            name = "question" if self.question is None else "image"
            raise ServeError(422, f"{name}: missing; give question and image, or inputs", param=name)
        return self

    @property
    def questions(self) -> list[Question]:
        if self.inputs is not None:
            return self.inputs
        assert self.question is not None and self.image is not None, "check_inputs() lets nothing else through"
        return [Question(question=self.question, image=self.image)]


class RetrievalRequest(messages.Body):
    model: str | None = None
    images: list[Source] = Field(min_length=1, description="at most server.max_pictures")
    texts: list[Text] = Field(min_length=1, max_length=MAX_TEXTS)


VQA_EXAMPLES: dict[str, Any] = {
    "one": {"value": {"question": "Which object is on the left?", "image": PICTURE, "top_k": 3}},
    "several": {"value": {"inputs": [{"question": "How many objects are there?", "image": {"url": PICTURE}}]}},
}
VQA_ANSWER = {
    "object": "vqa",
    "created": 1760000000,
    "model": "vlmo",
    "data": [
        {
            "index": 0,
            "answers": [{"answer": "red square", "label": 5, "logit": 7.1, "score": 0.9992}],
            "truncated": False,
        }
    ],
}
RETRIEVAL_EXAMPLES: dict[str, Any] = {"two texts": {"value": {"images": [PICTURE], "texts": ["a red square", "a cat"]}}}
RETRIEVAL_ANSWER = {
    "object": "retrieval",
    "created": 1760000000,
    "model": "vlmo",
    "logits_per_image": [[9.3, -2.1]],
    "truncated": [False, False],
}


def example(answer: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    return {200: {"description": "Answers", "content": {"application/json": {"example": answer}}}}


@router.post("/vqa", responses=example(VQA_ANSWER))
async def vqa(
    body: Annotated[VqaRequest, Body(openapi_examples=VQA_EXAMPLES)], request: Request, service: ServiceOf
) -> dict[str, Any]:
    """The likeliest answers to each question. label: the answer's class. score: the logit's sigmoid, as VLMo is trained
    to give each answer a probability of its own. truncated: the question's end is left out."""
    find_encoder(service, compares=False)
    check_model(service, body.model)
    questions = body.questions
    check_count(service, len(questions))
    service.check_room(len(questions))
    images = await read_images(service, [one.image for one in questions])
    prompts = [
        await service.prompt(text=one.question, images=[image]) for one, image in zip(questions, images, strict=True)
    ]
    name, params = request.state.request_id, SamplingParams(top_k=body.top_k)
    outputs = merge([service.generate(prompt, params, name=name) for prompt in prompts], 1)
    answers = await collect(request, outputs)
    return head(service, "vqa") | {"data": [tell(index, answer) for index, answer in enumerate(answers)]}


def tell(index: int, answer: Any) -> dict[str, Any]:
    assert isinstance(answer, Answer), "an encoder's engine answers so"
    return {
        "index": index,
        "answers": [one | {"score": sigmoid(one["logit"])} for one in answer.top],
        "truncated": answer.truncated,
    }


def sigmoid(x: float) -> float:
    return (1 + math.tanh(x / 2)) / 2  # which does not overflow


@router.post("/retrieval", responses=example(RETRIEVAL_ANSWER))
async def retrieval(
    body: Annotated[RetrievalRequest, Body(openapi_examples=RETRIEVAL_EXAMPLES)], request: Request, service: ServiceOf
) -> dict[str, Any]:
    """How well each picture goes with each text: a row of logits a picture. truncated: of each text, whether its end
    is left out."""
    encoder = find_encoder(service, compares=True)
    check_model(service, body.model)
    check_count(service, len(body.images))
    service.check_room()
    images = await read_images(service, body.images)
    pictures = [await service.prompt(images=[image]) for image in images]
    texts = [await service.prompt(text=text) for text in body.texts]
    work = service.compute(compare(encoder, pictures, texts), name=request.state.request_id)
    logits = await unless_gone(request, work)
    truncated = [prompt.truncated for prompt in texts]
    return head(service, "retrieval") | {"logits_per_image": logits.tolist(), "truncated": truncated}


def compare(encoder: EncoderEngine, pictures: list[Prompt], texts: list[Prompt]) -> Iterator[torch.Tensor]:
    """A batch's features at a time; (pictures, texts) logits in the end."""
    features = []
    for prompts in (pictures, texts):
        batches = []
        for batch in encoder.features(prompts):
            batches.append(batch)
            yield batch
        features.append(torch.cat(batches))
    yield encoder.compare(*features)


def find_encoder(service: Service, *, compares: bool) -> EncoderEngine:
    """ServeError 404 where the model is none for this route."""
    encoder = service.encoder
    if encoder is None:
        message = f"{service.model_name} writes its answers: ask it at /v1/chat/completions; this is a route of VLMo's"
        raise ServeError(404, message)
    if encoder.model.compares != compares:
        does = "compares pictures with texts" if encoder.model.compares else "answers questions"
        where = "/v1/retrieval" if encoder.model.compares else "/v1/vqa"
        raise ServeError(404, f"this checkpoint of {service.model_name} {does}: ask it at {where}")
    return encoder


def head(service: Service, kind: str) -> dict[str, Any]:
    return {"object": kind, "created": int(time.time()), "model": service.model_name}
