"""The keys that each task adds to those of every task; TASKS names them. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from mmdist.config import Config, SamplingParams, key, require


@dataclass
class VideoConfig:
    video_frames: int = key(8, "frames taken from a video, evenly spread (model=llava_next_video)")

    def check_video(self) -> None:
        require(self.video_frames > 0, "video_frames", self.video_frames, "a whole number above 0")


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
        None, "a file of requests (one JSON object a line), or a folder of pictures (then with prompt=)"
    )
    output: str | None = key(
        None,
        "the file of answers, one JSON object a line; default: answers.jsonl in the job's folder "
        "(with images= and texts=: an .npz of scores; scores.npz)",
    )
    prompt: str | None = key(None, "the question asked about every picture of a folder")
    images: str | None = key(
        None, "pictures to compare with texts=, instead of input=: a folder, or a file of paths (model=vlmo)"
    )
    texts: str | None = key(None, "texts to compare with images=: a file, one text a line")

    def __post_init__(self) -> None:
        Config.__post_init__(self)
        SamplingParams.__post_init__(self)
        self.check_video()
        if self.images is None and self.texts is None:
            require(self.input is not None, "input", None, "a requests.jsonl or a folder of pictures: input=FILE")
            return
        require(self.images is not None, "images", None, "a folder of pictures, or a file of their paths, with texts=")
        require(self.texts is not None, "texts", None, "a file of texts, one a line, with images=")
        require(self.input is None, "input", self.input, "nothing beside images= and texts=")
        require(self.prompt is None, "prompt", self.prompt, "nothing beside images= and texts=")


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


# The schema of each task, by the name of its yaml and of its file.
TASKS: dict[str, type[Config]] = {
    "chat": ChatConfig,
    "generate": GenerateConfig,
    "plan": PlanConfig,
    "doctor": DoctorConfig,
}
