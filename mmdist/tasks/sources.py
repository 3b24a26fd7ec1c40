"""What a job is asked: a file of requests, pictures of a folder, or questions of an arrow file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from mmdist.config import SamplingParams, UserError
from mmdist.engine.request import Request
from mmdist.media import read_image
from mmdist.models.base import Processor
from mmdist.precision.vqa import VqaData
from mmdist.tasks.requests import (
    as_list,
    build_request,
    check_message,
    expand_question,
    list_pictures,
    merge_params,
    open_picture,
    read_folder,
    read_requests,
    user_message,
)

QUESTION = "{question}"  # in prompt=, where a question of an arrow file goes


class Source:
    """entries: one a request, each with its id; a request is built when its turn comes, so that not all pictures are
    in memory. key: what the user gave the path as. pictures: those of a folder."""

    def __init__(self, path: Path, prompt: str | None, key: str):
        listed = read_folder(path, str(prompt), key) if path.is_dir() else read_requests(path)
        self.entries: list[dict[str, Any]] = list(listed)
        self.folder = path if path.is_dir() else path.parent
        self.pictures = [Path(entry["images"][0]) for entry in self.entries] if path.is_dir() else []

    def build(self, entry: dict[str, Any], processor: Processor, config: Any) -> Request:
        """config: the job's, with its sampling keys and video_frames; UserError for what cannot be asked."""
        return build_request(entry, processor, config, self.folder, config.video_frames)

    def picture(self, entry: dict[str, Any]) -> Image.Image:
        """The one that an entry asks about."""
        entry = expand_question(entry)
        messages = [check_message(message) for message in as_list(entry, "messages")]
        pictures = list_pictures(as_list(entry, "images"), messages)
        if len(pictures) != 1:
            raise UserError(f"request {entry['id']} has {len(pictures)} pictures; a judge looks at one")
        return open_picture(pictures[0], self.folder)


class QuestionSource(Source):
    """prompt: what is put around each question."""

    def __init__(self, path: Path, prompt: str | None):
        self.prompt, self.data = prompt or QUESTION, VqaData(path)
        self.questions = {question.id: question for question in self.data.questions()}
        self.entries, self.pictures = [{"id": name} for name in self.questions], []

    def build(self, entry: dict[str, Any], processor: Processor, config: SamplingParams) -> Request:
        message = user_message(self.prompt.replace(QUESTION, self.questions[entry["id"]].text), 1)
        prompt = processor.prompt(messages=[message], images=[self.picture(entry)])
        return Request(entry["id"], prompt, merge_params({}, config))

    def picture(self, entry: dict[str, Any]) -> Image.Image:
        return read_image(self.data.picture(self.questions[entry["id"]].row), f"{self.data.path}: {entry['id']}")


def check_source(path: Path, prompt: str | None, key: str) -> None:
    """What can be known before any rank is started."""
    if not path.exists():
        raise UserError(f"{key}={path}: no such file or folder")
    if path.is_dir() and prompt is None:
        raise UserError(f"{key}={path} is a folder of pictures: ask something with prompt=TEXT")
    if is_arrow(path):
        if prompt is not None and QUESTION not in prompt:
            raise UserError(f"prompt={prompt}: {key}={path} has its own questions; say with {QUESTION} where they go")
        VqaData(path)
    elif path.is_file() and prompt is not None:
        raise UserError(f"{key}={path} is a file of requests, which have their own prompts: leave prompt= out")


def open_source(path: Path, prompt: str | None, key: str) -> Source:
    return QuestionSource(path, prompt) if is_arrow(path) else Source(path, prompt, key)


def is_arrow(path: Path) -> bool:
    return path.is_file() and path.suffix == ".arrow"
