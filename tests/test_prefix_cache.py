"""The prefix cache: what was computed before is found, and only that; the answers stay as they are."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Case, answers, config_for, run_engine

from mmdist.config import EngineConfig, SamplingParams
from mmdist.engine.blocks import BlockManager
from mmdist.engine.detokenizer import Detokenizer
from mmdist.engine.engine import Engine
from mmdist.engine.pictures import EmbeddingCache
from mmdist.engine.record import Recorder
from mmdist.engine.request import Picture, Request, Sequence
from mmdist.engine.scheduler import Scheduler
from mmdist.models.base import Prompt
from mmdist.task_config import GenerateConfig, PerformanceConfig

CASES = ("llava_next_mistral", "llava_next_video", "mllama", "minigpt4", "llama_adapter_bias")
BLOCK = 4
NOTHING_KEPT = {"prefix_cache": False, "embedding_cache_mib": 0}


def requests_of(case: Case, engine: Engine, suffix: str = "", **params: Any) -> list[Request]:
    made = [case.request(engine, i, **{"max_new_tokens": 8, "ignore_eos": True, **params}) for i in case.items]
    return [replace(request, id=request.id + suffix) for request in made]


def continued(request: Request, token_ids: list[int]) -> Request:
    """The next turn: the answer and some more words behind the prompt."""
    more = [*request.prompt.token_ids, *token_ids, *range(11, 20)]
    return Request(f"{request.id} next", replace(request.prompt, token_ids=more), request.params)


def run_all(engine: Engine, requests: list[Request]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Last outputs and the logits of all answered tokens, by id."""
    engine.recorder = Recorder(Path("record"))
    outputs = answers(engine, requests)
    return outputs, {name: torch.stack(rows) for name, rows in engine.recorder.logits.items()}


def ask_twice(engine: Engine, case: Case) -> Any:
    """Every request, again, and its next turn; log probabilities are asked for, so that logits are there."""
    first = run_all(engine, requests_of(case, engine, logprobs=0))
    again = run_all(engine, requests_of(case, engine, logprobs=0))
    turns = [continued(r, first[0][r.id].token_ids) for r in requests_of(case, engine, logprobs=0)]
    return [first, again, run_all(engine, turns)]


@pytest.mark.parametrize("size", (1, 2))
@pytest.mark.parametrize("name", CASES)
def test_found_blocks_change_nothing(name: str, size: int) -> None:
    """Logits within 1e-5 and equal tokens, three at a time; all but the last block of a repeated prompt is found, and
    of a next turn the answer too."""
    case = Case(name)
    kept, plain = (
        run_engine(
            size,
            config_for(case, block_size=BLOCK, max_num_seqs=3, max_num_batched_tokens=100, **extra),
            lambda engine: ask_twice(engine, case),
        )
        for extra in ({"num_blocks": 2000}, NOTHING_KEPT)
    )
    for (ours, our_logits), (wanted, logits) in zip(kept, plain, strict=True):
        assert {i: o.token_ids for i, o in ours.items()} == {i: o.token_ids for i, o in wanted.items()}
        assert all((our_logits[i] - logits[i]).abs().max() <= 1e-5 for i in logits)
        assert not any(output.num_cached_tokens for output in wanted.values())
    for output in kept[1][0].values():
        assert output.num_cached_tokens == (len(output.prompt_token_ids) - 1) // BLOCK * BLOCK
    for output in kept[2][0].values():  # of an answer's last token nothing was computed
        known = len(output.prompt_token_ids) - len(range(11, 20)) - 1
        assert output.num_cached_tokens == known // BLOCK * BLOCK


