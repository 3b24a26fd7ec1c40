"""VQA's answers and scores, and the arrow file as VLMo writes it."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from mmdist.config import UserError
from mmdist.precision.vqa import Question, VqaData, cost_ms, score
from mmdist.precision.vqa_answers import normalise

REPOSITORY = Path(__file__).parents[1]
ROW: dict[str, Any] = {
    "image": b"jpeg",
    "questions": ["How many?", "Which?"],
    "answers": [["2", "two"], ["the left one"]],
    "answer_labels": [[0, 1], [2]],
    "answer_scores": [[0.6, 0.9], [0.3]],
    "image_id": 42,
    "question_id": [42000, 42001],
    "split": "val",
}


@pytest.mark.parametrize(
    ("answer", "want"),
    [
        ("The two dogs.", "2 dogs"),
        ("1,000", "1000"),
        ("3.5 miles", "3.5 miles"),
        ("It wasnt, I shouldn'tve said", "it wasn't i shouldn't've said"),
        ("black/white", "black white"),
        ("black, white", "black white"),
        ("6:30 p.m.\n", "6:30 pm"),
        ("none", "0"),
        (" A ", ""),
        ("'ows'at", "'ow's'at"),
    ],
)
def test_answers_are_normalised_as_vqa_does(answer: str, want: str) -> None:
    assert normalise(answer) == want


def write_table(table: pa.Table) -> VqaData:
    with pa.OSFile("q.arrow", "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return VqaData(Path("q.arrow"))


def test_arrow_file() -> None:
    data = write_table(pa.Table.from_pylist([ROW]))
    assert data.questions() == [
        Question("42000", "How many?", 0, {"2": 0.6, "two": 0.9}),
        Question("42001", "Which?", 0, {"the left one": 0.3}),
    ]
    assert data.picture(0) == b"jpeg"
    blind = write_table(pa.Table.from_pylist([{**ROW, "answers": [], "answer_labels": [], "answer_scores": []}]))
    assert [question.accepted for question in blind.questions()] == [{}, {}]
    with pytest.raises(UserError, match="no question has an accepted answer"):
        score(blind.questions(), {"42000": "2", "42001": "2"}, closed_set=True)


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in ROW.items() if key != name}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([without("answer_scores")], "no column answer_scores; VLMo's has image, questions"),
        ([{**ROW, "answers": ["2"]}], "column answers holds list<.*: string>, VLMo's holds lists of lists of text"),
        ([{**ROW, "image": "a.jpg"}], "column image holds string, VLMo's holds bytes"),
        ([{**ROW, "question_id": 42000}], "column question_id holds int64, VLMo's holds lists of integers"),
        ([{**ROW, "questions": ["How many?"]}], "row 0 has lists of different lengths"),
        ([{**ROW, "answer_scores": [[0.6], [0.3]]}], "row 0 has lists of different lengths"),
        ([ROW, ROW], "a question_id is there twice"),
        ([{**ROW, "questions": [], "question_id": [], "answers": []}], "column questions holds list<.*: null>"),
    ],
)
def test_another_schema_is_one_line(rows: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(UserError, match=words + ".*make_arrow.py"):
        write_table(pa.Table.from_pylist(rows)).questions()


def test_no_arrow_file() -> None:
    Path("q.arrow").write_text("{}")
    with pytest.raises(UserError, match="not an arrow file"):
        VqaData(Path("q.arrow"))
    with pytest.raises(UserError, match="no such file"):
        VqaData(Path("."))


def test_scores() -> None:
    """As the seed counts, by words as they stand, and softly; of generated text once both sides are normalised."""
    questions = write_table(pa.Table.from_pylist([ROW])).questions()
    got = score(questions, {"42000": "two", "42001": "the right one"}, closed_set=True)
    assert (got.accuracy, got.soft_score, got.right) == (0.5, 0.45, {"42000": True, "42001": False})
    text = {"42000": "Two.", "42001": "The left one"}
    assert score(questions, text, closed_set=True).accuracy == 0
    got = score(questions, text, closed_set=False)
    assert (got.accuracy, got.soft_score) == (1.0, pytest.approx((1.0 + 0.3) / 2))  # 0.6 + 0.9: five people at least
    with pytest.raises(UserError, match=r"1 of 2 questions have no answer \(first: 42001\)"):
        score(questions, {"42000": "2"}, closed_set=True)


def test_cost_leaves_nothing_out() -> None:
    """MindIE's mean is of those below a second."""
    got = cost_ms([0.001, 0.003, 5.0])
    assert got == {
        "mean": pytest.approx(5004 / 3),
        "median": pytest.approx(3),
        "p99": pytest.approx(4900.06),
        "max": 5000,
    }


