"""What goes into the engine and what comes out."""

from __future__ import annotations

import secrets
from bisect import bisect_left
from collections.abc import Set
from dataclasses import dataclass, field

import torch

from mmdist.config import SamplingParams
from mmdist.engine.detokenizer import Detokenizer
from mmdist.engine.grammar import Grammar
from mmdist.engine.logits_processors import LogitsProcessors
from mmdist.engine.output import Output, failed
from mmdist.models.base import Prompt

__all__ = ["LEAST_URGENT", "Output", "Request", "Sequence", "failed"]
LEAST_URGENT = 5


@dataclass
class Request:
    """priority: 1 to 5; those with a smaller one are begun before the others that wait."""

    id: str
    prompt: Prompt
    params: SamplingParams
    priority: int = LEAST_URGENT


@dataclass(eq=False)
class Picture:
    """One picture (or frame of a video) of a request, its `number`th.

    digest: of its pixels, b"" where no cache asks. [first, last): which of the request's image tokens are its rows;
    none in families whose layers look at it. embeds: (rows, width), once it is encoded.
    """

    number: int
    digest: bytes
    first: int
    last: int
    embeds: torch.Tensor | None = None


@dataclass(eq=False)
class Sequence:
    """A request on its way through the engine; on rank 0 only."""

    request: Request
    detokenizer: Detokenizer
    max_tokens: int  # of prompt and answer together
    pictures: list[Picture] = field(default_factory=list)
    end_ids: Set[int] = frozenset()  # tokens that end the answer
    grammar: Grammar | None = None
    processors: LogitsProcessors = field(init=False)
    generator: torch.Generator = field(init=False)
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[dict] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0  # tokens whose keys and values are in the cache
    num_cached_tokens: int | None = None  # of the prompt, found in the cache when the sequence was begun
    block_hashes: list[bytes] = field(default_factory=list)  # of full blocks, as far as they were asked for
    num_findable: int = 0  # blocks that other sequences can find
    remembered: bool = False  # the ranks hold what its layers look at

    def __post_init__(self) -> None:
        params, prompt = self.request.params, self.request.prompt
        self.processors = LogitsProcessors(params, prompt.token_ids, self.end_ids, self.grammar)
        seed = params.seed
        self.generator = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt.token_ids)

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + len(self.output_ids)

    def image_range(self, start: int, stop: int) -> tuple[int, int]:
        """Which of the request's image tokens are among its tokens [start, stop)."""
        positions = self.request.prompt.image_positions
        return bisect_left(positions, start), bisect_left(positions, stop)

    def pictures_of(self, first: int, last: int) -> list[Picture]:
        """Whose rows are among the image tokens [first, last)."""
        return [p for p in self.pictures if p.first < last and first < p.last] if first < last else []

    def pictures_in(self, start: int, stop: int) -> list[Picture]:
        """Those that the computation of tokens [start, stop) looks at."""
        prompt = self.request.prompt
        if prompt.memory is None:
            seen = bool(prompt.image_positions) and start <= prompt.image_positions[-1]
            return self.pictures_of(*self.image_range(start, stop)) if seen else []
        return [] if self.remembered else self.pictures

    def tokens(self, start: int, stop: int) -> list[int]:
        """Prompt and answer as one list, cut to [start, stop)."""
        split = self.num_prompt_tokens
        return self.request.prompt.token_ids[start:stop] + self.output_ids[max(start - split, 0) : max(stop - split, 0)]