@pytest.mark.parametrize("change", ({"kv_cache_dtype": "int8"}, {"window": 40}, {"max_num_batched_tokens": 9}))
def test_found_blocks_of_other_caches(mistral: Case, change: dict[str, Any], tmp_path: Path) -> None:
    """Vectors in int8, a sliding window shorter than the prompt, and prompts in chunks."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(mistral.checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["sliding_window"] = change.pop("window", None)
    (folder / "config.json").write_text(json.dumps(config))

    def work(engine: Engine) -> Any:
        runs = [answers(engine, requests_of(mistral, engine)) for _ in range(2)]
        return [{i: o.token_ids for i, o in run.items()} for run in runs], engine.scheduler.blocks.prefix.num_hit_tokens

    settings = {"block_size": BLOCK, "max_num_seqs": 3, "num_blocks": 2000, **change}
    (first, again), num_hits = run_engine(1, config_for(folder, **settings), work)
    (wanted, _), none = run_engine(1, config_for(folder, **settings, **NOTHING_KEPT), work)
    assert first == again == wanted and num_hits > 0 == none


@pytest.mark.parametrize("name", ("llava_next_mistral", "minigpt4", "mllama", "llama_adapter_bias"))
def test_another_picture_is_another_prefix(name: str) -> None:
    """Equal tokens about another picture: found is what stands before it, and nothing where all layers look at it."""
    case = Case(name)
    first = next(iter(case.items))

    def work(engine: Engine) -> Any:
        request = case.request(engine, first, max_new_tokens=8, ignore_eos=True)
        prompt = request.prompt
        negative = {n: -x if x.is_floating_point() else x for n, x in prompt.vision.items()}
        other = Request("other", replace(prompt, vision=negative, picture_hashes=[]), request.params)
        kept = answers(engine, [request])[first]
        return prompt, kept.token_ids, answers(engine, [other])["other"]

    prompt, tokens, output = run_engine(1, config_for(case, block_size=BLOCK), work)
    *_, wanted = run_engine(1, config_for(case, **NOTHING_KEPT), work)
    assert output.num_cached_tokens == min(prompt.image_positions, default=0) // BLOCK * BLOCK
    assert output.token_ids == wanted.token_ids != tokens


def test_rows_of_a_picture_are_told_from_words(mistral: Case) -> None:
    """The same token ids and pictures, but another place of the picture's rows, as the id of an unknown word allows."""
    blocks = BlockManager(20, BLOCK, finds_prefixes=True)
    params = SamplingParams()

    def hashes(positions: list[int]) -> list[bytes]:
        prompt = Prompt([0] * 9, positions, {"pixel_values": torch.zeros(1, 1)})
        sequence = Sequence(Request("r", prompt, params), Detokenizer(str, []), 99)
        sequence.pictures = [Picture(0, b"digest", 0, len(positions))]
        return blocks._hashes(sequence)

    assert hashes([1, 2]) != hashes([2, 3]) and hashes([1, 2]) == hashes([1, 2])


def test_many_requests_in_little_memory(mistral: Case) -> None:
    """Beginnings shared at random, requests given up, blocks taken back and sequences computed again: every answer is
    that of an engine that keeps nothing, and in the end no block is anyone's."""
    random.seed(5)
    shared = [[random.randrange(5, 200) for _ in range(40)] for _ in range(3)]
    prompts = [random.choice(shared)[: random.randrange(1, 41)] + [7] * random.randrange(1, 9) for _ in range(40)]

    def work(engine: Engine) -> Any:
        params = SamplingParams(max_new_tokens=14, ignore_eos=True)
        for number, token_ids in enumerate(prompts):
            engine.add(Request(str(number), Prompt(token_ids), params))
        found, steps = {}, 0
        while engine.sequences:
            found |= {output.id: output.token_ids for output in engine.step() if output.finish_reason}
            steps += 1
            if steps % 9 == 0:
                engine.abort(random.Random(steps).choice(sorted(engine.sequences) or ["none"]))
        blocks = engine.scheduler.blocks
        assert blocks.num_free == blocks.num_blocks and not any(blocks.num_users) and not blocks.prefix.coming
        assert sorted([*blocks.free, *blocks.prefix.unused]) == list(range(blocks.num_blocks))
        return found, engine.scheduler.num_preemptions, blocks.prefix.num_hit_tokens

    tight = {"max_model_len": 64, "block_size": BLOCK, "num_blocks": 30, "max_num_seqs": 6}
    found, preemptions, num_hits = run_engine(1, config_for(mistral, **tight, max_num_batched_tokens=24), work)
    wanted, *_ = run_engine(1, config_for(mistral, max_model_len=64, max_num_seqs=40, **NOTHING_KEPT), work)
    both = found.keys() & wanted.keys()
    assert preemptions > 0 and num_hits > 100 and len(both) > 10
    assert {i: found[i] for i in both} == {i: wanted[i] for i in both}


