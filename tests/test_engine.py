"""Continuous batching: neighbours, chunks, preemption and sampling leave a request's answer alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Case, answers, config_for, run_engine

from mmdist.config import EngineConfig, SamplingParams, UserError
from mmdist.engine.batch import Scheduled
from mmdist.engine.blocks import BlockManager
from mmdist.engine.detokenizer import Detokenizer
from mmdist.engine.engine import Engine
from mmdist.engine.pictures import EmbeddingCache
from mmdist.engine.request import Request, Sequence
from mmdist.engine.sampler import Scores, logprobs_entry, sample
from mmdist.engine.scheduler import Scheduler
from mmdist.models.base import Prompt


def all_answers(case: Case, size: int = 1, params: dict[str, Any] | None = None, **engine: Any) -> dict[str, Any]:
    settings = {"max_new_tokens": 12, "ignore_eos": True, **(params or {})}

    def work(engine: Engine) -> Any:
        return answers(engine, [case.request(engine, item_id, **settings) for item_id in case.items])

    outputs = run_engine(size, config_for(case.checkpoint, **engine), work)
    return {item_id: output.token_ids for item_id, output in outputs.items()}


@pytest.mark.parametrize("tokens", (8, 37, 64))
def test_prefill_in_chunks(mistral: Case, tokens: int) -> None:
    """Chunks end inside pictures, at their edges, and beside other requests' decoding."""
    whole = all_answers(mistral, max_num_seqs=4)
    assert all_answers(mistral, max_num_seqs=4, max_num_batched_tokens=tokens) == whole


def test_preemption_recomputes(mistral: Case) -> None:
    """With room for about two requests, younger ones give their blocks back and answer the same in the end."""
    whole = all_answers(mistral, max_num_seqs=1)
    preemptions = []

    def work(engine: Engine) -> Any:
        requests = [mistral.request(engine, i, max_new_tokens=12, ignore_eos=True) for i in mistral.items]
        result = answers(engine, requests)
        preemptions.append(engine.scheduler.num_preemptions)
        assert engine.scheduler.blocks.num_free == num_blocks
        return {item_id: output.token_ids for item_id, output in result.items()}

    num_blocks = 64
    config = config_for(mistral.checkpoint, max_model_len=256, block_size=4, num_blocks=num_blocks, max_num_seqs=4)
    assert run_engine(1, config, work) == whole
    assert preemptions[0] > 0


@pytest.mark.parametrize("block_size", (1, 3, 16, 128))
def test_block_size(mistral: Case, block_size: int) -> None:
    expected = {i: mistral.reference()[f"{i}/greedy_ids"].ravel().tolist() for i in mistral.items}
    assert all_answers(mistral, block_size=block_size, max_num_seqs=3) == expected


def test_sampling_is_seeded_and_alone(mistral: Case) -> None:
    """The same seed gives the same answer alone, in a batch, and at another world size; another seed another one."""
    params = {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "seed": 7}
    alone = all_answers(mistral, params=params, max_num_seqs=1)
    assert all_answers(mistral, params=params, max_num_seqs=4) == alone
    assert all_answers(mistral, size=2, params=params, max_num_seqs=4) == alone
    assert all_answers(mistral, params={**params, "seed": 8}, max_num_seqs=4) != alone


