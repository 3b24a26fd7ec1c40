"""How TGI, Triton and MindIE ask for sampling: Hugging Face's names, checked strictly."""

from __future__ import annotations

import secrets
from typing import Annotated, Any

from pydantic import Field

from mmdist.config import SamplingParams
from mmdist.engine.request import LEAST_URGENT
from mmdist.serving.messages import Body

MAX_SEED = 2**64 - 1
Share = Annotated[float, Field(gt=0, le=1)]


class Parameters(Body):
    max_new_tokens: Annotated[int, Field(gt=0)] = 20
    do_sample: bool | None = None
    temperature: Annotated[float, Field(gt=0)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Share | None = None
    typical_p: Share | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    details: bool = False
    watermark: bool = False

    @property
    def is_sampled(self) -> bool:
        """As do_sample says; without it, as soon as there is something to sample by."""
        return self.names_sampling if self.do_sample is None else self.do_sample

    @property
    def names_sampling(self) -> bool:
        by_default = {"temperature": 1, "top_k": 0, "top_p": 1, "typical_p": 1}
        return any(getattr(self, name) not in (None, default) for name, default in by_default.items())

    def sampling(self, **more: Any) -> SamplingParams:
        """A seed is drawn where sampling has none, so that the answer can name it; UserError. more: further keys."""
        sampled = self.is_sampled
        if sampled and self.seed is None:
            self.seed = secrets.randbits(63)
        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=(1.0 if self.temperature is None else self.temperature) if sampled else 0.0,
            top_k=self.top_k or 0,
            top_p=self.top_p or 1.0,
            typical_p=self.typical_p or 1.0,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            **more,
        )

    def seed_of(self, index: int) -> int | None:
        """Of an answer among several, after sampling(); None where nothing was drawn."""
        return self.seed + index if self.seed is not None and self.is_sampled else None


class MindieParameters(Parameters):
    """watermark and batch_size change nothing, as in MindIE. timeout: seconds. priority: 1 is the most urgent."""

    priority: Annotated[int, Field(ge=1, le=LEAST_URGENT)] = LEAST_URGENT
    timeout: Annotated[int, Field(gt=0, le=65535)] | None = None
    batch_size: Annotated[int, Field(gt=0)] | None = None

    @property
    def turn(self) -> dict[str, Any]:
        """When Service.generate() computes it, and for how long."""
        return {"priority": self.priority, "timeout_s": self.timeout}
