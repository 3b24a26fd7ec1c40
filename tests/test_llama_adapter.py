"""LLaMA-Adapter: the picture's way to the layers, split folders, prompts and chats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CPU, GOLDEN, Case, answers, config_for, run_engine
from PIL import Image

from mmdist.config import Config, EngineConfig, ModelConfig, SamplingParams, UserError
from mmdist.engine.engine import Engine
from mmdist.engine.load import load_engine
from mmdist.media import load_image
from mmdist.models.llama_adapter_processor import alpaca_prompt, clip_pixels
from mmdist.models.original import MEAN, STD
from mmdist.tasks import chat
from mmdist.tasks.requests import build_request
from mmdist.tp import TP
from weights_tools.cli import main

BIAS, LORA = Case("llama_adapter_bias"), Case("llama_adapter_lora")
TOLERANCE = 1e-4


def engine_config(folder: Path, **engine: int) -> Config:
    settings = EngineConfig(**{"max_model_len": 512, "max_num_seqs": 3, **engine})
    return Config(checkpoint=str(folder), model=ModelConfig(name="llama_adapter"), dtype="float32", engine=settings)


@pytest.mark.parametrize("case", (BIAS, LORA), ids=("bias", "lora"))
def test_picture_to_prompts(case: Case) -> None:
    """Pixels, CLIP's features and the rows the layers look at."""
    reference = case.reference()
    engine = load_engine(config_for(case), TP(), CPU)
    vision: Any = engine.runner.model.vision
    for item_id in case.items:
        of_bias = item_id.replace("lora/", "bias/")  # the same for both, stored once
        pixels = case.request(engine, item_id).prompt.vision["pixel_values"]
        assert np.abs(pixels.numpy() - reference[f"{of_bias}/pixel_values"]).max() <= 1e-6
        features = vision.clip_features(pixels)
        assert np.abs(features.numpy() - reference[f"{of_bias}/clip_feats"]).max() <= TOLERANCE
        assert np.abs(vision.ask(features).numpy() - reference[f"{item_id}/visual_query"]).max() <= TOLERANCE


def test_clip_pixels_round_as_torchvision() -> None:
    """An odd number of left-over pixels: half of 5 is cut at 2, half of 7 at 4 (halves go to the even number)."""
    for width, left in ((75, 2), (77, 4)):
        columns = np.tile(np.arange(width, dtype=np.uint8)[None, :, None], (70, 1, 3))
        red = clip_pixels(Image.fromarray(columns), 70)[0, 0, 0] * STD[0] + MEAN[0]
        assert [round(float(value) * 255) for value in red[:2]] == [left, left + 1]


@pytest.mark.parametrize("size", (2, 8))
def test_split_verify_and_load_split(size: int, tmp_path: Path) -> None:
    dst = tmp_path / "split"
    assert main(["split", str(LORA.checkpoint), "--ranks", str(size), "--dst", str(dst)]) == 0
    assert main(["verify", str(dst)]) == 0
    reference = LORA.reference()

    def work(engine: Engine) -> Any:
        return answers(engine, [LORA.request(engine, i, max_new_tokens=12, ignore_eos=True) for i in LORA.items])

    for item_id, output in run_engine(size, engine_config(dst), work).items():
        assert output.token_ids == reference[f"{item_id}/greedy_ids"].tolist()


def test_chunked_prefill_and_waiting_keep_the_picture() -> None:
    """Prompts computed in pieces, one picture remembered at a time, cache blocks for one request."""
    reference = BIAS.reference()

    def work(engine: Engine) -> Any:
        return answers(engine, [BIAS.request(engine, i, max_new_tokens=12, ignore_eos=True) for i in BIAS.items])

    for settings in ({"max_num_batched_tokens": 50}, {"max_pictures": 1}, {"num_blocks": 16, "block_size": 16}):
        config = engine_config(BIAS.checkpoint, **({"max_model_len": 256} | settings))
        for item_id, output in run_engine(2, config, work).items():
            assert output.token_ids == reference[f"{item_id}/greedy_ids"].tolist(), settings


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load_engine(engine_config(BIAS.checkpoint), TP(), CPU)


def build(engine: Engine, **entry: Any) -> Any:
    return build_request({"id": "a", **entry}, engine.prompts, SamplingParams(), GOLDEN / "llama_adapter" / "inputs")


def say(*texts: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}, *({"type": "text", "text": text} for text in texts)]}


def test_raw_prompt(engine: Engine) -> None:
    """As it stands, with the begin-of-sequence token; there is no placeholder to write."""
    item = json.loads((GOLDEN / "llama_adapter" / "golden.json").read_text())["items"]["bias/column"]
    request = build(engine, prompt=item["prompt"], images=["column.png"])
    assert request.prompt.token_ids == item["input_ids"]


def test_requests_that_are_refused(engine: Engine) -> None:
    pictures = {"images": ["column.png"]}
    for count in (0, 2):
        with pytest.raises(UserError, match=f"exactly one picture, {count} are given"):
            build(engine, prompt="What is this?", images=["column.png"] * count)
    turns = [say("What?"), {"role": "assistant", "content": "A door."}, {"role": "user", "content": "Sure?"}]
    with pytest.raises(UserError, match="no conversation: give one message of a user; found user, assistant, user"):
        build(engine, messages=turns, **pictures)
    with pytest.raises(UserError, match="found system, user"):
        build(engine, messages=[{"role": "system", "content": "Be brief."}, say("What?")], **pictures)
    with pytest.raises(UserError, match="3 texts in the message; the first is the instruction, a second one its input"):
        build(engine, messages=[say("What?", "This", "That")], **pictures)


def test_braces_in_a_question_are_kept() -> None:
    text = alpaca_prompt([say("What is {input}?", "{instruction}")])
    assert "### Instruction:\nWhat is {input}?\n\n### Input:\n{instruction}\n\n### Response:" in text


def test_chat_asks_each_question_by_itself(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = chat.Conversation(engine, SamplingParams(max_new_tokens=2, ignore_eos=True), 8)
    prompts: list[dict] = []
    ask = type(engine.prompts).prompt
    monkeypatch.setattr(type(engine.prompts), "prompt", lambda self, **k: prompts.append(k) or ask(self, **k))
    inputs = GOLDEN / "llama_adapter" / "inputs"
    for line in (
        f"/image {inputs / 'column.png'}",
        "What is it?",
        "Sure?",
        f"/image {inputs / 'postcard.png'}",
        "And?",
    ):
        assert chat.obey(line, conversation)
    assert [len(prompt["messages"]) for prompt in prompts] == [1, 1, 1]
    assert [prompt["images"][0].size for prompt in prompts[1:]] == [
        load_image(inputs / name).size for name in ("column.png", "postcard.png")
    ]


def test_folder_problems(tmp_path: Path) -> None:
    folder = shutil.copytree(BIAS.checkpoint, tmp_path / "folder")
    options = engine_config(folder)
    options.model = ModelConfig(name="llama_adapter", chat_template="mine.jinja")
    with pytest.raises(UserError, match=r"model\.chat_template: LLaMA-Adapter has one prompt"):
        load_engine(options, TP(), CPU)
    (folder / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="truncated, or no sentencepiece model"):
        load_engine(engine_config(folder), TP(), CPU)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.model: no such file"):
        load_engine(engine_config(folder), TP(), CPU)
