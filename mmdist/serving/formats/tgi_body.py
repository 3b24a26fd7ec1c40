"""What TGI's clients send, and what of it goes together."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from mmdist.config import SamplingParams
from mmdist.serving.errors import ServeError
from mmdist.serving.formats.parameters import Parameters
from mmdist.serving.messages import Body, Content
from mmdist.serving.service import Service

MAX_STOP = 16  # stop sequences of a request


class Grammar(Body):
    """json: a schema. json_schema: {"name": ..., "schema": a schema}."""

    type: Literal["json", "regex", "json_schema"]
    value: str | dict[str, Any]

    def keys(self) -> dict[str, str]:
        """-> SamplingParams' keys; ServeError 422."""
        if self.type == "regex":
            if not isinstance(self.value, str):
                raise ServeError(422, "parameters.grammar.value: a regular expression is a text")
            return {"regex": self.value}
        schema: Any = self.value
        if self.type == "json_schema" and isinstance(schema, dict):
            schema = schema.get("schema", schema)
        return {"json_schema": schema if isinstance(schema, str) else json.dumps(schema)}


class TgiParameters(Parameters):
    """adapter_id: none is served; "None" is how MindIE's examples write it."""

    best_of: Annotated[int, Field(gt=0)] = 1
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOP)] = []
    truncate: Annotated[int, Field(gt=0)] | None = None
    return_full_text: bool = False
    decoder_input_details: bool = False
    top_n_tokens: Annotated[int, Field(ge=0, le=5)] = 0
    grammar: Grammar | None = None
    adapter_id: str | None = None

    @property
    def is_sampled(self) -> bool:
        """In TGI anything to sample by means sampling, whatever do_sample says."""
        return bool(self.do_sample) or self.names_sampling

    def tgi_sampling(self, *, needs_logprobs: bool) -> SamplingParams:
        """A stop sequence stays at the end of the text, as in TGI."""
        grammar = {} if self.grammar is None else self.grammar.keys()
        return self.sampling(
            frequency_penalty=self.frequency_penalty,
            stop=self.stop,
            include_stop_str_in_output=True,
            logprobs=self.top_n_tokens if needs_logprobs or self.best_of > 1 else None,
            **grammar,
        )

    def check(self, service: Service, *, stream: bool) -> None:
        """What does not go together; ServeError 422."""
        most = service.config.server.max_choices
        problems = {
            "watermark": self.watermark and "none is put into answers here",
            "adapter_id": self.adapter_id not in (None, "None") and "no adapters are served",
            "decoder_input_details": self.decoder_input_details and stream and "not supported when streaming tokens",
            "best_of": (self.best_of > most and f"at most {most} (server.max_choices)")
            or (self.best_of > 1 and stream and "must be 1 when streaming tokens")
            or (self.best_of > 1 and not self.is_sampled and "you must use sampling when it is above 1")
            or (self.best_of > 1 and self.seed is not None and "seed must not be set when it is above 1"),
        }
        for name, problem in problems.items():
            if problem:
                raise ServeError(422, f"parameters.{name}: {problem}", param=f"parameters.{name}")


class TgiRequest(Body):
    inputs: Content
    parameters: TgiParameters = TgiParameters()


class CompatRequest(TgiRequest):
    stream: bool = False
