"""Retrieval: how often what belongs together is among the first k."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mmdist.config import UserError

KS = (1, 5, 10)


def recall(scores: np.ndarray, image_of_text: list[int]) -> dict[str, dict[str, float]]:
    """scores (images, texts), higher is closer; image_of_text: the picture each text belongs to.

    {"texts": of a picture's texts one is among its k best, "images": a text's picture is among its k best}, by k.
    """
    check(scores, image_of_text)
    belongs = np.arange(len(scores))[:, None] == np.array(image_of_text)[None, :]
    text_ranks = first_rank(scores, belongs)[belongs.any(axis=1)]
    image_ranks = first_rank(scores.T, belongs.T)
    return {
        name: {str(k): float(np.mean(ranks < k)) for k in KS}
        for name, ranks in (("texts", text_ranks), ("images", image_ranks))
    }


def first_rank(scores: np.ndarray, belongs: np.ndarray) -> np.ndarray:
    """(rows,): how many that do not belong are as close as a row's best that does. A tie counts against the model, so
    that one which scores all alike finds nothing."""
    best = np.where(belongs, scores, -np.inf).max(axis=1, keepdims=True)
    return ((scores >= best) & ~belongs).sum(axis=1)


def check(scores: np.ndarray, image_of_text: list[int]) -> None:
    if scores.ndim != 2 or scores.shape[1] != len(image_of_text):
        raise UserError(f"scores of shape {scores.shape} for {len(image_of_text)} texts: expected (images, texts)")
    if not np.isfinite(scores).all():
        raise UserError(f"{(~np.isfinite(scores)).sum()} of {scores.size} scores are no finite numbers")
    wrong = [image for image in image_of_text if not 0 <= image < len(scores)]
    if wrong:
        raise UserError(f"a text belongs to picture {wrong[0]} of {len(scores)}")


def read_coco_captions(path: Path) -> tuple[list[str], list[str], list[int]]:
    """COCO's captions_*.json -> (file names of the pictures that have captions, captions, picture of each caption)."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        file_names = {image["id"]: str(image["file_name"]) for image in data["images"]}
        captions: list[tuple[Any, str]] = [(entry["image_id"], str(entry["caption"])) for entry in data["annotations"]]
        names = [file_names[image] for image in dict.fromkeys(image for image, _ in captions)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"texts={path}: not COCO's captions ({type(error).__name__}: {error}); expected "
            '{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}'
        ) from error
    if not captions:
        raise UserError(f"texts={path}: no captions in it")
    index = {name: i for i, name in enumerate(names)}
    # A caption is one line of a file of texts.
    return names, [" ".join(text.split()) for _, text in captions], [index[file_names[image]] for image, _ in captions]
