"""Result files of the five seeds and our own, and how they are joined to pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmdist.config import UserError
from mmdist.precision.saved_answers import join_pictures, read_texts

FORMS = {
    "predict_result.json": {"/data/coco/a.jpg": "a cat", "/data/coco/b.jpg": "a dog"},
    "gpu_coco_predict.json": {"a.jpg": "a cat", "b.jpg": "a dog"},
    "minigpt4.json": {"inputs_embeds_dir_2024/a.pt": "a cat", "inputs_embeds_dir_2024/b.pt": "a dog"},
    "embeds.json": {"embeds/a.jpg.pt": "a cat", "embeds/b.jpg.pt": "a dog"},
    "windows.json": {"C:\\coco\\a.jpg": "a cat", "C:\\coco\\b.jpg": "a dog"},
    "columns.json": {"image_file": ["x/a.jpg", "x/b.jpg"], "model_answer": ["a cat", "a dog"]},
    "rows.json": [{"image_file": "a.jpg", "model_answer": "a cat"}, {"image_file": "b.jpg", "model_answer": "a dog"}],
    "lists.json": [
        {"image_file": ["a.jpg"], "model_answer": ["a cat"]},
        {"image_file": "b.jpg", "model_answer": "a dog"},
    ],
}


@pytest.mark.parametrize("name", FORMS)
def test_seeds_files(name: str) -> None:
    Path(name).write_text(json.dumps(FORMS[name]))
    joined = join_pictures(read_texts(Path(name)), [Path("pictures/b.jpg"), Path("pictures/a.jpg"), Path("c.jpg")])
    assert joined == {Path("pictures/a.jpg"): "a cat", Path("pictures/b.jpg"): "a dog"}


@pytest.mark.parametrize("num", [1, 2])
def test_our_lines(num: int) -> None:
    lines = [{"id": "a.jpg", "text": "a\u2028cat", "token_ids": [1]}, {"id": 7, "answer": "red", "label": 0, "top": []}]
    Path("a.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines[:num]))
    assert read_texts(Path("a.jsonl")) == dict([("a.jpg", "a\u2028cat"), ("7", "red")][:num])


MISTAKES = {
    '{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}': "a has two different answers",
    '{"id": "a", "finish_reason": "error", "error": "too long"}': "a was not answered (too long); run it again",
    '{"id": "a", "text": "x"}\n{"id": "b", "te': "line 2 is not JSON; known are answers.jsonl",
    '{"id": "a", "text": "x"}\n[1]': 'line 2: expected an object with an "id"',
    "[1, 2]": "not a file of answers; known are",
    "{}": "no answers in it",
    "": "no answers in it",
    '{"a.jpg": 3}': "the answer of a.jpg is int, expected text",
    '{"id": "a", "token_ids": []}': "the answer of a is NoneType, expected text",
    '{"image_file": ["a"], "model_answer": []}': "not lists of one length",
    '{"image_file": ["a"], "model_answer": "cat"}': "not lists of one length",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes(text: str) -> None:
    Path("a.json").write_text(text)
    with pytest.raises(UserError) as error:
        read_texts(Path("a.json"))
    assert MISTAKES[text] in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_texts(Path("none.json"))


def test_joining_is_never_a_guess() -> None:
    two = [Path("x/a.jpg"), Path("y/a.jpg")]
    with pytest.raises(UserError, match=r"z/a.jpg: may be x/a.jpg or y/a.jpg; give pictures that differ"):
        join_pictures({"z/a.jpg": "a cat"}, two)
    with pytest.raises(UserError, match=r"a.pt: may be a.jpg or a.png"):
        join_pictures({"a.pt": "a cat"}, [Path("a.jpg"), Path("a.png")])
    with pytest.raises(UserError, match=r"2/a.jpg: a second answer about a.jpg"):
        join_pictures({"1/a.jpg": "a cat", "2/a.jpg": "a dog"}, [Path("a.jpg")])
    with pytest.raises(UserError, match=r"b.jpg: no picture of this name"):
        join_pictures({"b.jpg": "a cat"}, [Path("a.jpg")])
