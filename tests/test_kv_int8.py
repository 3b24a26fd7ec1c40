"""The int8 KV cache: near the plain one, and the same whatever chunks, batches and world size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import CPU, Case, answers, config_for, run_engine

from mmdist.config import EngineConfig, UserError
from mmdist.engine.engine import Engine
from mmdist.engine.load import load_engine, open_model
from mmdist.engine.memory import rank_memory
from mmdist.kernels.pages import Int8Pages, Slots
from mmdist.tp import TP


def outputs(case: Case, size: int = 1, **engine: Any) -> dict[str, Any]:
    def work(engine: Engine) -> Any:
        requests = [case.request(engine, i, max_new_tokens=12, ignore_eos=True, logprobs=0) for i in case.items]
        return answers(engine, requests)

    return run_engine(size, config_for(case, **{"kv_cache_dtype": "int8", **engine}), work)


def test_vectors_come_back_within_half_a_step() -> None:
    pages = Int8Pages((2, 5, 3, 2, 16), torch.float32, torch.device("cpu"))
    vectors, slots = torch.randn(4, 3, 16), Slots(torch.tensor([7, 1, 2, 3]), 2)
    written = pages.write(1, slots, vectors)
    step = vectors.abs().amax(-1, keepdim=True) / 127
    assert ((written - vectors).abs() <= step / 2 + 1e-6).all()
    assert torch.equal(pages.read(1, slots), written)
    assert torch.equal(pages.values[1, 3, :, 1] * pages.scales[1, 3, :, 1], written[0])


def test_near_the_plain_cache(case: Case) -> None:
    """The likeliest first token's log probability is within 0.1 of the plain cache's, and not the same."""
    plain, small = outputs(case, kv_cache_dtype="auto"), outputs(case)
    for item_id in case.items:
        first, second = plain[item_id].logprobs[0], small[item_id].logprobs[0]
        assert 0 < abs(first["logprob"] - second["logprob"]) < 0.1


@pytest.mark.parametrize("change", ({"max_num_batched_tokens": 37}, {"max_num_seqs": 1}, {"block_size": 3}))
def test_chunks_and_neighbours_change_nothing(mistral: Case, change: dict[str, int]) -> None:
    whole, other = outputs(mistral), outputs(mistral, **change)
    assert {i: o.token_ids for i, o in whole.items()} == {i: o.token_ids for i, o in other.items()}


@pytest.mark.parametrize("size", (2, 8))
def test_ranks_change_nothing(mistral: Case, size: int) -> None:
    whole, other = outputs(mistral), outputs(mistral, size)
    assert {i: o.token_ids for i, o in whole.items()} == {i: o.token_ids for i, o in other.items()}


def test_its_memory_is_planned(mistral: Case) -> None:
    config = config_for(mistral, dtype="bfloat16", kv_cache_dtype="int8")
    model, plan, _, _ = open_model(config, TP(), "cpu")
    planned = rank_memory(model, plan, TP(), config.engine).kv_bytes
    cache = load_engine(config, TP(), CPU).runner.cache
    assert planned == cache.k.nbytes + cache.v.nbytes


def test_another_name_is_refused() -> None:
    with pytest.raises(UserError, match=r"engine.kv_cache_dtype=int4: expected auto\|int8"):
        EngineConfig(kv_cache_dtype="int4")
