"""Llama-3.2-Vision beyond the golden cases: what is remembered of pictures, and for how long."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Case, answers, config_for, run_engine
from transformers import MllamaForConditionalGeneration

from mmdist.config import SamplingParams
from mmdist.engine.engine import Engine
from mmdist.media import load_image
from mmdist.tasks.requests import build_request


@pytest.fixture
def mllama() -> Case:
    return Case("mllama")


def golden_tokens(case: Case) -> dict[str, list[int]]:
    reference = case.reference()
    return {item_id: reference[f"{item_id}/greedy_ids"].ravel().tolist() for item_id in case.items}


def all_tokens(case: Case, size: int, check: Any = None, **engine: Any) -> dict[str, list[int]]:
    def work(engine: Engine) -> Any:
        requests = [case.request(engine, i, max_new_tokens=12, ignore_eos=True) for i in case.items]
        outputs = answers(engine, requests)
        if check is not None:
            check(engine)
        return {item_id: output.token_ids for item_id, output in outputs.items()}

    return run_engine(size, config_for(case, **engine), work)


def test_messages_get_one_begin_of_text(mllama: Case) -> None:
    """The template writes it; transformers' processor would add another."""
    prompts = json.loads((mllama.folder / "golden.json").read_text())["items"]
    messages = json.loads((mllama.folder / "inputs" / "messages.json").read_text())["items"]

    def work(engine: Engine) -> None:
        tokenizer = engine.prompts.processor.tokenizer  # type: ignore[attr-defined]
        for entry in messages:
            request = build_request(entry, engine.prompts, SamplingParams(), mllama.folder / "inputs")
            assert request.prompt.token_ids == tokenizer.encode(
                prompts[entry["id"]]["prompt"], add_special_tokens=False
            )

    run_engine(1, config_for(mllama), work)


@pytest.mark.parametrize("tokens", (8, 37))
def test_prefill_in_chunks(mllama: Case, tokens: int) -> None:
    assert all_tokens(mllama, 2, max_num_batched_tokens=tokens) == golden_tokens(mllama)


def test_preempted_requests_are_told_their_pictures_again(mllama: Case) -> None:
    def check(engine: Engine) -> None:
        assert engine.scheduler.num_preemptions > 0

    room = {"max_model_len": 128, "block_size": 4, "num_blocks": 36}
    assert all_tokens(mllama, 2, check, **room) == golden_tokens(mllama)


def test_pictures_are_forgotten_with_their_requests(mllama: Case) -> None:
    """At most two pictures at once (the item `pair` has two): the others wait, and nothing piles up."""
    held = []

    def work(engine: Engine) -> Any:
        score = engine.runner.score

        def counted(*args: Any) -> Any:
            scores = score(*args)
            held.append(sum(len(memory.seen) for memory in engine.runner.memories.values()))
            return scores

        engine.runner.score = counted  # type: ignore[method-assign]
        requests = [mllama.request(engine, i, max_new_tokens=12, ignore_eos=True) for i in mllama.items]
        return {item_id: output.token_ids for item_id, output in answers(engine, requests).items()}

    assert run_engine(1, config_for(mllama, max_pictures=2), work) == golden_tokens(mllama)
    assert max(held) == 2


def test_a_penalty_passes_by_what_has_no_logit(mllama: Case) -> None:
    """<|image|> is the first id beyond the vocabulary."""

    def work(engine: Engine) -> Any:
        params = {"repetition_penalty": 1 + 1e-6, "max_new_tokens": 12, "ignore_eos": True}
        outputs = answers(engine, [mllama.request(engine, i, **params) for i in mllama.items])
        return {item_id: output.token_ids for item_id, output in outputs.items()}

    assert run_engine(1, config_for(mllama), work) == golden_tokens(mllama)


def test_more_pictures_than_can_be_remembered(mllama: Case) -> None:
    def work(engine: Engine) -> Any:
        return answers(engine, [mllama.request(engine, "pair"), mllama.request(engine, "no_image", max_new_tokens=1)])

    outputs = run_engine(1, config_for(mllama, max_pictures=1), work)
    assert outputs["pair"].error == "2 pictures, engine.max_pictures=1; raise it"
    assert outputs["no_image"].error is None


@pytest.mark.parametrize("size", (1, 8))
def test_pictures_apart_in_the_text(mllama: Case, tmp_path: Path, size: int) -> None:
    """The first picture is seen up to the second one only: prefill and decode equal transformers."""
    shutil.copytree(mllama.checkpoint, tmp_path / "shifted")
    file = tmp_path / "shifted" / "config.json"
    config = json.loads(file.read_text())
    vision = config["vision_config"]
    vision["intermediate_layers_indices"] = [i - 1 for i in vision["intermediate_layers_indices"]]
    file.write_text(json.dumps(config))
    model = MllamaForConditionalGeneration.from_pretrained(tmp_path / "shifted", dtype=torch.float32)
    model.generation_config.eos_token_id = None
    text = "<|begin_of_text|>See <|image|>the river, and <|image|><|image|>the rest of the town"
    entry = {"id": "apart", "prompt": text, "images": ["ladder.png", "strip.png", "stamp.png"]}

    def work(engine: Engine) -> Any:
        params = SamplingParams(max_new_tokens=8, ignore_eos=True)
        folder = mllama.folder / "inputs"
        request = build_request(entry, engine.prompts, params, folder)
        images = [[load_image(folder / name) for name in entry["images"]]]
        inputs = engine.prompts.processor(  # type: ignore[attr-defined]
            text=[text], images=images, return_tensors="pt", add_special_tokens=False
        )
        wanted = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert request.prompt.token_ids == inputs["input_ids"][0].tolist()
        return answers(engine, [request])["apart"].token_ids, wanted.tolist()

    ours, wanted = run_engine(size, config_for(mllama), work)
    assert ours == wanted
