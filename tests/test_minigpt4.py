"""MiniGPT-4: upstream's numbers of its picture side, its token ids and its conversation."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, Case, answers, config_for, run_engine

from mmdist.config import ModelConfig, SamplingParams, UserError
from mmdist.engine.engine import Engine
from mmdist.engine.load import load_engine
from mmdist.engine.request import Request
from mmdist.media import load_image
from mmdist.models.minigpt4_processor import LLAMA2, SYSTEM, VICUNA
from mmdist.tp import TP
from weights_tools.cli import main

CASES = ("minigpt4", "minigpt4_llama2")
TOLERANCE = 1e-4
PICTURE = {"type": "image"}


@pytest.fixture(params=CASES)
def variant(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture
def vicuna() -> Case:
    return Case("minigpt4")


def load(case: Case) -> Engine:
    return load_engine(config_for(case), TP(), CPU)


def golden_items(case: Case) -> dict[str, dict[str, Any]]:
    return json.loads((case.folder / "golden.json").read_text())["items"]


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def turn(role: str, *content: dict[str, str]) -> dict[str, Any]:
    return {"role": role, "content": list(content)}


def test_pictures_and_ids_are_upstreams(variant: Case) -> None:
    """Pixels, EVA, what the decoder gets of the picture, and the ids on both sides of it."""
    engine, reference, written = load(variant), variant.reference(), golden_items(variant)
    model = engine.runner.model
    for item_id in variant.items:
        prompt = variant.request(engine, item_id).prompt
        first, last = prompt.image_positions[0], prompt.image_positions[-1]
        assert prompt.image_positions == list(range(first, last + 1))
        assert prompt.token_ids[:first] == reference[f"{item_id}/segment_ids_0"].tolist()
        assert prompt.token_ids[last + 1 :] == reference[f"{item_id}/segment_ids_1"].tolist()
        raw = engine.prompts.prompt(
            images=[load_image(variant.image_paths(item_id)[0])], text=written[item_id]["prompt"]
        )
        assert raw.token_ids == prompt.token_ids
        pixels = prompt.vision["pixel_values"]
        assert np.array_equal(pixels.numpy(), reference[f"{item_id}/pixel_values"])
        found = {
            "ln_vision": model.vision.tower(pixels),
            "image_embeds": model.vision(pixels),
            "inputs_embeds": input_embeds(engine, prompt.token_ids, first, model.encode_images(prompt.vision))[None],
        }
        for name, tensor in found.items():
            if f"{item_id}/{name}" in reference:
                assert np.abs(tensor.numpy() - reference[f"{item_id}/{name}"]).max() <= TOLERANCE, name
        assert engine.prompts.decode(written[item_id]["greedy_ids"]) == written[item_id]["greedy_text"]


def input_embeds(engine: Engine, token_ids: list[int], first: int, rows: torch.Tensor) -> torch.Tensor:
    embeds = engine.runner.model.decoder.embed_tokens(torch.tensor(token_ids))
    return torch.cat((embeds[:first], rows, embeds[first + len(rows) :]))


def test_two_pictures_in_a_raw_prompt(variant: Case) -> None:
    """Each placeholder takes its own picture's rows, and the text between them has its dummy blank."""
    engine, words = load(variant), "<ImageHere>"
    images = [load_image(variant.image_paths(item_id)[0]) for item_id in ("panorama", "column")]
    prompt = engine.prompts.prompt(images=images, text=f"See {words} and {words}")
    pieces, count = engine.prompts.tokenizer, variant_tokens(engine)
    see, between = pieces.encode("See "), pieces.encode(" and ")
    assert prompt.token_ids == [1, *see, *[0] * count, *between, *[0] * count]
    assert len(prompt.image_positions) == 2 * count
    rows = engine.runner.model.encode_images(prompt.vision)
    alone = [engine.prompts.prompt(images=[image], text=words).vision for image in images]
    want = torch.cat([engine.runner.model.encode_images(vision) for vision in alone])
    torch.testing.assert_close(rows, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="1 <ImageHere> in the prompt, 2 pictures given"):
        engine.prompts.prompt(images=images, text=words)


def variant_tokens(engine: Engine) -> int:
    return engine.runner.model.config.tokens_per_image