def vqav2_files(folder: Path, num_pictures: int = 12) -> None:
    """As the challenge publishes them; picture i is of the colour i and has one question with an answer of COLORS, and
    one whose answers are too rare."""
    for split, year in (("train", 2014), ("val", 2014), ("test", 2015), ("test-dev", 2015)):
        ids = list(range(num_pictures)) if split != "test-dev" else [0, 1]
        pictures = folder / f"{split.partition('-')[0]}{year}"
        pictures.mkdir(parents=True, exist_ok=True)
        for i in ids:
            Image.new("RGB", (8, 8), (i, 0, 0)).save(pictures / f"COCO_{pictures.name}_{i:012d}.jpg")
        Image.new("RGB", (8, 8)).save(pictures / f"COCO_{pictures.name}_{999:012d}.jpg")  # nothing is asked about it
        asked = [
            {"image_id": i, "question_id": 10 * i + k, "question": f"{split} {i} {k}?"} for i in ids for k in (0, 1)
        ]
        write(folder / f"v2_OpenEnded_mscoco_{split}{year}_questions.json", questions=asked)
        people = {0: ["Red"] * 2 + ["red"] * 3 + ["dark red"] * 2 + ["no idea"] * 3, 1: ["rare thing"] * 10}
        given = [
            {
                **ids,
                "multiple_choice_answer": people[q["question_id"] % 10][3],
                "answers": [{"answer": a} for a in people[q["question_id"] % 10]],
            }
            for q in asked
            for ids in ({"image_id": q["image_id"], "question_id": q["question_id"]},)
        ]
        given = [entry for entry in given if entry["question_id"] % 10 == 0 or entry["image_id"] < 3]
        if year == 2014:
            write(folder / f"v2_mscoco_{split}{year}_annotations.json", annotations=given)


def write(path: Path, **data: Any) -> None:
    path.write_text(json.dumps(data))


def make_arrow(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """The script in this process; SystemExit with its message where it ends so."""
    monkeypatch.setattr(sys, "argv", ["make_arrow.py", "--src", "vqa", "--dst", *arguments])
    runpy.run_path(str(REPOSITORY / "examples" / "vqav2" / "make_arrow.py"), run_name="__main__")


def test_make_arrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every split; rare answers are no classes and questions without others are left out; the same at every run."""
    vqav2_files(Path("vqa"))
    for dst, seed in (("one", "0"), ("two", "0"), ("three", "1")):
        make_arrow(monkeypatch, dst, "--seed", seed, "--rest", "4")
    assert (Path("one") / "answer2label.txt").read_text() == '{"answer": "red", "label": 0}\n'
    data = {path.stem.removeprefix("vqav2_"): VqaData(path) for path in Path("one").glob("*.arrow")}
    assert sorted(data) == ["rest_val", "test", "test-dev", "train", "trainable_val", "val"]
    ids = {name: [int(question.id) // 10 for question in d.questions()] for name, d in data.items()}
    assert sorted(ids["val"]) == list(range(12)) and ids["rest_val"] == ids["val"][-4:] and len(ids["test-dev"]) == 4
    assert ids["trainable_val"] == ids["val"][:-4]
    first = data["val"].questions()[0]
    assert first.accepted == {"red": 0.9} and first.text == f"val {ids['val'][0]} 0?"
    assert Image.open(Path("vqa") / "val2014" / f"COCO_val2014_{ids['val'][0]:012d}.jpg").size == (8, 8)
    path = Path("vqa") / "val2014" / f"COCO_val2014_{ids['val'][0]:012d}.jpg"
    assert data["val"].picture(0) == path.read_bytes()
    for name in data:
        file = f"vqav2_{name}.arrow"
        assert (Path("one") / file).read_bytes() == (Path("two") / file).read_bytes()
    assert [int(q.id) // 10 for q in VqaData(Path("three/vqav2_val.arrow")).questions()] != ids["val"]


def test_make_arrow_with_a_checkpoints_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the files of the split alone are needed; "Red" stays as people wrote it, as VLMo's own builder has it."""
    vqav2_files(Path("vqa"))
    for path in Path("vqa").glob("*train*.json"):
        path.unlink()
    Path("own.txt").write_text('{"answer": "dark red", "label": 7}\n{"answer": "Red", "label": 7}\n')
    make_arrow(monkeypatch, "one", "--splits", "val", "--answers", "own.txt")
    data = VqaData(Path("one/vqav2_val.arrow"))
    assert data.questions()[0].accepted == {"Red": 0.6, "dark red": 0.6}
    assert data.table["answer_labels"][0].as_py() == [[1, 0]]


def test_make_arrow_mistakes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    vqav2_files(Path("vqa"), num_pictures=9)
    for arguments, words in {
        ("--splits", "rest_val", "--rest", "9"): "9 pictures, of which --rest 9 leaves none",
        ("--answers", "none.txt"): "No such file or directory: 'none.txt'",
        (): "expected VQAv2's file with a list of annotations",
    }.items():
        if not arguments:
            Path("vqa/v2_mscoco_val2014_annotations.json").write_text("[]")
        with pytest.raises(SystemExit) as error:
            make_arrow(monkeypatch, "one", *arguments)
        (line,) = capsys.readouterr().err.splitlines()
        assert error.value.code == 2 and line.startswith("error: ") and words in line
    assert not list(Path("one").glob("*.arrow"))


def test_scores_agree_with_the_challenges_own_formula() -> None:
    """min(1, n / 3), mean over the ten ways to leave one person out: what the file's scores stand for."""
    for n, stored in {1: 0.3, 2: 0.6, 3: 0.9, 4: 1.0, 10: 1.0}.items():
        ways = [min(1, others / 3) for others in [n - 1] * n + [n] * (10 - n)]
        assert np.mean(ways) == pytest.approx(stored)
