"""The keys that each task adds to those of every task; TASKS names them. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mmdist.config import DTYPES, Config, EngineConfig, SamplingParams, group, key, require

VLLM_STREAMS = ("ndjson_cumulative", "nul_delta")
RECORDS = ("none", "logits", "layers")


def nothing_kept() -> EngineConfig:
    """Where every request is to be computed from its beginning, as often as it comes."""
    return EngineConfig(prefix_cache=False, embedding_cache_mib=0)


@dataclass
class VideoConfig:
    video_frames: int = key(8, "frames taken from a video, evenly spread (model=llava_next_video)")

    def check_video(self) -> None:
        require(self.video_frames > 0, "video_frames", self.video_frames, "a whole number above 0")


@dataclass
class ServerConfig:
    host: str = key("127.0.0.1", "the address to listen on; 0.0.0.0: every one of the machine's")
    port: int = key(8000, "the port to listen on")
    model_name: str | None = key(None, "what clients call the model; default: the family's name")
    api_key_file: str | None = key(
        None, "a file of keys, one a line, of which clients send one; MMDIST_API_KEYS (split by commas) adds more"
    )
    ssl_certfile: str | None = key(None, "a certificate (PEM), to serve https")
    ssl_keyfile: str | None = key(None, "its private key")
    cors_origins: list[str] = key([], "web pages of other origins that may ask, as https://HOST")
    access_log: bool = key(True, "log one JSON line a request on stdout")
    max_queue: int = key(256, "requests that may wait behind those being computed; beyond: 429")
    max_body_mb: float = key(64, "largest body of a request, in 10^6 bytes; beyond: 413")
    body_timeout_s: float = key(30, "seconds a client may take to send a request's headers, and again its body")
    request_timeout_s: float = key(600, "seconds a request may take, waiting included")
    shutdown_timeout: float = key(30, "seconds that running requests may take to finish after SIGTERM")
    max_pictures: int = key(20, "most pictures of one request")
    max_image_pixels: int = key(40_000_000, "most pixels of one picture")
    max_media_mb: float = key(20, "largest file of one picture or video, in 10^6 bytes")
    media_timeout_s: float = key(5, "seconds that fetching one of them may take")
    allowed_media_domains: list[str] = key([], "hosts (HOST or HOST:PORT) that pictures may be fetched from; no others")
    allowed_media_path: str | None = key(None, "the folder below which requests may name files; default: none")
    max_choices: int = key(16, "most answers to one request (n)")
    vllm_stream: str = key(
        "ndjson_cumulative", "how /generate streams in vLLM's format: ndjson_cumulative, or nul_delta as MindIE does"
    )

    def __post_init__(self) -> None:
        require(0 <= self.port < 65536, "server.port", self.port, "0 to 65535 (0: any free one)")
        require(self.vllm_stream in VLLM_STREAMS, "server.vllm_stream", self.vllm_stream, "|".join(VLLM_STREAMS))
        for name in ("max_queue", "shutdown_timeout"):
            require(getattr(self, name) >= 0, f"server.{name}", getattr(self, name), "0 or above")
        for name in (
            "max_body_mb",
            "body_timeout_s",
            "request_timeout_s",
            "max_pictures",
            "max_image_pixels",
            "max_media_mb",
            "media_timeout_s",
            "max_choices",
        ):
            require(getattr(self, name) > 0, f"server.{name}", getattr(self, name), "above 0")
        both = (self.ssl_certfile is None) == (self.ssl_keyfile is None)
        require(both, "server.ssl_keyfile", self.ssl_keyfile, "a key with server.ssl_certfile, or neither")


@dataclass
class ServeConfig(VideoConfig, Config):
    server: ServerConfig = group(ServerConfig, "how task=serve listens and what it lets in")

    def __post_init__(self) -> None:
        Config.__post_init__(self)
        self.check_video()


@dataclass
class LibraryConfig(VideoConfig, Config):
    def __post_init__(self) -> None:
        Config.__post_init__(self)
        self.check_video()


@dataclass
class ChatConfig(VideoConfig, SamplingParams, Config):
    image: str | None = key(None, "a picture")
    video: str | None = key(None, "a video instead: a file that PyAV reads, or frames as .npy")
    prompt: str | None = key(None, "a question; without one, and with a terminal, a conversation starts")

    def __post_init__(self) -> None:
        Config.__post_init__(self)
        SamplingParams.__post_init__(self)
        self.check_video()


@dataclass
class GenerateConfig(VideoConfig, SamplingParams, Config):
    input: str | None = key(
        None,
        "a file of requests (one JSON object a line), a folder of pictures (then with prompt=), or an .arrow file of "
        "questions as VLMo writes it",
    )
    output: str | None = key(
        None,
        "the file of answers, one JSON object a line; default: answers.jsonl in the job's folder "
        "(with images= and texts=: an .npz of scores; scores.npz)",
    )
    prompt: str | None = key(
        None, "the question asked about every picture of a folder; with an arrow file, text around {question}"
    )
    timing: bool = key(False, "add to each answer its seconds in the engine, and those since the run began")
    images: str | None = key(
        None, "pictures to compare with texts=, instead of input=: a folder, or a file of paths (model=vlmo)"
    )
    texts: str | None = key(
        None, "texts to compare with images=: a file, one text a line, or COCO's captions (.json) about these pictures"
    )
    record: str = key(
        "none",
        "logits or layers: keep these numbers too, in a folder OUTPUT.record, for task=precision "
        "(logprobs=20 then, unless given; and nothing is taken from engine.prefix_cache or embedding_cache_mib)",
    )

    def __post_init__(self) -> None:
        Config.__post_init__(self)
        SamplingParams.__post_init__(self)
        self.check_video()
        require(self.record in RECORDS, "record", self.record, "|".join(RECORDS))
        if self.record != "none":
            self.engine = replace(self.engine, prefix_cache=False, embedding_cache_mib=0)
            self.logprobs = 20 if self.logprobs is None else self.logprobs
        if self.images is None and self.texts is None:
            require(
                self.input is not None,
                "input",
                None,
                "a requests.jsonl, a folder of pictures or an arrow file: input=FILE",
            )
            return
        require(self.images is not None, "images", None, "a folder of pictures, or a file of their paths, with texts=")
        require(self.texts is not None, "texts", None, "a file of texts, one a line, with images=")
        require(self.input is None, "input", self.input, "nothing beside images= and texts=")
        require(self.prompt is None, "prompt", self.prompt, "nothing beside images= and texts=")


@dataclass
class PrecisionConfig(VideoConfig, SamplingParams, Config):
    data: str | None = key(
        None,
        "what both sides answer: a file of requests, a folder of pictures (then with prompt=), or an .arrow file of "
        "questions as VLMo writes it, whose accepted answers are counted",
    )
    prompt: str | None = key(
        None, "the question asked about every picture of a folder; with an arrow file, text around {question}"
    )
    images: str | None = key(None, "instead of data=, pictures to compare with texts= (model=vlmo for retrieval)")
    texts: str | None = key(
        None, "texts to compare with images=: a file, one text a line, or COCO's captions (.json) about these pictures"
    )
    reference: str = key(
        "world_size_1",
        "world_size_1 (this engine on one rank), transformers, a file that task=generate logprobs=20 wrote, the folder "
        "of another checkpoint; or none, to score our answers alone",
    )
    answers: str | None = key(None, "a file of answers to check, instead of asking this engine")
    reference_dtype: str | None = key(None, "dtype= of a reference that is computed; default: dtype=")
    judge: str | None = key(None, "clip: how well the answers go with their pictures, as CLIP sees it")
    judge_checkpoint: str | None = key(None, "a folder of transformers' CLIPModel, or a weight file of open_clip")
    judge_model: str = key("ViT-H-14", "the architecture of an open_clip file")
    layers: bool = key(False, "compare every layer's output too, and name the first that drifts")
    max_logit_error: float = key(1e-4, "threshold: largest difference of a logit (or, of saved files, log probability)")
    max_rms_error: float = key(1e-5, "threshold: root of the mean squared difference of the logits")
    max_kl: float = key(1e-9, "threshold: largest KL(reference || ours) of a position, in nats")
    min_token_agreement: float = key(1.0, "threshold: share of tokens before the first divergence; near ties apart")
    max_layer_error: float = key(1e-5, "with layers=true, where a layer drifts: RMS of the difference over RMS")
    max_score_loss: float = key(
        0.005, "threshold: how much lower than the reference's a score (accuracy, CLIP's cosine, recall) may be"
    )

    def __post_init__(self) -> None:
        Config.__post_init__(self)
        SamplingParams.__post_init__(self)
        self.check_video()
        for name, other in (("images", self.texts), ("texts", self.images)):
            missing = getattr(self, name) is None and other is not None
            require(not missing, name, None, "images=FOLDER and texts=FILE together")
        require(self.images is None or self.data is None, "data", self.data, "nothing beside images= and texts=")
        require(self.temperature == 0, "temperature", self.temperature, "0: only greedy answers can be compared")
        dtype = self.reference_dtype
        require(dtype is None or dtype in DTYPES, "reference_dtype", dtype, "|".join(DTYPES))
        require(0 <= self.min_token_agreement <= 1, "min_token_agreement", self.min_token_agreement, "0 to 1")
        require(self.judge in (None, "clip"), "judge", self.judge, "clip")
        require(
            (self.judge is None) == (self.judge_checkpoint is None),
            "judge_checkpoint",
            self.judge_checkpoint,
            "a CLIP model with judge=clip, and nothing without a judge",
        )
        for name in ("max_logit_error", "max_rms_error", "max_kl", "max_layer_error", "max_score_loss"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or above")


@dataclass
class TableConfig(Config):
    format: str = key("table", "table for people, json for programs")

    def __post_init__(self) -> None:
        Config.__post_init__(self)
        require(self.format in ("table", "json"), "format", self.format, "table|json")


@dataclass
class PlanConfig(TableConfig):
    pass


@dataclass
class DoctorConfig(TableConfig):
    pass


@dataclass
class PerformanceConfig(VideoConfig, Config):
    batch_sizes: list[int] = key([1, 2, 4, 8], "how many equal requests are begun at once; a point each")
    input_len: int | None = key(
        None, "tokens of a prompt, its picture's among them; default: what prompt= and the picture come to"
    )
    output_len: int = key(256, "tokens of an answer; none ends before (model=vlmo answers at once)")
    image: str | None = key(
        None, "the picture of every request; default: none (with the shipped checkpoint its own picture or video)"
    )
    video: str | None = key(None, "a video instead: a file that PyAV reads, or frames as .npy")
    prompt: str = key("Describe it in detail.", "the question of every request")
    repeats: int = key(3, "how often a point is measured; medians and spread are over these")
    warmup: int = key(1, "runs of a point before that")
    climb: bool = key(False, "after batch_sizes, double the batch until memory, max_tpot_ms or max_batch_size ends it")
    max_tpot_ms: float | None = key(None, "with climb=true: the longest median time per output token")
    max_batch_size: int = key(256, "with climb=true: the largest batch, for which the engine reserves")
    profile: bool = key(False, "also write a Chrome trace of each rank and batch size, of a run with a few tokens")
    resume: bool = key(False, "keep what output_dir= has measured of the same settings, with -m whole jobs")
    compare: str | None = key(None, "a performance.json of before: print ratios, exit code 1 if anything is worse")
    max_regression: float = key(0.1, "with compare=: how much worse is allowed, as a share")
    engine: EngineConfig = group(nothing_kept, "batching and the KV cache")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_video()
        sizes = self.batch_sizes
        require(bool(sizes) and min(sizes) > 0, "batch_sizes", sizes, "whole numbers above 0, as in [1,2,4]")
        for name in ("input_len", "output_len", "repeats", "max_batch_size"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "a whole number above 0")
        require(self.warmup >= 0, "warmup", self.warmup, "a whole number, 0 or above")
        require(self.image is None or self.video is None, "video", self.video, "a picture or a video, not both")
        require(self.max_tpot_ms is None or self.climb, "max_tpot_ms", self.max_tpot_ms, "climb=true beside it")
        require(self.max_tpot_ms is None or self.max_tpot_ms > 0, "max_tpot_ms", self.max_tpot_ms, "above 0")
        require(not self.resume or self.output_dir is not None, "resume", self.resume, "output_dir=FOLDER to go on in")
        require(self.max_regression >= 0, "max_regression", self.max_regression, "0 or above, as a share: 0.1")
        self.engine = self.fit_engine()

    def fit_engine(self) -> EngineConfig:
        """Places for the largest batch, and where the lengths are known no more tokens than they come to."""
        engine = self.engine
        largest = max([*self.batch_sizes, self.max_batch_size] if self.climb else self.batch_sizes)
        total = None if self.input_len is None else self.input_len + self.output_len
        return replace(
            engine,
            max_num_seqs=largest,
            max_pictures=largest,
            max_model_len=engine.max_model_len or total,
        )


# The schema of each task, by the name of its yaml and of its file.
TASKS: dict[str, type[Config]] = {
    "chat": ChatConfig,
    "generate": GenerateConfig,
    "serve": ServeConfig,
    "library": LibraryConfig,
    "performance": PerformanceConfig,
    "precision": PrecisionConfig,
    "plan": PlanConfig,
    "doctor": DoctorConfig,
}
