"""Every key a user can set: its type, default and one line of help; checked once, at the door.

The yaml files in conf/ choose among these; `python launch.py --help` prints them. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from math import inf, isfinite
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

DTYPES = ("auto", "float32", "float16", "bfloat16")
DEVICES = ("auto", "cpu", "cuda", "npu")
CHIPS = ("auto", "310p", "910b")
COLLECTIVES = ("auto", "shm", "gloo")
PINS = ("auto", "none", "card")
KERNELS = ("auto", "plain", "portable", "avx2", "avx512", "avx512_bf16")
KV_CACHE_DTYPES = ("auto", "int8")
DECODE_GRAPHS = ("auto", "on", "off")
VISION_BACKENDS = ("torch", "onnx", "om")
QUANT_SCHEMES = ("auto", "none", "w8a16", "w4a16")
FREE_TEXT_KEYS = (
    "prompt",
    "image",
    "video",
    "input",
    "images",
    "texts",
    "output",
    "data",
    "reference",
    "answers",
    "judge_checkpoint",
    "checkpoint",
    "output_dir",
    "compare",
    "json_schema",
    "regex",
    "model.chat_template",
    "vision.folder",
    "server.api_key_file",
    "server.ssl_certfile",
    "server.ssl_keyfile",
    "server.allowed_media_path",
)
MAP_KEYS = ("logit_bias",)

EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130


class UserError(ValueError):
    """A mistake of the user: shown as one line without a traceback, exit code 2."""


def key(default: Any, help: str) -> Any:
    """A config key with its default and the line that --help prints for it."""
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


def group(kind: Callable[[], Any], help: str) -> Any:
    return field(default_factory=kind, metadata={"help": help})


def require(condition: bool, name: str, value: object, legal: str) -> None:
    if not condition:
        raise UserError(f"{name}={value}: expected {legal}")


def has_type(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON or given by a caller is of an annotated type; a whole number is a float too."""
    if isinstance(hint, UnionType):
        return any(has_type(value, option) for option in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(has_type(item, get_args(hint)[0]) for item in value)
    if get_origin(hint) is dict:
        of_key, of_value = get_args(hint)
        return isinstance(value, dict) and all(has_type(k, of_key) and has_type(v, of_value) for k, v in value.items())
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float) if hint is float else isinstance(value, hint)


def type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


@dataclass
class ModelConfig:
    name: str = key("", "the family: a file in mmdist/models and a yaml in conf/model")
    chat_template: str | None = key(None, "a jinja file that replaces the checkpoint's own chat template")
    demo_checkpoint: str | None = key(
        None, "the checkpoint shipped with this repository, used when checkpoint= is not given"
    )
    demo_source: str | None = key(
        None, "original files shipped with this repository, converted to demo_checkpoint when that is not there"
    )
    demo_image: str | None = key(None, "the picture shown when neither checkpoint, image nor prompt is given")
    demo_video: str | None = key(None, "the video shown instead of a picture")
    demo_prompt: str | None = key(None, "the question asked then")


@dataclass
class HardwareConfig:
    device: str = key("auto", "auto (accelerators if there are any), cpu, cuda or npu")
    chip: str = key("auto", "on an NPU: auto (ask it), 310p (300I DUO) or 910b (800I A2)")
    memory_gib: float | None = key(
        None, "memory of one accelerator, or of the whole host for cpu; default: asked from the machine"
    )
    memory_utilization: float = key(0.9, "share of that memory the job may use")
    threads_per_rank: int | None = key(
        None, "CPU threads of a rank; default: OMP_NUM_THREADS, else its share of the cores"
    )
    pin: str = key(
        "auto",
        "on a CPU: auto (a rank keeps to its share of the cores, unless they were dealt out already) or none; on an "
        "NPU: card (only whole dual-chip cards)",
    )
    collectives: str = key(
        "auto", "on a CPU: shm (shared memory, for ranks of one machine), gloo, or auto (shm where it can be)"
    )
    kernels: str = key(
        "auto",
        "auto (the best there are: native ones on a CPU, the chip's plan on an NPU) or plain (torch's own); on a CPU "
        "also portable, avx2, avx512, avx512_bf16",
    )

    def __post_init__(self) -> None:
        require(self.device in DEVICES, "hardware.device", self.device, "|".join(DEVICES))
        require(self.chip in CHIPS, "hardware.chip", self.chip, "|".join(CHIPS))
        require(self.pin in PINS, "hardware.pin", self.pin, "|".join(PINS))
        require(self.collectives in COLLECTIVES, "hardware.collectives", self.collectives, "|".join(COLLECTIVES))
        require(self.kernels in KERNELS, "hardware.kernels", self.kernels, "|".join(KERNELS))
        require(
            0 < self.memory_utilization <= 1,
            "hardware.memory_utilization",
            self.memory_utilization,
            "above 0, at most 1",
        )
        require(self.memory_gib is None or self.memory_gib > 0, "hardware.memory_gib", self.memory_gib, "above 0")
        require(
            self.threads_per_rank is None or self.threads_per_rank > 0,
            "hardware.threads_per_rank",
            self.threads_per_rank,
            "above 0",
        )


