"""Pictures are encoded once, however often they are shown, and never many at a time beside running answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Case, answers, config_for, run_engine

from mmdist.config import EngineConfig, UserError
from mmdist.engine.engine import Engine
from mmdist.engine.load import open_model
from mmdist.engine.memory import rank_memory
from mmdist.engine.pictures import EmbeddingCache
from mmdist.engine.request import Picture, Request
from mmdist.tp import TP

CASES = ("llava_next_mistral", "llava_15", "llava_next_video", "mllama", "minigpt4", "llama_adapter_bias")


def watch(engine: Engine) -> list[int]:
    """How many pictures (or frames) each call of the vision encoder from now on is about."""
    calls: list[int] = []
    encode = engine.runner.encode_images

    def count(vision: dict[str, torch.Tensor]) -> torch.Tensor:
        calls.append(len(next(iter(vision.values()))))
        return encode(vision)

    engine.runner.encode_images = count  # type: ignore[method-assign]
    return calls


def ask(engine: Engine, case: Case, item_id: str, **params: Any) -> list[int]:
    request = case.request(engine, item_id, **{"max_new_tokens": 6, "ignore_eos": True, **params})
    return answers(engine, [request])[item_id].token_ids


@pytest.mark.parametrize("prefix_cache", (False, True))
@pytest.mark.parametrize("name", CASES)
def test_a_picture_shown_again_is_not_encoded_again(name: str, prefix_cache: bool) -> None:
    case = Case(name)
    first = next(iter(case.items))

    def work(engine: Engine) -> Any:
        calls = watch(engine)
        once = ask(engine, case, first)
        before = list(calls)
        return once, ask(engine, case, first), before, calls, engine.pictures.cache

    once, again, before, calls, cache = run_engine(1, config_for(case, prefix_cache=prefix_cache), work)
    assert once == again and len(before) == 1 and calls == before
    needed_again = 0 if prefix_cache and case.model not in ("mllama", "llama_adapter") else calls[0]
    assert (cache.num_misses, cache.num_hits) == (calls[0], needed_again)


@pytest.mark.parametrize("name", ("llava_next_mistral", "mllama", "llava_15"))
def test_of_two_pictures_the_new_one_is_encoded(name: str) -> None:
    """Beside a picture of another size, which gives it padding, and in float32 with the same answer."""
    case = Case(name)
    shown = next(i for i in case.items if i != "pair" and set(case.image_paths(i)) & set(case.image_paths("pair")))

    def work(engine: Engine) -> Any:
        calls = watch(engine)
        ask(engine, case, shown)
        return ask(engine, case, "pair"), calls

    tokens, calls = run_engine(1, config_for(case), work)
    assert calls == [1, 1]
    assert tokens == case.reference()["pair/greedy_ids"].ravel().tolist()[:6]


def test_pictures_of_neighbours(mistral: Case) -> None:
    """Requests begun together with one picture, and no cache of prefixes: the first to need it has it encoded."""

    def work(engine: Engine) -> Any:
        calls = watch(engine)
        made = [mistral.request(engine, "panorama", max_new_tokens=4, ignore_eos=True) for _ in range(3)]
        outputs = answers(engine, [replace(request, id=str(number)) for number, request in enumerate(made)])
        return calls, {tuple(output.token_ids) for output in outputs.values()}

    calls, tokens = run_engine(1, config_for(mistral, prefix_cache=False), work)
    assert calls == [1] and len(tokens) == 1


def test_no_cache_no_hash(mistral: Case) -> None:
    def work(engine: Engine) -> Any:
        calls = watch(engine)
        request = mistral.request(engine, "pair", max_new_tokens=2)
        answers(engine, [request])
        answers(engine, [request])
        return calls, request.prompt.picture_hashes

    calls, hashes = run_engine(1, config_for(mistral, prefix_cache=False, embedding_cache_mib=0), work)
    assert calls == [2, 2] and hashes == []


def picture(name: bytes, rows: int) -> Picture:
    return Picture(0, name, 0, rows, torch.zeros(rows, 256))  # 1 KiB a row


def test_the_least_recently_shown_goes_first() -> None:
    cache = EmbeddingCache(10 * 1024)
    for made in (picture(b"a", 4), picture(b"b", 4), picture(b"c", 11)):
        cache.keep(made)
    assert list(cache.kept) == [b"a", b"b"] and cache.num_bytes == 8 * 1024  # c is larger than all there is
    shown = Picture(0, b"a", 0, 4)
    assert cache.fill(shown) and shown.embeds is cache.kept[b"a"]
    cache.keep(picture(b"d", 5))
    assert list(cache.kept) == [b"a", b"d"] and cache.num_bytes == 9 * 1024
    assert not cache.fill(Picture(0, b"b", 0, 4)) and (cache.num_hits, cache.num_misses) == (1, 1)


def test_its_memory_is_planned_on_rank_0(mistral: Case) -> None:
    def planned(rank: int, mib: int) -> Any:
        config = config_for(mistral, embedding_cache_mib=mib)
        model, plan, _, _ = open_model(config, TP(rank, 2), "cpu")
        return rank_memory(model, plan, TP(rank, 2), config.engine)

    assert planned(0, 100).embeddings_bytes == 100 * 2**20 == planned(0, 100).total - planned(0, 0).total
    assert planned(1, 100).embeddings_bytes == 0
    with pytest.raises(UserError, match=r"engine.embedding_cache_mib=-1: expected 0 or above"):
        EngineConfig(embedding_cache_mib=-1)


@pytest.mark.parametrize("allowed", (24, 512))
@pytest.mark.parametrize("name", ("llava_next_mistral", "mllama", "minigpt4"))
def test_running_answers_go_on_beside_pictures(name: str, allowed: int) -> None:
    """A request answers; three more come with pictures of their own: every step gives the first one its token, encodes
    for one request (or one picture) at most and computes no more of the prompts than allowed. The order stays."""
    case = Case(name)

    def work(engine: Engine) -> Any:
        first, *others = (case.request(engine, i, max_new_tokens=60, ignore_eos=True) for i in [*case.items][:4])
        others = [Request(r.id, r.prompt, replace(r.params, max_new_tokens=2)) for r in others]
        engine.add(first)
        engine.step()
        calls = watch(engine)
        for request in others:
            engine.add(request)
        ends = []
        while len(engine.sequences) > 1:
            before = {name: s.num_computed for name, s in engine.sequences.items()}
            before_calls = len(calls)
            outputs = engine.step()
            assert first.id in {output.id for output in outputs} and len(calls) <= before_calls + 1
            now = {name: s.num_computed for name, s in engine.sequences.items()}
            prefilled = sum(now[name] - before[name] for name in now if now[name] - before[name] > 1)
            assert prefilled <= allowed
            ends += [output.id for output in outputs if output.finish_reason]
        engine.abort(first.id)
        return calls, ends, [request.id for request in others]

    settings = {"max_prefill_tokens_beside_decode": allowed, "max_num_seqs": 4, "prefix_cache": False}
    calls, ends, order = run_engine(1, config_for(case, **settings), work)
    most = 1 if case.model != "mllama" else 2
    assert calls and max(calls) <= most and ends == order