def test_conversations() -> None:
    """As upstream's Chat writes them: a picture is a turn of its own, which the text behind it joins."""
    picture = "<Img><ImageHere></Img>"
    asked = [turn("user", PICTURE, text("Who?")), turn("assistant", text("Ann.")), turn("user", text("Where?"))]
    assert VICUNA.write(asked) == (f"{SYSTEM}###Human: {picture} Who?###Assistant: Ann.###Human: Where?###Assistant: ")
    assert LLAMA2.write(asked) == f"{SYSTEM}<s>[INST] {picture} Who? [/INST] Ann.<s>[INST] Where? [/INST] "
    apart = [turn("user", PICTURE), turn("user", PICTURE, text("Who?"))]
    assert VICUNA.write(apart) == f"{SYSTEM}###Human: {picture}###Human: {picture} Who?###Assistant: "
    assert VICUNA.write([turn("system", text("Rules.")), *apart]).startswith(f"Rules.###Human: {picture}###")
    late = [*apart, turn("system", text("Rules."))]
    for messages in (late, [turn("assistant", PICTURE)], [turn("user", {"type": "video"})]):
        with pytest.raises(UserError, match="messages: "):
            VICUNA.write(messages)


def test_answers_end_before_the_next_turn(vicuna: Case) -> None:
    """### ends an answer of the Vicuna variant, in whatever pieces it comes; under ignore_eos it does not."""
    engine = load(vicuna)
    ids = engine.prompts.tokenizer.encode("A boat.###Human: ")
    with_stop = stopped_text(engine, ids)
    assert with_stop == "A boat."
    assert load(Case("minigpt4_llama2")).prompts.stop == ()
    assert not load(Case("minigpt4_llama2")).prompts.tokenizer.encode("") and engine.prompts.decode([]) == ""


def stopped_text(engine: Engine, ids: list[int]) -> str:
    """The text of an answer made of these tokens."""
    engine.add(Request("x", engine.prompts.prompt(text="Hello"), SamplingParams(max_new_tokens=len(ids) + 1)))
    detokenizer = engine.sequences["x"].detokenizer
    for token_id in ids:
        if detokenizer.push(token_id):
            return detokenizer.text
    return "not stopped"


def test_different_pictures_and_no_picture_in_one_batch(variant: Case) -> None:
    """Prompts of several lengths, one of them without a picture, are answered as each alone."""

    def work(engine: Engine) -> Any:
        params = SamplingParams(max_new_tokens=6, ignore_eos=True)
        plain = Request("plain", engine.prompts.prompt(text="Tell me a story."), params)
        requests = [*(variant.request(engine, i, max_new_tokens=6, ignore_eos=True) for i in variant.items), plain]
        together = answers(engine, requests)
        alone = answers(engine, [replace(plain, id="alone")])
        assert together["plain"].token_ids == alone["alone"].token_ids
        return {key: output.token_ids for key, output in together.items()}

    found = [run_engine(size, config_for(variant), work) for size in (1, 2)]
    assert found[0] == found[1]


def test_split_folder_answers_like_its_source(vicuna: Case, tmp_path: Path) -> None:
    """Vocabulary 401 over 2 ranks, the last row on rank 1 alone."""
    split = tmp_path / "split"
    assert main(["split", "minigpt4", "--ranks", "2", "--src", str(vicuna.checkpoint), "--dst", str(split)]) == 0

    def work(engine: Engine) -> Any:
        requests = [vicuna.request(engine, i, max_new_tokens=12, ignore_eos=True) for i in vicuna.items]
        return {key: output.token_ids for key, output in answers(engine, requests).items()}

    found = run_engine(2, config_for(split, model="minigpt4"), work)
    reference = vicuna.reference()
    assert found == {item_id: reference[f"{item_id}/greedy_ids"].ravel().tolist() for item_id in vicuna.items}


def test_a_folder_with_the_wrong_tokenizer(vicuna: Case, tmp_path: Path) -> None:
    plain = Path(shutil.copytree(vicuna.checkpoint, tmp_path / "plain"))
    family, config = type(load(vicuna).runner.model), load(vicuna).runner.model.config
    (plain / "tokenizer.model").write_bytes(b"not one")
    with pytest.raises(UserError, match="no sentencepiece model"):
        family.load_processor(plain, config, ModelConfig(name="minigpt4"))
    (plain / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="no such file"):
        family.load_processor(plain, config, ModelConfig(name="minigpt4"))
    with pytest.raises(UserError, match="MiniGPT-4 has its own conversation"):
        family.load_processor(plain, config, ModelConfig(name="minigpt4", chat_template="x.jinja"))
