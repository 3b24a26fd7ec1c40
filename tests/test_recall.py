"""Recall by hand, ties, several captions a picture, and COCO's file of captions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mmdist.config import UserError
from mmdist.precision.recall import read_coco_captions, recall


def test_recall_by_hand() -> None:
    """Picture 0 finds its text first, 1 second, 2 last of three; the texts find their pictures first, first, third."""
    scores = np.array([[3.0, 1.0, 2.0], [4.0, 3.0, 3.5], [0.0, 2.0, -1.0]])
    got = recall(scores, [0, 1, 2])
    assert got["texts"] == {"1": pytest.approx(1 / 3), "5": 1.0, "10": 1.0}
    assert got["images"] == {"1": pytest.approx(1 / 3), "5": 1.0, "10": 1.0}
    wide = np.zeros((12, 12)) + np.arange(12)  # text j is each picture's (12 - j)th best
    assert recall(wide, list(range(12)))["texts"] == {"1": 1 / 12, "5": 5 / 12, "10": 10 / 12}


def test_several_captions_a_picture() -> None:
    """A picture has found its captions where one of them is first; each caption looks for its own picture. One picture
    has none and is only in the others' way."""
    scores = np.array([[5.0, 1.0, 4.0], [6.0, 7.0, 0.0], [0.0, 0.0, 9.0]])
    got = recall(scores, [0, 1, 0])
    assert got["texts"]["1"] == 1.0 and got["images"]["1"] == pytest.approx(1 / 3)


def test_a_model_that_scores_all_alike_finds_nothing() -> None:
    assert recall(np.ones((11, 11)), list(range(11)))["texts"] == {"1": 0.0, "5": 0.0, "10": 0.0}


def test_what_cannot_be_counted() -> None:
    with pytest.raises(UserError, match=r"scores of shape \(2, 3\) for 2 texts"):
        recall(np.ones((2, 3)), [0, 1])
    with pytest.raises(UserError, match="1 of 4 scores are no finite numbers"):
        recall(np.array([[1.0, np.nan], [0.0, 1.0]]), [0, 1])
    with pytest.raises(UserError, match="belongs to picture 2 of 2"):
        recall(np.ones((2, 2)), [0, 2])


def test_coco_captions() -> None:
    images = [{"id": 9, "file_name": "b.jpg"}, {"id": 7, "file_name": "a.jpg"}, {"id": 5, "file_name": "mute.jpg"}]
    captions = [
        {"image_id": 7, "caption": "a cat\n"},
        {"image_id": 9, "caption": "a dog"},
        {"image_id": 7, "caption": "cat"},
    ]
    Path("captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    assert read_coco_captions(Path("captions.json")) == (["a.jpg", "b.jpg"], ["a cat", "a dog", "cat"], [0, 1, 0])
    for text, words in {"[]": "not COCO's captions", '{"images": [], "annotations": []}': "no captions in it"}.items():
        Path("captions.json").write_text(text)
        with pytest.raises(UserError, match=words):
            read_coco_captions(Path("captions.json"))
