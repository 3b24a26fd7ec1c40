"""Which scores a job of task=precision asks for, and what they are taken of."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from mmdist.backend import find_device
from mmdist.config import UserError
from mmdist.precision.answers import Answers
from mmdist.precision.judge import check_judge, open_judge
from mmdist.precision.saved_answers import join_pictures, read_texts
from mmdist.precision.score_tables import ScoreTable, clip_scores, recall_scores, vqa_scores
from mmdist.task_config import PrecisionConfig
from mmdist.tasks.sources import QuestionSource, Source, is_arrow


def check(config: PrecisionConfig) -> None:
    is_question_file = config.data is not None and is_arrow(Path(config.data))
    scored = config.judge is not None or config.images is not None or is_question_file
    if config.reference == "none" and not scored:
        raise UserError(
            "reference=none: then there must be something to score: judge=clip, data=FILE.arrow, or images= and texts="
        )
    if config.judge is not None:
        if config.data is None:
            raise UserError(f"judge={config.judge}: give the pictures with data=FOLDER (or the requests, data=FILE)")
        check_judge(Path(str(config.judge_checkpoint)), config.judge_model)


def find_scores(config: PrecisionConfig, source: Source | None, sides: dict[str, Answers]) -> list[ScoreTable]:
    found = []
    if isinstance(source, QuestionSource):
        found.append(vqa_scores(list(source.questions.values()), sides))
    if config.judge is not None and source is not None:
        found.append(judge_captions(config, source, sides))
    return found


def count_found(ids: list[str], image_of_text: list[int], sides: dict[str, Answers]) -> ScoreTable:
    """Recall of retrieval. ids: of the pictures, then of the texts."""
    images = ids[: len(ids) - len(image_of_text)]
    return recall_scores({name: side_logits(side, images) for name, side in sides.items()}, image_of_text)


def side_logits(side: Answers, images: list[str]) -> np.ndarray:
    """(images, texts)"""
    return np.concatenate([side.records[name].tensors["logits"].numpy() for name in images])


def judge_captions(config: PrecisionConfig, source: Source, sides: dict[str, Answers]) -> ScoreTable:
    """Of what all sides have answered."""
    device = "cuda" if find_device(config.hardware) == "cuda" else "cpu"
    judge = open_judge(Path(str(config.judge_checkpoint)), config.judge_model, device)
    failed = {name for side in sides.values() for name in side.failed}
    answered = {
        name: Answers(side.path, {key: line for key, line in side.lines.items() if key not in failed})
        for name, side in sides.items()
    }
    entries = [entry for entry in source.entries if str(entry["id"]) not in failed]

    def pictures() -> Iterator[tuple[str, Image.Image]]:
        for entry in tqdm(entries, "judge", unit="picture", disable=not sys.stderr.isatty()):
            yield str(entry["id"]), source.picture(entry)

    return clip_scores(judge, pictures(), answered, is_budget_known(answered))


def is_budget_known(sides: dict[str, Answers]) -> bool:
    """Whether each side says how many tokens it was allowed (which are equal then, or it would have been refused)."""
    return len(sides) == 1 or all("params" in line for side in sides.values() for line in side.lines.values())


def texts_by_picture(path: Path, source: Source | None, key: str) -> Answers:
    """A seed's file of answers about pictures of a folder; lines with texts alone, by the pictures' names."""
    texts = read_texts(path)
    if source is None or not source.pictures:
        raise UserError(f"{key}={path} has answers by picture: give the folder of these pictures with data=FOLDER")
    joined = join_pictures(texts, source.pictures)
    return Answers(path, {picture.name: {"id": picture.name, "text": text} for picture, text in joined.items()})
