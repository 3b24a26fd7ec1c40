"""From what a user wrote (a line of JSON, a picture's path) to a Request; mistakes named, none fatal to the others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from mmdist.config import SAMPLING_KEYS, SamplingParams, UserError
from mmdist.engine.request import Request
from mmdist.media import PICTURE_SUFFIXES, find_file, load_image, load_video, user_message
from mmdist.models.base import Processor

REQUEST_KEYS = {"id", "messages", "prompt", "question", "image", "images", "video", *SAMPLING_KEYS}
ROLES = ("system", "user", "assistant")


def read_requests(path: Path) -> Iterator[dict[str, Any]]:
    """One entry a line; a line that is no object becomes an entry that build_request refuses."""
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield parse_line(line, number)


def parse_line(line: str, number: int) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        return {"id": f"line {number}", "error": f"line {number} is not JSON: {error}"}
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str | int):
        return {"id": f"line {number}", "error": f'line {number}: expected an object with an "id" (text or number)'}
    return entry


def read_folder(folder: Path, prompt: str, key: str = "input") -> Iterator[dict[str, Any]]:
    """One entry a picture, sorted by name, which is the id."""
    pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)
    if not pictures:
        raise UserError(f"{key}={folder}: no pictures in it ({', '.join(sorted(PICTURE_SUFFIXES))})")
    for path in pictures:
        yield {"id": path.name, "messages": [user_message(prompt, 1)], "images": [str(path.resolve())]}


def build_request(
    entry: dict[str, Any], processor: Processor, defaults: SamplingParams, folder: Path, video_frames: int = 8
) -> Request:
    """Relative paths are looked up from the working directory, then from `folder`, that of the requests."""
    if "error" in entry:
        raise UserError(entry["error"])
    unknown = sorted(entry.keys() - REQUEST_KEYS)
    if unknown:
        raise UserError(f"unknown key {unknown[0]}; a request has {', '.join(sorted(REQUEST_KEYS))}")
    entry = expand_question(entry)
    if ("messages" in entry) == ("prompt" in entry):
        raise UserError('a request has either "messages" or "prompt" (or a "question" with an "image")')
    params = merge_params(entry, defaults)
    messages = [check_message(message) for message in as_list(entry, "messages")] if "messages" in entry else None
    text = entry.get("prompt")
    if messages is None and not isinstance(text, str):
        raise UserError(f"prompt: expected text, found {type(text).__name__}")
    pictures = list_pictures(as_list(entry, "images"), messages or [])
    media: dict[str, Any] = {"images": [open_picture(picture, folder) for picture in pictures]}
    if "video" in entry:
        media["videos"] = [load_video(video_path(entry["video"], processor, folder), video_frames)]
    return Request(str(entry["id"]), processor.prompt(messages=messages, text=text, **media), params)


def expand_question(entry: dict[str, Any]) -> dict[str, Any]:
    """{"question", "image"}, the short way to write one message about one picture, as {"messages", "images"}."""
    if not entry.keys() & {"question", "image"}:
        return entry
    if entry.keys() & {"messages", "prompt", "images", "video"}:
        raise UserError('"question" and "image" stand alone, without "messages", "prompt", "images" or "video"')
    if not all(isinstance(entry.get(name), str) for name in ("question", "image")):
        raise UserError('a "question" has an "image" and an "image" a "question", both text')
    rest = {name: value for name, value in entry.items() if name not in ("question", "image")}
    return rest | {"messages": [user_message(entry["question"], 1)], "images": [entry["image"]]}


def video_path(value: Any, processor: Processor, folder: Path) -> Path:
    if not isinstance(value, str):
        raise UserError(f"video: expected a path, found {type(value).__name__}")
    check_takes_video(processor, value)
    return find_file(value, folder)


def check_takes_video(processor: Processor, video: str) -> None:
    if not processor.takes_video:
        raise UserError(f"video={video}: this family takes pictures only; model=llava_next_video takes videos")


def as_list(entry: dict[str, Any], name: str) -> list[Any]:
    value = entry.get(name, [])
    if not isinstance(value, list):
        raise UserError(f"{name}: expected a list, found {type(value).__name__}")
    return value


def check_message(message: Any) -> dict[str, Any]:
    """A chat message with its content as a list of parts (a bare text becomes one part)."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise UserError(f'messages: expected objects with a "role" of {", ".join(ROLES)}')
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(map(is_part, parts)):
        raise UserError(
            'messages: "content" is text or a list of {"type": "text", "text": TEXT} and {"type": "image"} or "video"'
        )
    return {**message, "content": parts}


def is_part(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    return part.get("type") in ("image", "video") or (part.get("type") == "text" and isinstance(part.get("text"), str))


def open_picture(picture: str | Image.Image, folder: Path) -> Image.Image:
    """A file's; a program may also give one that is open."""
    return picture.convert("RGB") if isinstance(picture, Image.Image) else load_image(find_file(picture, folder))


def list_pictures(images: list[Any], messages: list[dict[str, Any]]) -> list[str | Image.Image]:
    """One an image part: its own (transformers' "path"), else the next of the request's images."""
    rest = iter(images)
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    pictures = [part["path"] if "path" in part else next(rest, None) for part in parts]
    pictures = [picture for picture in pictures if picture is not None] + list(rest)
    if not all(isinstance(picture, str | Image.Image) for picture in pictures):
        raise UserError("images: expected a list of paths")
    return pictures


def merge_params(entry: dict[str, Any], defaults: SamplingParams) -> SamplingParams:
    """The request's sampling keys over the command line's."""
    given = {name: entry[name] for name in SAMPLING_KEYS if name in entry}
    return SamplingParams(**{name: getattr(defaults, name) for name in SAMPLING_KEYS} | given)