@dataclass
class QuantConfig:
    """What yaml of conf/quant is chosen."""

    scheme: str = key(
        "auto", "auto (as the checkpoint is), none (it must be plain), w8a16 or w4a16 (quantise on loading)"
    )
    group_size: int = key(0, "columns of a weight that share a scale; 0: whole rows")

    def __post_init__(self) -> None:
        require(self.scheme in QUANT_SCHEMES, "quant.scheme", self.scheme, "|".join(QUANT_SCHEMES))
        require(self.group_size >= 0, "quant.group_size", self.group_size, "0 or above")


@dataclass
class VisionConfig:
    backend: str = key(
        "torch", "what computes the vision tower: torch, onnx (onnxruntime, on the CPU) or om (Ascend's ais_bench)"
    )
    folder: str | None = key(
        None, "what weights_tools export --vision wrote, for onnx and om; default: CHECKPOINT-vision-BACKEND"
    )

    def __post_init__(self) -> None:
        require(self.backend in VISION_BACKENDS, "vision.backend", self.backend, "|".join(VISION_BACKENDS))
        needs_none = self.backend == "torch" and self.folder is not None
        require(not needs_none, "vision.folder", self.folder, "vision.backend=onnx or om with it; torch reads none")


@dataclass
class EngineConfig:
    max_model_len: int | None = key(
        None, "most tokens of prompt plus answer; default: the model's own limit, at most 4096"
    )
    max_num_seqs: int = key(8, "most requests computed at once")
    max_pictures: int = key(
        8, "most pictures remembered at once, in families whose layers look at them (mllama, llama_adapter)"
    )
    max_num_batched_tokens: int = key(2048, "most tokens in one step; longer prompts are prefilled in chunks")
    max_prefill_tokens_beside_decode: int | None = key(
        None,
        "most tokens of prompts in a step in which other requests' answers go on, and stand still for as long; "
        "default: 128 on a CPU, else 512",
    )
    max_starts_beside_decode: int | None = key(
        None, "most requests begun in one step beside requests being answered; default: no limit (task=serve: 2)"
    )
    prefix_cache: bool = key(
        True, "keep what was computed of prompts and answers, for requests that begin alike (task=performance: false)"
    )
    embedding_cache_mib: int = key(
        256, "MiB of encoded pictures that rank 0 keeps, for requests that show them again (task=performance: 0)"
    )
    kv_cache_dtype: str = key(
        "auto", "auto (as the weights) or int8 (a scale for each token and head; half the memory, less exact)"
    )
    block_size: int | None = key(None, "tokens in one block of the paged KV cache; default: 16, on an NPU 128")
    num_blocks: int | None = key(
        None, "blocks of the KV cache; default: max_num_seqs times max_model_len; fewer means preemption"
    )
    decode_graph: str = key(
        "auto",
        "decode by graphs captured at the start: on, off or auto (task=plan says which, and why)",
    )

    def __post_init__(self) -> None:
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_pictures",
            "max_num_batched_tokens",
            "max_prefill_tokens_beside_decode",
            "max_starts_beside_decode",
            "block_size",
            "num_blocks",
        ):
            value = getattr(self, name)
            require(value is None or value > 0, f"engine.{name}", value, "a whole number above 0")
        require(self.embedding_cache_mib >= 0, "engine.embedding_cache_mib", self.embedding_cache_mib, "0 or above")
        require(
            self.kv_cache_dtype in KV_CACHE_DTYPES,
            "engine.kv_cache_dtype",
            self.kv_cache_dtype,
            "|".join(KV_CACHE_DTYPES),
        )
        require(self.decode_graph in DECODE_GRAPHS, "engine.decode_graph", self.decode_graph, "|".join(DECODE_GRAPHS))
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise UserError(
                f"engine.max_num_batched_tokens={self.max_num_batched_tokens} is below engine.max_num_seqs="
                f"{self.max_num_seqs}: each running request needs one token a step; raise the first or lower the second"
            )


