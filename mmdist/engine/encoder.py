"""The engine of models that answer in one forward pass: batches of requests in, answers or features out.

It has Engine's door, so that a task need not know which it talks to. Nothing is left running between two batches.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch.nn import Module

from mmdist.config import EngineConfig, SamplingParams, UserError
from mmdist.engine.output import Answer
from mmdist.engine.record import Recorder, list_stages
from mmdist.engine.request import Output, Request, failed
from mmdist.kernels.kernels import Kernels
from mmdist.models.base import EncoderModel, Processor, Prompt
from mmdist.spans import Spans
from mmdist.tp import TP

# What shapes a text, of which there is none: answers come from a list.
NOT_TAKEN = ("repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias", "typical_p", "min_p",
             "min_new_tokens", "stop_token_ids", "json_schema", "regex")  # fmt: skip
DEFAULT_TOP = 5  # answers named when top_k does not say how many
DEFAULTS = SamplingParams()
log = logging.getLogger("mmdist.encoder")


@dataclass
class EncoderBatch:
    """What rank 0 tells of a batch: how its layers take it, the shape of the embedded input, (batch, tokens) its mask.

    An empty one (no kind) says that rank 0 is still there.
    """

    kind: str = ""
    shape: tuple[int, ...] = ()
    mask: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))


class EncoderEngine:
    """processor is rank 0's; other ranks pass None and call follow()."""

    def __init__(
        self,
        model: EncoderModel,
        tp: TP,
        config: EngineConfig,
        kernels: Kernels,
        *,
        processor: Processor | None,
        spans: Spans,
    ):
        self.model, self.tp, self.processor, self.device = model, tp, processor, kernels.device
        self.spans, self.kernels = spans, kernels
        self.max_num_seqs = config.max_num_seqs
        self.recorder: Recorder | None = None
        self.waiting: dict[str, Request] = {}

    def stages(self) -> dict[str, Module]:
        """What a Recorder of layers watches."""
        return list_stages(self.model)

    @property
    def prompts(self) -> Processor:
        assert self.processor is not None, "text enters and leaves through rank 0"
        return self.processor

    def generate(self, requests: Iterable[Request]) -> Generator[Output, None, None]:
        """The best of the model's answers to each request; each output is whole and the request's only one."""
        self.check_answers()
        source = iter(requests)
        while batch := list(islice(source, self.max_num_seqs)):
            yield from self._answer(batch)

    def add(self, request: Request) -> None:
        """Queue a request; UserError where the checkpoint answers none, or has no use for this one."""
        self.check_answers()
        self.check_params(request.params)
        self.model.kind(request.prompt)
        self.waiting[request.id] = request

    def gauges(self) -> dict[str, float]:
        """What is so now, by vLLM's names."""
        return {"num_requests_waiting": len(self.waiting)}

    def counters(self) -> dict[str, float]:
        return {}

    @property
    def has_work(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[Output]:
        """Answer a batch of the requests that wait."""
        batch = sorted(self.waiting.values(), key=lambda request: request.priority)[: self.max_num_seqs]
        for request in batch:
            del self.waiting[request.id]
        return list(self._answer(batch))

    def check_answers(self) -> None:
        if self.model.compares:
            raise UserError("this checkpoint is for retrieval and answers no questions; give images= and texts=")

    def _answer(self, requests: list[Request]) -> Iterator[Output]:
        by_kind: dict[str, list[Request]] = {}
        for request in requests:
            try:
                self.check_params(request.params)
                by_kind.setdefault(self.model.kind(request.prompt), []).append(request)
            except UserError as error:
                yield failed(request.id, request.prompt.token_ids, str(error))
        for kind, group in by_kind.items():
            scores = self.encode([request.prompt for request in group], kind)
            if self.recorder is not None:
                self.recorder.take_batch([request.id for request in group], scores)
            for request, row in zip(group, scores, strict=True):
                yield self._choose(request, row)

    def check_params(self, params: SamplingParams) -> None:
        """UserError for what makes no sense here; max_new_tokens and the like just never matter."""
        for name in NOT_TAKEN:
            value = getattr(params, name)
            if value != getattr(DEFAULTS, name):
                raise UserError(f"{name}={value}: this model chooses one answer of a list; leave it out")

    def _choose(self, request: Request, scores: torch.Tensor) -> Answer:
        """scores: (answers,)"""
        count = request.params.top_k if request.params.top_k > 0 else DEFAULT_TOP
        with self.spans("sample"):
            logits, labels = (best.tolist() for best in scores.topk(min(count, len(scores))))
        with self.spans("detokenise"):
            answers = [self.prompts.decode([label]) for label in labels]
        if request.prompt.truncated:
            log.warning("request %s: the question is too long for the model; its end is left out", request.id)
        return Answer(
            id=request.id,
            delta=answers[0],
            text=answers[0],
            prompt_token_ids=request.prompt.token_ids,
            token_ids=labels[:1],
            logprobs=None,
            finish_reason="stop",
            token_id=labels[0],
            num_tokens=1,
            label=labels[0],
            top=[
                {"label": label, "answer": answer, "logit": logit}
                for label, answer, logit in zip(labels, answers, logits, strict=True)
            ],
            truncated=request.prompt.truncated,
        )

    def features(self, prompts: Iterable[Prompt], names: Iterable[str] = ()) -> Iterator[torch.Tensor]:
        """(batch, width) features of pictures, or of texts, batch by batch; names: by which they are recorded."""
        self.check_compares()
        source, called = iter(prompts), iter(names)
        while batch := list(islice(source, self.max_num_seqs)):
            features = self.encode(batch, self.model.kind(batch[0]))
            if self.recorder is not None:
                self.recorder.save_batch(list(islice(called, len(batch))), features)
            yield features

    def check_compares(self) -> None:
        if not self.model.compares:
            raise UserError("this checkpoint answers questions; images= and texts= take one made for retrieval")

    @torch.inference_mode()
    def encode(self, prompts: list[Prompt], kind: str) -> torch.Tensor:
        """-> (batch, scores or features) on the CPU; rank 0 only."""
        with self.spans("vision"):
            hidden, mask = self.model.embed(prompts, kind)
        with self.spans("broadcast"):
            self.tp.broadcast_object(EncoderBatch(kind, tuple(hidden.shape), mask))
        hidden = self._forward(hidden, mask, kind)
        with self.spans("sample"):
            return self.model.head(hidden, kind).cpu()

    def _forward(self, hidden: torch.Tensor, mask: torch.Tensor, kind: str) -> torch.Tensor:
        with self.spans("broadcast"):
            self.tp.broadcast(hidden)
        with self.spans("prefill"):
            return self.model(hidden, mask.to(self.device), kind)

    @torch.inference_mode()
    def follow(self) -> int:
        """The other ranks' life: compute what rank 0 sends, until it stops; returns the exit code 0."""
        while (batch := self._receive()) is not None:
            if batch.kind:
                hidden = torch.empty(batch.shape, dtype=self.model.dtype, device=self.device)
                self._forward(hidden, batch.mask, batch.kind)
            else:
                self.tp.count_ranks(self.device)
        return 0

    def _receive(self) -> EncoderBatch | None:
        with self.spans("broadcast"):
            return self.tp.broadcast_object(None)

    @torch.inference_mode()
    def compare(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """Features of both -> (images, texts) logits."""
        return self.model.compare(images.to(self.device), texts.to(self.device)).cpu()

    def abort(self, request_id: str) -> None:
        """Answers come whole: only one that still waits can be stopped."""
        self.waiting.pop(request_id, None)

    def keep_alive(self) -> int:
        """Let the other ranks know, while there is nothing to do, that rank 0 is still there; how many ranks are."""
        self.tp.broadcast_object(EncoderBatch())
        return self.tp.count_ranks(self.device)

    def stop(self) -> None:
        self.tp.broadcast_object(None)
