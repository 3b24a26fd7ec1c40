"""Our logits and greedy tokens against the reference's, at every world size, alone and in a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import Case, answers, config_for, run_engine

from mmdist.engine.batch import build_batch, image_embeds, take_memories
from mmdist.engine.engine import Engine
from mmdist.engine.request import Request
from mmdist.models.family import find_model, legal_world_sizes, load_model_config

SIZES = (1, 2, 4, 8)
TOLERANCE = 1e-4


def legal(case: Case, size: int) -> None:
    family = find_model(case.model)
    if size not in legal_world_sizes(family, load_model_config(family, case.checkpoint)):
        pytest.skip(f"the heads of {case.name} do not divide into {size}")


def prompt_logits(engine: Engine, request: Request) -> np.ndarray:
    """(prompt, vocab) logits after every token of a prompt."""
    engine.add(request)
    (item,) = engine.scheduler.schedule()
    engine.encode_pictures(item)
    batch = build_batch([item], engine.scheduler.running)
    batch.logits_rows = list(range(len(batch.input_ids)))
    memories = take_memories([item], batch)
    logits = engine.runner.forward(engine.tp.broadcast_object(batch), image_embeds([item]), memories)
    engine.abort(request.id)
    return logits.float().numpy()


@pytest.mark.parametrize("size", SIZES)
def test_logits_of_every_prompt_position(case: Case, size: int) -> None:
    legal(case, size)
    reference = case.reference()

    def work(engine: Engine) -> None:
        for item_id in case.items:
            request = case.request(engine, item_id)
            if f"{item_id}/input_ids" in reference:
                assert request.prompt.token_ids == reference[f"{item_id}/input_ids"].ravel().tolist()
            logits = prompt_logits(engine, request)
            assert np.abs(logits[-1] - reference[f"{item_id}/last_logits"].ravel()).max() <= TOLERANCE
            if f"{item_id}/logits_every4" in reference:
                every4 = reference[f"{item_id}/logits_every4"].reshape(-1, logits.shape[1])
                assert np.abs(logits[::4] - every4).max() <= TOLERANCE

    run_engine(size, config_for(case), work)


@pytest.mark.parametrize("batch", (1, 3))
@pytest.mark.parametrize("size", SIZES)
def test_greedy_tokens(case: Case, size: int, batch: int) -> None:
    """Pictures of different sizes, several pictures, two turns and no picture, `batch` at a time."""
    legal(case, size)
    reference = case.reference()

    def work(engine: Engine) -> Any:
        requests = [case.request(engine, i, max_new_tokens=12, ignore_eos=True) for i in case.items]
        return answers(engine, requests)

    outputs = run_engine(size, config_for(case, max_num_seqs=batch), work)
    for item_id, output in outputs.items():
        assert output.token_ids == reference[f"{item_id}/greedy_ids"].ravel().tolist(), item_id


@pytest.mark.parametrize("size", (1, 2))
def test_decode_logprobs(case: Case, size: int) -> None:
    """Each step's log probabilities equal those of the reference's logits."""
    reference = case.reference()

    def work(engine: Engine) -> Any:
        requests = [case.request(engine, i, max_new_tokens=12, ignore_eos=True, logprobs=5) for i in case.items]
        return answers(engine, requests)

    for item_id, output in run_engine(size, config_for(case, max_num_seqs=3), work).items():
        wanted = torch.from_numpy(reference[f"{item_id}/greedy_logits"]).reshape(12, -1).log_softmax(-1)
        for step, entry in enumerate(output.logprobs):
            assert abs(entry["logprob"] - float(wanted[step].max())) <= TOLERANCE
            best = wanted[step].topk(5)
            assert [top["token_id"] for top in entry["top"]] == best.indices.tolist()
            assert np.abs([top["logprob"] for top in entry["top"]] - best.values.numpy()).max() <= TOLERANCE