@dataclass
class LauncherConfig:
    master_port: int | None = key(
        None, "port of the ranks' meeting point; default: MASTER_PORT, else the first free of 20030-20050"
    )
    timeout_s: int = key(1800, "seconds after which a collective that makes no progress ends the job")
    max_restarts: int = key(0, "how often ranks are started again when one of them has failed (task=serve)")

    def __post_init__(self) -> None:
        port = self.master_port
        require(port is None or 0 < port < 65536, "launcher.master_port", port, "1 to 65535")
        require(self.timeout_s > 0, "launcher.timeout_s", self.timeout_s, "a whole number above 0")
        require(self.max_restarts >= 0, "launcher.max_restarts", self.max_restarts, "a whole number, 0 or above")


@dataclass
class SamplingParams:
    """How the next token is chosen; the names are vLLM's. Usable in a request and on the command line."""

    max_new_tokens: int = key(256, "most tokens of an answer")
    min_new_tokens: int = key(0, "no end-of-sequence and none of stop_token_ids before this many tokens")
    temperature: float = key(0.0, "0 is greedy; above, the logits are divided by it before sampling")
    top_p: float = key(1.0, "sample among the likeliest tokens that hold this share of the probability")
    top_k: int = key(
        0, "sample among this many likeliest tokens; 0 or -1: all (model=vlmo: how many answers to name; 0 or -1: 5)"
    )
    min_p: float = key(0.0, "sample among the tokens at least this share as probable as the likeliest")
    typical_p: float = key(
        1.0, "sample among the tokens nearest to the expected information that hold this share of the probability"
    )
    repetition_penalty: float = key(1.0, "above 1: tokens of prompt and answer become less likely")
    frequency_penalty: float = key(0.0, "-2 to 2: taken off a token's logit each time the answer has it already")
    presence_penalty: float = key(0.0, "-2 to 2: taken off a token's logit once the answer has it")
    logit_bias: dict[int, float] = key({}, "added to the logits of these tokens, as in {13:-100}; -100 to 100")
    seed: int | None = key(None, "seed of this request's own random numbers; default: drawn anew")
    stop: list[str] = key([], "the answer ends before the first of these texts")
    stop_token_ids: list[int] = key([], "the answer ends at the first of these tokens, whose text is left out")
    include_stop_str_in_output: bool = key(False, "keep the text that ended the answer, or that of its last token")
    ignore_eos: bool = key(False, "go on after the end-of-sequence token")
    skip_special_tokens: bool = key(True, "leave special tokens out of the text")
    logprobs: int | None = key(None, "report each token's log probability and this many best alternatives")
    json_schema: str | None = key(
        None, "the answer is JSON of this schema ({}: any object); takes pip install 'mmdist[guided]'"
    )
    regex: str | None = key(None, "the whole answer matches this regular expression; takes mmdist[guided] too")

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        if isinstance(self.json_schema, dict):
            self.json_schema = json.dumps(self.json_schema)
        if isinstance(self.logit_bias, dict):  # JSON's keys are texts
            self.logit_bias = {as_number(token_id): bias for token_id, bias in self.logit_bias.items()}
        for name, hint in SAMPLING_TYPES.items():
            check_value(name, getattr(self, name), hint)
        if self.temperature < MIN_TEMPERATURE:
            self.temperature = 0.0
        least, most = self.min_new_tokens, self.max_new_tokens
        require(least <= most, "min_new_tokens", least, f"at most max_new_tokens={most}")
        require(all(self.stop), "stop", self.stop, "texts of at least one character")
        require(all(i >= 0 for i in self.stop_token_ids), "stop_token_ids", self.stop_token_ids, "ids, 0 or above")
        legal = all(i >= 0 and abs(bias) <= MAX_LOGIT_BIAS for i, bias in self.logit_bias.items())
        require(legal, "logit_bias", self.logit_bias, f"ids, each with -{MAX_LOGIT_BIAS} to {MAX_LOGIT_BIAS}")
        check_guided(self)