@pytest.mark.parametrize("size", (1, 2))
def test_unlike_neighbours_change_nothing(mistral: Case, size: int) -> None:
    """Who needs one token to choose from, who needs some and who needs all of them, with the same seeds alone."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9, "top_k": 20},
        {"temperature": 0.9, "top_k": 20, "logprobs": 3},
        {"temperature": 0.9, "top_p": 0.8},
        {"repetition_penalty": 1.3},
        {"temperature": 0.9, "top_k": 400, "repetition_penalty": 1.1},
    ]
    item_id = next(iter(mistral.items))

    def work(engine: Engine) -> Any:
        requests = [mistral.request(engine, item_id, max_new_tokens=8, seed=3, **kind) for kind in kinds]
        for number, request in enumerate(requests):
            request.id = str(number)
        return {i: output.token_ids for i, output in answers(engine, requests).items()}

    together, alone = (run_engine(size, config_for(mistral, max_num_seqs=count), work) for count in (6, 1))
    assert together == alone
    assert together["1"] == together["2"] and len(set(map(tuple, together.values()))) == len(kinds) - 1


def test_sliding_window(mistral: Case, tmp_path: Any) -> None:
    """A window shorter than the prompt: prefill, chunks and decode equal transformers."""
    import json
    import shutil

    from transformers import LlavaNextForConditionalGeneration

    folder = tmp_path / "window"
    shutil.copytree(mistral.checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["sliding_window"] = 40
    (folder / "config.json").write_text(json.dumps(config))
    model = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None

    def work(engine: Engine) -> Any:
        request = mistral.request(engine, "panorama", max_new_tokens=8, ignore_eos=True)
        inputs = {"input_ids": torch.tensor([request.prompt.token_ids]), **request.prompt.vision}
        wanted = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        return answers(engine, [request])["panorama"].token_ids, wanted.tolist()

    for tokens in (512, 33):
        ours, wanted = run_engine(1, config_for(folder, max_num_batched_tokens=tokens), work)
        assert ours == wanted
    assert ours != mistral.reference()["panorama/greedy_ids"].ravel().tolist()[:8]


@pytest.mark.parametrize("keeps_all", (False, True))
def test_last_layer_computes_what_is_asked_for(mistral: Case, keeps_all: bool) -> None:
    def work(engine: Engine) -> tuple[int, list[tuple[int, int]]]:
        engine.runner.keeps_all = keeps_all
        seen: list[list[int]] = [[], []]
        for rows, layer in zip(seen, (engine.model.decoder.layers[0], engine.model.decoder.layers[-1]), strict=True):
            layer.mlp.register_forward_pre_hook(lambda module, args, rows=rows: rows.append(len(args[0])))
        request = mistral.request(engine, "panorama", max_new_tokens=2)
        answers(engine, [request])
        return len(request.prompt.token_ids), list(zip(*seen, strict=True))

    length, steps = run_engine(1, config_for(mistral.checkpoint), work)
    assert steps == [(length, length if keeps_all else 1), (1, 1)]


def test_stop_text_ends_the_answer(mistral: Case) -> None:
    def work(engine: Engine) -> Any:
        return answers(
            engine,
            [
                mistral.request(engine, "panorama", max_new_tokens=12, ignore_eos=True, stop=["5Y"]),
                mistral.request(engine, "column", max_new_tokens=12, ignore_eos=True),
            ],
        )

    outputs = run_engine(1, config_for(mistral.checkpoint), work)
    assert outputs["panorama"].finish_reason == "stop" and "5" not in outputs["panorama"].text
    assert outputs["column"].finish_reason == "length" and len(outputs["column"].token_ids) == 12


def test_streamed_text_is_the_whole_text(mistral: Case) -> None:
    def work(engine: Engine) -> Any:
        outputs = list(engine.generate([mistral.request(engine, i, max_new_tokens=12) for i in mistral.items]))
        ends = [output for output in outputs if output.finish_reason]
        deltas = {i: "".join(o.delta for o in outputs if o.id == i) for i in mistral.items}
        return deltas, {o.id: o.text for o in ends}, {o.id: engine.prompts.decode(o.token_ids) for o in ends}

    deltas, texts, decoded = run_engine(1, config_for(mistral.checkpoint), work)
    assert deltas == texts == decoded  # random weights make broken characters too


def test_eos_ends_the_answer(mistral: Case) -> None:
    def work(engine: Engine) -> Any:
        reference = mistral.reference()["panorama/greedy_ids"].ravel().tolist()
        engine.eos_token_ids = {reference[2]}
        stops = answers(engine, [mistral.request(engine, "panorama", max_new_tokens=12)])["panorama"]
        goes_on = answers(engine, [mistral.request(engine, "panorama", max_new_tokens=12, ignore_eos=True)])["panorama"]
        return reference, stops, goes_on

    reference, stops, goes_on = run_engine(1, config_for(mistral.checkpoint), work)
    assert (stops.token_ids, stops.finish_reason) == (reference[:3], "stop")
    assert (goes_on.token_ids, goes_on.finish_reason) == (reference, "length")


def test_too_long_prompt_is_refused_and_the_others_go_on(mistral: Case) -> None:
    def work(engine: Engine) -> Any:
        return answers(engine, [mistral.request(engine, i, max_new_tokens=2) for i in mistral.items])

    outputs = run_engine(1, config_for(mistral.checkpoint, max_model_len=150), work)
    assert "engine.max_model_len=150" in outputs["pair"].error
    assert outputs["panorama"].error is None and outputs["panorama"].token_ids


def test_answer_is_bounded_by_max_model_len(mistral: Case) -> None:
    def work(engine: Engine) -> Any:
        return answers(engine, [mistral.request(engine, "panorama", max_new_tokens=100, ignore_eos=True)])["panorama"]

    output = run_engine(1, config_for(mistral.checkpoint, max_model_len=140), work)
    assert len(output.prompt_token_ids) + len(output.token_ids) == 140 and output.finish_reason == "length"


def test_cache_too_small_for_one_request(mistral: Case) -> None:
    config = config_for(mistral.checkpoint, max_model_len=256, block_size=16, num_blocks=15)
    with pytest.raises(UserError, match="it takes 16"):
        run_engine(1, config, lambda engine: None)


def sequence(params: SamplingParams, length: int = 4) -> Sequence:
    request = Request("r", Prompt(list(range(length))), params)
    return Sequence(request, Detokenizer(str, []), 1000)


def test_sampled_frequencies() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    state = sequence(SamplingParams(temperature=0.5, seed=1))
    counts = torch.bincount(torch.tensor([sample(Scores(logits), state) for _ in range(4000)]), minlength=4) / 4000
    torch.testing.assert_close(counts, (logits / 0.5).softmax(-1), atol=0.03, rtol=0)


def test_logprobs_are_before_sampling_changes() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0])
    entry = logprobs_entry(logits, 2, 2)
    assert [top["token_id"] for top in entry["top"]] == [1, 2]
    assert entry["logprob"] == pytest.approx(float(logits.log_softmax(-1)[2]))


def test_detokenizer_holds_back_stop_beginnings_and_broken_characters() -> None:
    pieces = {1: "ab", 2: "c#", 3: "##", 4: "d"}
    detokenizer = Detokenizer(lambda ids: "".join(pieces[i] for i in ids), ["###"])
    deltas = []
    for token, ends in ((1, False), (2, False), (3, True)):
        assert detokenizer.push(token) is ends
        deltas.append(detokenizer.take(finished=ends))
    assert "".join(deltas) == detokenizer.text == "abc"
    euro = "€".encode()
    bytewise = Detokenizer(lambda ids: bytes(ids).decode(errors="replace"), [])
    sent = []
    for byte in euro:
        bytewise.push(byte)
        sent.append(bytewise.take(finished=False))
    assert sent == ["", "", "€"]


def test_scheduler_leaves_decoding_sequences_their_token() -> None:
    config = EngineConfig(max_num_batched_tokens=8, max_num_seqs=4)
    scheduler = Scheduler(config, BlockManager(100, 4), EmbeddingCache(0))
    short, long = sequence(SamplingParams(), 3), sequence(SamplingParams(), 30)
    for item in (short, long):
        scheduler.add(item)

    def step() -> dict[int, int]:
        scheduled: list[Scheduled] = scheduler.schedule()
        for item in scheduled:
            samples = item.samples
            item.sequence.num_computed = item.stop
            if samples:
                item.sequence.output_ids.append(0)
        return {item.sequence.num_prompt_tokens: item.num_tokens for item in scheduled}

    assert step() == {3: 3, 30: 5}
    assert [step() for _ in range(3)] == [{3: 1, 30: 7}] * 3
    assert step() == {3: 1, 30: 4} and step() == {3: 1, 30: 1}


def test_few_requests_begin_beside_others() -> None:
    config = EngineConfig(max_num_seqs=6, max_starts_beside_decode=2)
    scheduler = Scheduler(config, BlockManager(100, 4), EmbeddingCache(0))
    for length in range(3, 9):
        scheduler.add(sequence(SamplingParams(), length))
    first = scheduler.schedule()
    assert len(first) == 6, "nobody's answer waits for them"
    for item in first[1:]:
        scheduler.remove(item.sequence)
        scheduler.add(item.sequence)
    first[0].sequence.num_computed = first[0].stop
    first[0].sequence.output_ids.append(0)
    assert len(scheduler.schedule()) == 3
