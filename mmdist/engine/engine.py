"""The engine: requests in, text out, one step at a time.

Rank 0 schedules, samples and talks to the outside; the others follow it. Each step begins with one broadcast of the
batch, so the ranks never disagree about what they compute.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from itertools import islice

import torch
from torch.nn import Module

from mmdist.config import EngineConfig, SamplingParams, UserError
from mmdist.engine.advance import advance
from mmdist.engine.batch import Batch, Scheduled, build_batch, image_embeds, take_memories
from mmdist.engine.blocks import BlockManager
from mmdist.engine.cache import PagedCache, cache_shape
from mmdist.engine.detokenizer import build_detokenizer
from mmdist.engine.grammar import Grammars
from mmdist.engine.pictures import PictureEncoder
from mmdist.engine.record import Recorder, list_stages
from mmdist.engine.request import Output, Request, Sequence, failed
from mmdist.engine.runner import Runner
from mmdist.engine.sampler import Scores, num_candidates
from mmdist.engine.scheduler import Scheduler
from mmdist.kernels.graphs import GRAPHS
from mmdist.kernels.kernels import Kernels
from mmdist.models.base import MultimodalModel, Processor
from mmdist.spans import Spans
from mmdist.tp import TP


class Engine:
    """processor and eos_token_ids are rank 0's; other ranks pass None and an empty set, and call follow()."""

    def __init__(
        self,
        model: MultimodalModel,
        tp: TP,
        config: EngineConfig,
        kernels: Kernels,
        *,
        processor: Processor | None,
        eos_token_ids: set[int],
        spans: Spans,
    ):
        self.spans, self.kernels = spans, kernels
        self.tp, self.processor, self.eos_token_ids = tp, processor, eos_token_ids
        self.cache_shape = shape = cache_shape(model, config)
        self.max_model_len = shape.max_model_len
        self.runner = Runner(model, PagedCache(shape, model.dtype, kernels), tp, kernels, spans)
        if config.decode_graph == "on":
            self.runner.capture(GRAPHS[kernels.device.type](kernels.device), config.max_num_seqs, shape.max_model_len)
        self.pictures = PictureEncoder(self.runner, config, spans)
        blocks = BlockManager(shape.num_blocks, shape.block_size, finds_prefixes=config.prefix_cache)
        self.scheduler = Scheduler(config, blocks, self.pictures.cache, kernels.device.type)
        self.sequences: dict[str, Sequence] = {}
        self.recorder: Recorder | None = None
        self.grammars = Grammars(None if processor is None else processor.tokenizer, eos_token_ids)

    def add(self, request: Request) -> None:
        """Queue a request; UserError when it cannot fit or its id is taken."""
        length = len(request.prompt.token_ids)
        if length >= self.max_model_len:
            raise UserError(
                f"the prompt has {length} tokens ({len(request.prompt.image_positions)} of pictures), "
                f"engine.max_model_len={self.max_model_len} must be larger; shorten it or raise engine.max_model_len"
            )
        if request.id in self.sequences:
            raise UserError(f"id {request.id} is given twice; ids must differ")
        pictures = request.prompt.memory_pictures
        if pictures > self.scheduler.config.max_pictures:
            raise UserError(f"{pictures} pictures, engine.max_pictures={self.scheduler.config.max_pictures}; raise it")
        max_tokens = min(length + request.params.max_new_tokens, self.max_model_len)
        self.check_params(request.params)
        sequence = Sequence(
            request,
            build_detokenizer(self.prompts, request.params),
            max_tokens,
            self.pictures.list(request.prompt),
            end_ids=self._end_ids(request.params),
            grammar=self.grammars.begin(request.params),
        )
        self.sequences[request.id] = sequence
        self.scheduler.add(sequence)

    def check_params(self, params: SamplingParams) -> None:
        """UserError for what this checkpoint cannot follow. From any thread: add() compiles no grammar again then."""
        ids = [*params.stop_token_ids, *params.logit_bias]
        if ids and max(ids) >= self.vocab_size:
            last = self.vocab_size - 1
            raise UserError(f"stop_token_ids, logit_bias: the vocabulary ends before token {max(ids)}, at {last}")
        self.grammars.begin(params)

    def _end_ids(self, params: SamplingParams) -> set[int]:
        return {*params.stop_token_ids, *(() if params.ignore_eos else self.eos_token_ids)}

    @property
    def vocab_size(self) -> int:
        """Tokens that can be written."""
        return self.model.lm_head.vocab_size

    @property
    def model(self) -> MultimodalModel:
        return self.runner.model

    def stages(self) -> dict[str, Module]:
        """What a Recorder of layers watches."""
        return list_stages(self.model)

    @property
    def device(self) -> torch.device:
        return self.runner.device

    @property
    def prompts(self) -> Processor:
        assert self.processor is not None, "text enters and leaves through rank 0"
        return self.processor

    def gauges(self) -> dict[str, float]:
        """What is so now, by vLLM's names."""
        scheduler = self.scheduler
        return {
            "num_requests_running": len(scheduler.running),
            "num_requests_waiting": len(scheduler.waiting),
            "kv_cache_usage_perc": scheduler.blocks.num_used / scheduler.blocks.num_blocks,
        }

    def counters(self) -> dict[str, float]:
        """What has been counted since the start, by vLLM's names: of prefixes in tokens, of encoded pictures (mm)."""
        prefix, pictures = self.scheduler.blocks.prefix, self.pictures.cache
        return {
            "num_preemptions": self.scheduler.num_preemptions,
            "prefix_cache_queries": prefix.num_queried_tokens,
            "prefix_cache_hits": prefix.num_hit_tokens,
            "mm_cache_queries": pictures.num_hits + pictures.num_misses,
            "mm_cache_hits": pictures.num_hits,
        }

    @property
    def has_work(self) -> bool:
        return bool(self.sequences)

    def abort(self, request_id: str) -> None:
        sequence = self.sequences.pop(request_id, None)
        if sequence is not None:
            self.scheduler.remove(sequence)

    def step(self) -> list[Output]:
        """Compute the next token of what is scheduled; rank 0 only."""
        scheduled = self.scheduler.schedule()
        for item in scheduled:
            self.encode_pictures(item)
        batch = build_batch(scheduled, self.scheduler.running)
        batch.candidates = [num_candidates(item.sequence) for item in scheduled if item.samples]
        memories = take_memories(scheduled, batch)
        with self.spans("broadcast"):
            self.tp.broadcast_object(batch)
        with self.spans(batch.phase):
            scores = self.runner.score(batch, image_embeds(scheduled), memories)
        if self.recorder is not None:
            self.recorder.take_step(scheduled, batch, scores)
        return self._finish_step(scheduled, scores)

    def follow(self) -> int:
        """The other ranks' life: compute what rank 0 sends, until it stops; returns the exit code 0."""
        while (batch := self._receive()) is not None:
            if batch.input_ids:
                with self.spans(batch.phase):
                    self.runner.score(batch)
            else:
                self.tp.count_ranks(self.device)
        return 0

    def _receive(self) -> Batch | None:
        with self.spans("broadcast"):
            return self.tp.broadcast_object(None)

    def keep_alive(self) -> int:
        """Let the other ranks know, while there is nothing to do, that rank 0 is still there; how many ranks are."""
        self.tp.broadcast_object(Batch())
        return self.tp.count_ranks(self.device)

    def stop(self) -> None:
        self.tp.broadcast_object(None)

    def generate(self, requests: Iterable[Request]) -> Generator[Output, None, None]:
        """Run requests to their ends, taking new ones as places become free; closing the iterator stops them."""
        source = iter(requests)
        exhausted = False
        try:
            while self.sequences or not exhausted:
                places = self.scheduler.config.max_num_seqs - len(self.sequences)
                new = list(islice(source, max(0, places)))
                exhausted = len(new) < places
                yield from self._add_all(new)
                if self.sequences:
                    yield from self.step()
        finally:
            for request_id in list(self.sequences):
                self.abort(request_id)

    def _add_all(self, requests: list[Request]) -> Iterator[Output]:
        """Add what can be added; the rest ends at once with its error."""
        for request in requests:
            try:
                self.add(request)
            except UserError as error:
                yield failed(request.id, request.prompt.token_ids, str(error))

    def encode_pictures(self, item: Scheduled) -> None:
        """Those its step looks at, unless they are known; a recorder sees all of a request's at once."""
        request = item.sequence.request
        wanted = item.pictures() if self.recorder is None else item.sequence.pictures
        if self.pictures.encode(request.prompt, wanted) and self.recorder is not None:
            self.recorder.take_pictures(request.id)

    def _finish_step(self, scheduled: list[Scheduled], scores: list[Scores]) -> list[Output]:
        sampled = [item.sequence for item in scheduled if item.samples]
        for item in scheduled:
            item.sequence.num_computed = item.stop
            self.scheduler.blocks.note_computed(item.sequence)
        outputs = [
            advance(sequence, own, self.eos_token_ids, self.spans)
            for sequence, own in zip(sampled, scores, strict=True)
        ]
        for output in outputs:
            if output.finish_reason is not None:
                self.abort(output.id)
        return outputs
