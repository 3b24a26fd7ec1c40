"""The bodies of OpenAI's format, with vLLM's further fields; what cannot be done is refused by its name."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from mmdist.config import SamplingParams
from mmdist.serving.errors import ServeError
from mmdist.serving.messages import Body, Content

MAX_LOGPROBS = 20
INT64 = 2**63

# Fields of OpenAI and vLLM that are not there, the value of each that asks for nothing, and what to say of the others.
REFUSED: dict[str, tuple[Any, str]] = {
    "tools": ([], "this server calls no tools"),
    "tool_choice": ("none", "this server calls no tools"),
    "functions": ([], "this server calls no functions"),
    "function_call": ("none", "this server calls no functions"),
    "audio": (None, "answers are text"),
    "modalities": (["text"], "answers are text"),
    "suffix": ("", "text is not inserted, only continued"),
    "best_of": (1, "every answer is given; ask for n of them"),
    "use_beam_search": (False, "tokens are sampled or the likeliest; there are no beams"),
    "prompt_logprobs": (None, "only the answer's tokens have log probabilities"),
    "structured_outputs": (None, "use response_format"),
    "guided_json": (None, "use response_format"),
    "guided_regex": (None, "use response_format"),
    "guided_choice": (None, "use response_format"),
    "guided_grammar": (None, "use response_format"),
}


def one_or_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def as_prompts(value: Any) -> Any:
    """A text or one list of token ids as a list of one prompt."""
    is_ids = isinstance(value, list) and bool(value) and all(type(item) is int for item in value)
    return [value] if isinstance(value, str) or is_ids else value


Stop = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(one_or_list, json_schema_input_type=str | list[str]),
    Field(max_length=64),
]
Prompt = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[int], Field(min_length=1), Tag("(ids)")],
    Discriminator(lambda value: "(text)" if isinstance(value, str) else "(ids)"),
]
Prompts = Annotated[
    list[Prompt],
    BeforeValidator(as_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    Field(min_length=1),
]
TokenName = Annotated[str, Field(pattern=r"^\d{1,9}$")]


class StreamOptions(Body):
    include_usage: bool = Field(False, description="a last chunk without choices has the usage")
    continuous_usage_stats: bool = Field(False, description="vLLM's: every chunk has the usage so far")


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class JsonSchema(Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    schema_: dict[str, Any] = Field(alias="schema", description="JSON schema that the answer follows")
    description: str = ""
    strict: bool = Field(True, description="answers follow the schema whatever it says")


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class Sampling(Body):
    """What both routes take. The last fields are taken and change nothing."""

    model: str | None = Field(None, description="as GET /v1/models names it; there is one, so it may be left out")
    temperature: float = Field(1, ge=0, le=2)
    top_p: float = Field(1, gt=0, le=1)
    n: int = Field(1, ge=1, description="answers; at most server.max_choices")
    stop: Stop = Field([], description="texts that end the answer")
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    frequency_penalty: float = Field(0, ge=-2, le=2)
    presence_penalty: float = Field(0, ge=-2, le=2)
    logit_bias: dict[TokenName, Annotated[float, Field(ge=-100, le=100)]] = Field({}, description="by token id")
    response_format: ResponseFormat = TextFormat(type="text")
    stream: bool = False
    stream_options: StreamOptions | None = None
    top_k: int = Field(0, ge=-1, description="vLLM's; 0 or -1: all tokens")
    min_p: float = Field(0, ge=0, le=1, description="vLLM's")
    repetition_penalty: float = Field(1, ge=0.01, le=100, description="vLLM's")
    min_tokens: int = Field(0, ge=0, description="vLLM's: no end before this many tokens")
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field([], max_length=64, description="vLLM's")
    include_stop_str_in_output: bool = Field(False, description="vLLM's")
    ignore_eos: bool = Field(False, description="vLLM's")
    skip_special_tokens: bool = Field(True, description="vLLM's")
    return_token_ids: bool = Field(False, description="vLLM's: choices have token_ids, the answer prompt_token_ids")
    request_id: str | None = Field(None, pattern=r"^[A-Za-z0-9_.:-]{1,256}$", description="vLLM's; else X-Request-Id")
    user: str | None = Field(None, description="ignored")
    metadata: dict[str, Any] | None = Field(None, description="ignored")
    store: bool | None = Field(None, description="ignored; nothing is stored")
    priority: int | None = Field(None, description="ignored; first come, first served")
    service_tier: str | None = Field(None, description="ignored")
    parallel_tool_calls: bool | None = Field(None, description="ignored")
    safety_identifier: str | None = Field(None, description="ignored")
    prompt_cache_key: str | None = Field(None, description="ignored; prompts are always looked up in the cache")

    default_max_tokens: ClassVar[int | None] = None

    @model_validator(mode="before")
    @classmethod
    def refuse(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in REFUSED.keys() & data.keys():
            neutral, reason = REFUSED[name]
            if data[name] is not None and data[name] != neutral:
                raise ServeError(422, f"{name}: {reason}", param=name)
        return {name: value for name, value in data.items() if name not in REFUSED}

    @model_validator(mode="after")
    def check_stream_options(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ServeError(422, "stream_options: only with stream=true", param="stream_options")
        return self

    @model_validator(mode="after")
    def check_lengths(self) -> Sampling:
        most = self.asked_tokens or self.default_max_tokens
        if most is not None and self.min_tokens > most:
            raise ServeError(422, f"min_tokens={self.min_tokens}: above max_tokens={most}", param="min_tokens")
        return self

    @property
    def asked_tokens(self) -> int | None:
        return None

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives of each token to report; None: no log probabilities at all."""
        return None

    def params(self, room: int) -> SamplingParams:
        """room: tokens that fit behind the prompt."""
        asked = self.asked_tokens or self.default_max_tokens
        most = room if asked is None else min(asked, room)
        return SamplingParams(
            max_new_tokens=most,
            min_new_tokens=min(self.min_tokens, most),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias={int(token_id): bias for token_id, bias in self.logit_bias.items()},
            seed=self.seed,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            include_stop_str_in_output=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
            logprobs=self.num_logprobs,
            json_schema=self.json_schema,
        )

    @property
    def json_schema(self) -> str | None:
        match self.response_format:
            case JsonObjectFormat():
                return "{}"
            case JsonSchemaFormat(json_schema=wanted):
                return json.dumps(wanted.schema_)
        return None


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = Field(None, description="ignored; chat templates know roles alone")

    @property
    def turn(self) -> tuple[str, Any]:
        """developer is what OpenAI calls system now."""
        return ("system" if self.role == "developer" else self.role), self.content


class ChatRequest(Sampling):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="default: all that fit engine.max_model_len")
    max_tokens: int | None = Field(None, ge=1, description="the older name of max_completion_tokens")
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="with logprobs=true")

    @model_validator(mode="after")
    def check_pairs(self) -> ChatRequest:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            message = f"max_tokens={both[0]} and max_completion_tokens={both[1]}: give one of them"
            raise ServeError(422, message, param="max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise ServeError(422, "top_logprobs: only with logprobs=true", param="top_logprobs")
        return self

    @property
    def asked_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Sampling):
    default_max_tokens: ClassVar[int | None] = 16  # OpenAI's

    prompt: Prompts = Field(description="texts, or lists of token ids; prompts times n answers in all")
    max_tokens: int | None = Field(None, ge=1, description="default: 16")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="alternatives of each token to report")
    echo: bool = Field(False, description="begin the answer with the prompt")

    @model_validator(mode="after")
    def check_echo(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise ServeError(422, "echo: not with logprobs, which prompts have not", param="echo")
        return self

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs
