"""The CLIP score: transformers' own numbers, the same cut for both sides, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from judge_cases import MAX_TOKENS, make_clip
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, CLIPModel

from mmdist.config import UserError
from mmdist.precision.judge import BATCH_SIZE, HAS_OPEN_CLIP, count_cut, fair_budget, open_judge

REPOSITORY = Path(__file__).parents[1]
PICTURES = sorted((REPOSITORY / "assets" / "pictures").glob("*.png"))
CAPTIONS = ["a red circle", "a blue square", "two", "", "a cross", "the same again and again and again"]


def pictures() -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in PICTURES]


def reference(folder: Path, image: Image.Image, text: str) -> float:
    """The cosine as the whole model's forward has it."""
    model, processor = CLIPModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    inputs = processor(images=image, text=text, return_tensors="pt", truncation=True, max_length=MAX_TOKENS)
    with torch.no_grad():
        return float(model(**inputs).logits_per_image / model.logit_scale.exp())


def test_cosines_are_transformers(tmp_path: Path) -> None:
    """Two captions a picture, more pictures than a batch holds, texts of all lengths."""
    folder = make_clip(tmp_path / "clip")
    judge = open_judge(folder)
    images = pictures() * 4
    captions = [[CAPTIONS[i % 6], CAPTIONS[(i + 1) % 6]] for i in range(len(images))]
    assert len(images) > BATCH_SIZE
    got = list(judge.score(zip(images, captions, strict=True), judge.max_tokens))
    assert len(got) == len(images)
    for i in (0, 1, 3, 5, BATCH_SIZE, len(images) - 1):
        want = [reference(folder, images[i], text) for text in captions[i]]
        assert got[i] == pytest.approx(want, abs=1e-5)
    assert len({round(value, 4) for row in got for value in row}) > 20


def test_both_sides_are_cut_alike(tmp_path: Path) -> None:
    """A side that was allowed fewer tokens is not compared with longer texts of the other; CLIP's own length is the
    most. A letter is a token, begin and end are two."""
    judge = open_judge(make_clip(tmp_path / "clip"))
    assert judge.max_tokens == MAX_TOKENS and judge.count_tokens("red dot") == 8
    short, long = ["red", "red dot"], ["a red dot here", "a" * 40]
    assert fair_budget(judge, [short, long]) == fair_budget(judge, [long, short]) == 8
    assert fair_budget(judge, [long, long]) == MAX_TOKENS
    assert count_cut(judge, long, 8) == 2 and count_cut(judge, short, 8) == 0
    image = pictures()[0]
    ((cut, exact),) = judge.score([(image, ["red dot and more", "red dot"])], 8)
    ((whole,),) = judge.score([(image, ["red dot and more"])], MAX_TOKENS)
    assert cut == pytest.approx(exact, abs=1e-6) and abs(whole - exact) > 1e-3


def test_what_is_no_judge(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing: no config.json there; give a folder of transformers' CLIPModel"):
        open_judge(tmp_path / "nothing")
    with pytest.raises(UserError, match="model_type is llava; a judge's is clip"):
        open_judge(REPOSITORY / "assets" / "llava-shapes")
    folder = make_clip(tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    weights.pop("visual_projection.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"clip: no weights for visual_projection.weight"):
        open_judge(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="not a whole folder of a CLIPModel"):
        open_judge(folder)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text(json.dumps([]))
    with pytest.raises(UserError, match="model_type is None"):
        open_judge(tmp_path / "broken")


@pytest.mark.skipif(HAS_OPEN_CLIP, reason="for who has no open_clip")
def test_an_open_clip_file_says_what_it_takes(tmp_path: Path) -> None:
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pip install open_clip_torch; or give a folder of transformers' CLIPModel"):
        open_judge(tmp_path / "open_clip_pytorch_model.bin")