def sequence(token_ids: list[int], max_new_tokens: int = 8) -> Sequence:
    request = Request("r", Prompt(token_ids), SamplingParams(max_new_tokens=max_new_tokens))
    return Sequence(request, Detokenizer(str, []), 1000)


def compute(blocks: BlockManager, made: Sequence) -> list[int]:
    """All of a sequence at once; its blocks."""
    found = blocks.find(made)
    assert blocks.can_start(made, found, made.num_tokens)
    blocks.start(made, found)
    blocks.grow(made, made.num_tokens)
    made.num_computed = made.num_tokens
    blocks.note_computed(made)
    return list(made.block_table)


def test_blocks_are_low_contiguous_and_the_oldest_go_first() -> None:
    blocks = BlockManager(8, BLOCK, finds_prefixes=True)
    a, b, c = ([number] * 12 for number in (1, 2, 3))
    first, second = sequence(a), sequence(b)
    assert compute(blocks, first) == [0, 1, 2] and compute(blocks, second) == [3, 4, 5]
    for made in (second, first):
        blocks.release(made)
    assert blocks.num_used == 0 and blocks.num_free == 8
    third = sequence([*a, 9])  # shares all of a's blocks, takes the lowest free one
    assert compute(blocks, third) == [0, 1, 2, 6] and blocks.num_used == 4
    fourth = sequence(c)  # the last free block, then b's: the ends of its chain before its beginning
    assert compute(blocks, fourth) == [4, 5, 7]
    blocks.release(third)
    blocks.release(fourth)
    assert compute(blocks, sequence([*b, 9]))[0] == 3
    assert blocks.prefix.num_queried_tokens == 12 + 12 + 13 + 12 + 13 and blocks.prefix.num_hit_tokens == 12 + 4


def test_two_users_of_a_block() -> None:
    blocks = BlockManager(4, BLOCK, finds_prefixes=True)
    first, second = sequence([1] * 9), sequence([1] * 9)
    assert compute(blocks, first) == [0, 1, 2] and compute(blocks, second) == [0, 1, 3]
    blocks.release(first)
    assert blocks.num_used == 3 and not blocks.can_grow(sequence([2] * 9), 9)
    blocks.release(second)
    assert blocks.num_used == 0 and sorted(blocks.free) == [2, 3]
    long = sequence([1] * 8 + [5] * 12)  # what is found of it is no room for the rest
    found = blocks.find(long)
    assert found == [0, 1] and blocks.can_start(long, found, 16) and not blocks.can_start(long, found, 20)


def step(scheduler: Scheduler) -> list[tuple[int, int]]:
    """(length of the prompt, tokens computed) of what runs in the next step."""
    scheduled = scheduler.schedule()
    ran = [(item.sequence.num_prompt_tokens, item.num_tokens) for item in scheduled]
    for item in scheduled:
        samples = item.samples
        item.sequence.num_computed = item.stop
        scheduler.blocks.note_computed(item.sequence)
        if samples:
            item.sequence.output_ids.append(0)
    return ran


def test_who_shares_most_waits_for_it() -> None:
    """Several answers to one question, begun together: its prompt is computed once. A short common beginning is not
    waited for."""
    scheduler = Scheduler(
        EngineConfig(max_num_seqs=8), BlockManager(100, BLOCK, finds_prefixes=True), EmbeddingCache(0)
    )
    for token_ids in ([1] * 8 + [2] * 42, [1] * 40, [1] * 41):
        scheduler.add(sequence(token_ids))
    assert step(scheduler) == [(50, 50), (40, 40)]
    assert step(scheduler) == [(50, 1), (40, 1), (41, 1)]


def test_what_measures_and_compares_keeps_nothing() -> None:
    for config in (PerformanceConfig(), GenerateConfig(input="x", record="layers")):
        assert not config.engine.prefix_cache and config.engine.embedding_cache_mib == 0
    usual = GenerateConfig(input="x").engine
    assert usual.prefix_cache and usual.embedding_cache_mib > 0
