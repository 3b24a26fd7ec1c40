"""Equal requests of an exact length, begun together, and when their tokens came."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from mmdist.config import SamplingParams, UserError
from mmdist.engine.encoder import EncoderEngine
from mmdist.engine.load import AnyEngine
from mmdist.engine.request import Request
from mmdist.models.base import Prompt
from mmdist.performance.ranks import RankReport
from mmdist.spans import TimedSpans


@dataclass
class Workload:
    """make: reads the picture and makes the prompt, as for any request. input_len: None leaves it as long as it is."""

    make: Callable[[], Prompt]
    input_len: int | None
    output_len: int
    num_pictures: int
    num_video_frames: int

    def prompt(self, number: int) -> Prompt:
        made = self.make()
        return made if self.input_len is None else fit(made, self.input_len, seed=number)


@dataclass
class Run:
    """One batch from its beginning to its end, in seconds. arrivals: of each request's tokens, after the beginning.

    phases: rank 0's, without those inside them; steps: of its prefill and decode steps, one by one. num_spans: entered.
    """

    duration: float
    arrivals: list[list[float]]
    phases: dict[str, float]
    steps: dict[str, list[float]]
    num_spans: int
    ranks: list[RankReport] = field(default_factory=list)


def fit(prompt: Prompt, length: int, seed: int) -> Prompt:
    """Exactly `length` tokens: words of its own behind it, in an order that `seed` gives, or its end cut off."""
    pictures = len(prompt.image_positions)
    least = max(prompt.image_positions, default=-1) + 1
    if length < least:
        raise UserError(
            f"input_len={length}: the picture alone takes {pictures} tokens, with {least - pictures} of text before "
            f"it; give input_len={least} or more, or a smaller picture"
        )
    taken = set(prompt.image_positions)
    words = [token for position, token in enumerate(prompt.token_ids) if position not in taken]
    missing = max(0, length - len(prompt.token_ids))
    filled = [*prompt.token_ids, *random.Random(seed).choices(words, k=missing)]
    return replace(prompt, token_ids=filled[:length])


def begin(engine: AnyEngine, workload: Workload, batch_size: int) -> Iterator[Request]:
    """The requests, each made when the engine asks for it."""
    params = SamplingParams(max_new_tokens=workload.output_len, ignore_eos=True)
    for number in range(batch_size):
        with engine.spans("preprocess"):
            prompt = workload.prompt(number)
        yield Request(str(number), prompt, params)


def run_batch(engine: AnyEngine, workload: Workload, batch_size: int) -> Run:
    """Rank 0's part; the other ranks follow the engine."""
    spans = engine.spans
    assert isinstance(spans, TimedSpans)
    arrivals: dict[str, list[float]] = {str(number): [] for number in range(batch_size)}
    requests = begin(engine, workload, batch_size)
    start = time.perf_counter()
    if isinstance(engine, EncoderEngine) and engine.model.compares:
        for _ in engine.features(request.prompt for request in requests):
            pass
        arrivals = {name: [time.perf_counter() - start] for name in arrivals}
    else:
        for output in engine.generate(requests):
            assert output.error is None, f"the workload was checked before: {output.error}"
            arrivals[output.id].append(time.perf_counter() - start)
    duration = time.perf_counter() - start
    num_spans = sum(map(len, spans.entered.values()))
    steps = {name: list(spans.entered[name]) for name in ("prefill", "decode")}
    return Run(duration, list(arrivals.values()), dict(spans.seconds), steps, num_spans)
