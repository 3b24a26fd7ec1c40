"""Questions about pictures and their accepted answers, in an arrow file as VLMo's write_vqa.py writes it; scores.

One row a picture: its bytes, questions, question_id, and for each question the accepted answers with their scores
(0.3, 0.6, 0.9 or 1.0: named by one, two, three or more of ten people, which is VQA's own soft score exactly).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mmdist.config import UserError
from mmdist.precision.vqa_answers import normalise

HAS_ARROW = find_spec("pyarrow") is not None  # the extra `vqa`
# What each column holds, and how deep in lists.
COLUMNS = {
    "image": ("bytes", 0),
    "questions": ("text", 1),
    "answers": ("text", 2),
    "answer_labels": ("integers", 2),
    "answer_scores": ("numbers", 2),
    "image_id": ("integers", 0),
    "question_id": ("integers", 1),
    "split": ("text", 0),
}
BUILD = "build one with examples/vqav2/make_arrow.py"


@dataclass
class Question:
    """row: its picture's. accepted: answer -> score."""

    id: str
    text: str
    row: int
    accepted: dict[str, float]


class VqaData:
    """An arrow file, mapped: pictures stay on the disk until they are asked for."""

    def __init__(self, path: Path):
        self.path = path
        self.table = open_table(path)
        check_columns(path, self.table.schema)

    def questions(self) -> list[Question]:
        """In the file's order; UserError where an id is there twice or a row's lists are not of one length."""
        questions = [question for row in range(len(self.table)) for question in self._of_row(row)]
        if len({question.id for question in questions}) < len(questions):
            raise UserError(f"{self.path}: a question_id is there twice; {BUILD}")
        if not questions:
            raise UserError(f"{self.path}: no questions in it; {BUILD}")
        return questions

    def picture(self, row: int) -> bytes:
        """The picture's file as it was."""
        return self._cell("image", row)

    def _of_row(self, row: int) -> Iterator[Question]:
        ids, texts = self._cell("question_id", row), self._cell("questions", row)
        answers, scores = self._cell("answers", row), self._cell("answer_scores", row)
        if not answers:  # a test split
            answers = scores = [[]] * len(ids)
        lens = {len(ids), len(texts), len(answers), len(scores)}
        if len(lens) > 1 or any(len(a) != len(s) for a, s in zip(answers, scores, strict=True)):
            raise UserError(f"{self.path}: row {row} has lists of different lengths; {BUILD}")
        for id, text, names, values in zip(ids, texts, answers, scores, strict=True):
            yield Question(str(id), text, row, dict(zip(names, values, strict=True)))

    def _cell(self, column: str, row: int) -> Any:
        return self.table[column][row].as_py()


def open_table(path: Path) -> Any:
    """A pyarrow Table whose columns are read from the file as they are used."""
    if not HAS_ARROW:
        raise UserError(f"{path}: reading arrow files takes pyarrow: pip install 'mmdist[vqa]'")
    if not path.is_file():
        raise UserError(f"{path}: no such file; give an arrow file of questions, or {BUILD}")
    arrow, ipc = import_module("pyarrow"), import_module("pyarrow.ipc")
    try:
        return ipc.open_file(arrow.memory_map(str(path))).read_all()
    except (arrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not an arrow file ({error}); {BUILD}") from error


def check_columns(path: Path, schema: Any) -> None:
    missing = [name for name in COLUMNS if name not in schema.names]
    if missing:
        raise UserError(f"{path}: no column {missing[0]}; VLMo's has {', '.join(COLUMNS)}; {BUILD}")
    for name, (kind, depth) in COLUMNS.items():
        found = schema.field(name).type
        if not fits(found, kind, depth):
            words = "lists of " * depth + kind
            raise UserError(f"{path}: column {name} holds {found}, VLMo's holds {words}; {BUILD}")


def fits(found: Any, kind: str, depth: int) -> bool:
    """A column of empty lists alone has null for what they hold (the answers of a test split)."""
    types = import_module("pyarrow.types")
    for _ in range(depth):
        if not (types.is_list(found) or types.is_large_list(found)):
            return depth > 1 and types.is_null(found)
        found = found.value_type
    kinds: dict[str, tuple[Callable[[Any], bool], ...]] = {
        "bytes": (types.is_binary, types.is_large_binary),
        "text": (types.is_string, types.is_large_string),
        "integers": (types.is_integer,),
        "numbers": (types.is_floating,),
    }
    return (depth > 1 and types.is_null(found)) or any(test(found) for test in kinds[kind])


@dataclass
class VqaScore:
    """accuracy: share of the questions whose answer is an accepted one; soft_score: mean of those answers' scores.

    right: by question id.
    """

    num_questions: int
    accuracy: float
    soft_score: float
    right: dict[str, bool]


def score(questions: Iterable[Question], answers: dict[str, str], closed_set: bool) -> VqaScore:
    """Answers by question id. closed_set: they are words of the answers' own list and compared as they stand, as VLMo
    does; else both sides are normalised first."""
    questions = list(questions)
    check_scorable(questions, answers)
    as_compared: Callable[[str], str] = str if closed_set else normalise
    scores = {question.id: score_one(answers[question.id], question.accepted, as_compared) for question in questions}
    right = {name: value is not None for name, value in scores.items()}
    soft = float(np.mean([value or 0.0 for value in scores.values()]))
    return VqaScore(len(questions), float(np.mean(list(right.values()))), soft, right)


def check_scorable(questions: list[Question], answers: dict[str, str]) -> None:
    if not any(question.accepted for question in questions):
        raise UserError("no question has an accepted answer (a test split?); score answers to a train or val split")
    missing = [question.id for question in questions if question.id not in answers]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(questions)} questions have no answer (first: {missing[0]}); "
            "these are answers to other data, or of a run that did not end"
        )


def score_one(answer: str, accepted: dict[str, float], as_compared: Callable[[str], str]) -> float | None:
    """The score of an answer, None where it is no accepted one. Two that become one were named by as many together."""
    found = [value for name, value in accepted.items() if as_compared(name) == as_compared(answer)]
    return min(1.0, sum(found)) if found else None


def cost_ms(seconds: Iterable[float]) -> dict[str, float]:
    """Mean, median, p99 and max in milliseconds; nothing is left out."""
    values = 1000 * np.array(list(seconds))
    names = {"mean": values.mean(), "median": np.median(values), "p99": np.percentile(values, 99), "max": values.max()}
    return {name: float(value) for name, value in names.items()}
