"""How each family is evaluated: what is drawn, what is asked, and how a line of the requests looks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clips import CLIP_KINDS, Clip
from questions import KINDS, Question
from world import Scene, draw


@dataclass(frozen=True)
class Case:
    """One picture or clip with one question; `aspect` is a key of world.ASPECTS."""

    id: str
    aspect: str
    scene: Scene | Clip
    question: Question

    @property
    def text(self) -> str:
        return as_typed(self.question.text)

    @property
    def expected(self) -> dict:
        line = {"id": self.id, "question": self.text, "answer": self.question.answer}
        return line | {"kind": self.question.kind, "aspect": self.aspect}


def as_typed(text: str) -> str:
    """The question as a person writes it: a capital first, no blank before the mark."""
    return text[0].upper() + text[1:].replace(" ?", "?").replace(" .", ".")


def ask_with_picture(part: str, text: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": part}, {"type": "text", "text": text}]}]


def write_picture(case: Case, folder: Path) -> str:
    """An absolute path, so a reader may stand anywhere."""
    path = folder / f"{case.id}.png"
    draw(case.scene).save(path)
    return str(path)


def chat_request(case: Case, folder: Path) -> dict[str, Any]:
    messages = ask_with_picture("image", case.text)
    return {"id": case.id, "messages": messages, "images": [write_picture(case, folder)]}


def video_request(case: Case, folder: Path) -> dict[str, Any]:
    """Frames as uint8 (frames, height, width, 3)."""
    path = folder / f"{case.id}.npy"
    np.save(path, np.stack([np.asarray(frame) for frame in case.scene.draw()]))
    return {"id": case.id, "video": str(path), "messages": ask_with_picture("video", case.text)}


def classifier_request(case: Case, folder: Path) -> dict[str, Any]:
    return {"id": case.id, "image": write_picture(case, folder), "question": case.text}


@dataclass(frozen=True)
class Family:
    """Cases take turns at the kinds (of KINDS or of CLIP_KINDS) and at the aspects."""

    kinds: tuple[str, ...]
    aspects: tuple[str, ...]
    mean_side: tuple[float, float] = (88.0, 124.0)  # pixels
    num: int = 300
    threshold: float = 0.9
    request: Callable[[Case, Path], dict[str, Any]] = chat_request
    answer_key: str = "text"  # of a line of answers

    @property
    def is_clip(self) -> bool:
        return set(self.kinds) <= set(CLIP_KINDS)


# Kinds that every family is asked; the relations (left_of, above) and lists take the longest to learn.
BASIC = ("color", "shape", "count", "size", "side", "level", "exists", "caption")

# Those of them whose answers are in questions.ANSWERS.
CLOSED = tuple(kind for kind in BASIC if kind != "caption")

FAMILIES = {
    "llava_next": Family(tuple(KINDS), ("normal", "odd"), num=500, threshold=0.95),
    "llava": Family(tuple(KINDS), ("square",)),
    "llava_next_video": Family(tuple(CLIP_KINDS), ("square",), request=video_request),
    "mllama": Family(tuple(KINDS), ("normal", "odd")),
    "vlmo": Family(CLOSED, ("normal", "odd"), request=classifier_request, answer_key="answer"),
    "llama_adapter": Family((*BASIC, "list"), ("square",)),
    "minigpt4": Family(tuple(KINDS), ("normal",)),
}
