"""Retrieval's scores as answers: of each picture the best text, and of each text the best picture."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmdist.config import UserError
from mmdist.engine.record import LAYER, Record, load_record
from mmdist.precision.answers import Answers

FEATURES = "features"  # as a stage, what pictures and texts are compared by


def pair_ids(image_names: Iterable[str], texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """What pictures and texts are called among answers and records; a text may be there more than once."""
    return unique("image", image_names), unique("text", texts)


def unique(kind: str, names: Iterable[str]) -> list[str]:
    seen: dict[str, int] = {}
    ids = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        ids.append(f"{kind}: {name}" + (f" ({seen[name]})" if seen[name] > 1 else ""))
    return ids


def read_scores(path: Path, key: str) -> Answers:
    """What task=generate images= texts= wrote; UserError where it is something else."""
    arrays = load_arrays(path, key)
    images, texts = pair_ids(arrays["image_names"].tolist(), arrays["texts"].tolist())
    logits = torch.from_numpy(arrays["logits_per_image"])
    answers = Answers(path, {}, {})
    for ids, others, rows, side in ((images, texts, logits, "image"), (texts, images, logits.T, "text")):
        features = torch.from_numpy(arrays[f"{side}_features"])
        for name, row, feature in zip(ids, rows, features, strict=True):
            best = int(row.argmax())
            answers.lines[name] = {"id": name, "label": best, "answer": others[best]}
            answers.records[name] = Record({**known_layers(path, name), "logits": row[None], LAYER + FEATURES: feature})
    return answers


def known_layers(path: Path, name: str) -> dict[str, torch.Tensor]:
    record = load_record(path, name)
    return {} if record is None else {LAYER + stage: rows for stage, rows in record.layers.items()}


def load_arrays(path: Path, key: str) -> dict[str, Any]:
    wanted = ("logits_per_image", "image_features", "text_features", "image_names", "texts")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in wanted}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{key}={path}: no scores of pictures and texts ({error}); give what task=generate images= texts= wrote"
        ) from error