SAMPLING_TYPES = get_type_hints(SamplingParams)
MIN_TEMPERATURE = 1e-5  # below, it is 0 (as in vLLM): logits divided by less leave float32
MAX_LOGIT_BIAS = 100  # OpenAI's, as are the penalties' limits
LIMITS: dict[str, tuple[float, float]] = {
    "max_new_tokens": (1, inf),
    "min_new_tokens": (0, inf),
    "temperature": (0, 1000),  # beyond float32, logits that are taken out would be no numbers
    "top_k": (-1, inf),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),  # beyond, logits leave float32
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
    "seed": (-(2**63), 2**64 - 1),  # torch's
    "logprobs": (0, inf),
}


def as_number(token_id: Any) -> Any:
    return int(token_id) if isinstance(token_id, str) and token_id.isdecimal() else token_id


def check_value(name: str, value: Any, hint: Any) -> None:
    if not has_type(value, hint):
        raise UserError(f"{name}={value!r}: expected {type_name(hint)}")
    require(not isinstance(value, float) or isfinite(value), name, value, "a finite number")
    if name in ("top_p", "typical_p"):
        require(0 < value <= 1, name, value, "above 0, at most 1")
    if name in LIMITS and value is not None:
        low, high = LIMITS[name]
        require(low <= value <= high, name, value, f"{low} to {high}" if high < inf else f"{low} or above")


def check_guided(params: SamplingParams) -> None:
    """json_schema and regex, whose grammar decides when the answer ends."""
    if params.json_schema is None and params.regex is None:
        return
    if params.json_schema is not None and params.regex is not None:
        raise UserError("json_schema and regex are both given; an answer follows one of them")
    name = "regex" if params.json_schema is None else "json_schema"
    if params.ignore_eos or params.min_new_tokens:
        other = "ignore_eos" if params.ignore_eos else "min_new_tokens"
        raise UserError(f"{other} does not go with {name}, which ends when the answer is complete; leave it out")
    if params.json_schema is not None:
        try:
            schema = json.loads(params.json_schema)
        except (ValueError, RecursionError) as error:
            raise UserError(f"json_schema is not JSON: {error}") from error
        require(isinstance(schema, dict), "json_schema", params.json_schema, "a JSON object")


SAMPLING_KEYS = tuple(f.name for f in fields(SamplingParams))


@dataclass
class Config:
    """The keys of every task; each task adds its own in a subclass."""

    task: str = key("", "what to do: a file in mmdist/tasks and a yaml in conf/task")
    world_size: int | str = key(
        "auto", "ranks; auto: a split folder's, else the visible accelerators (2 on a CPU) rounded to a legal size"
    )
    checkpoint: str | None = key(None, "folder with config.json and safetensors, or one made by weights_tools split")
    dtype: str = key("auto", "auto (the checkpoint's; float16 becomes bfloat16 on a CPU), float32, float16 or bfloat16")
    output_dir: str | None = key(None, "the job's folder, made by rank 0; default: outputs/DATE/TIME")
    model: ModelConfig = group(ModelConfig, "the model family")
    hardware: HardwareConfig = group(HardwareConfig, "where it runs")
    quant: QuantConfig = group(QuantConfig, "weights in integers")
    vision: VisionConfig = group(VisionConfig, "what computes the vision tower")
    engine: EngineConfig = group(EngineConfig, "batching and the KV cache")
    launcher: LauncherConfig = group(LauncherConfig, "how the ranks are started")

    def __post_init__(self) -> None:
        size = self.world_size
        require(
            size == "auto" or (isinstance(size, int) and size > 0), "world_size", size, "auto or a whole number above 0"
        )
        require(self.dtype in DTYPES, "dtype", self.dtype, "|".join(DTYPES))
