"""Decoding by graphs, but for the graphs: what they are given, how it is padded, and when they are not used.

In place of an accelerator's graph stands one that does its work anew at each replay, over the same input tensors;
tests/npu/test_graphs.py has captured ones.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Case, answers, config_for, run_ranks
from npu.library import operations_of

from mmdist.ascend import CHIPS
from mmdist.backend import Backend
from mmdist.config import Config, HardwareConfig, SamplingParams, UserError
from mmdist.engine.batch import Batch
from mmdist.engine.engine import Engine
from mmdist.engine.graphs import graph_sizes, plan_graphs
from mmdist.engine.load import load_engine, open_model
from mmdist.engine.request import Request
from mmdist.kernels.graphs import GRAPHS, Replay, Work
from mmdist.kernels.paged import DecodeTables, FixedTables
from mmdist.tasks.requests import build_request
from mmdist.tp import TP

CPU = torch.device("cpu")
ASSETS = Path(__file__).parents[1] / "assets"
MISTRAL = Case("llava_next_mistral")
REPLAYED: list[list[int]] = []  # the context lengths of each replay on rank 0


class Repeated:
    """Lengths and inputs are a replay's, the result lies where the first one did."""

    def __init__(self, device: torch.device):
        assert device == CPU

    def capture(self, work: Work, lens: list[int]) -> Replay:
        result = work(lens).clone()

        def replay(lens: list[int]) -> torch.Tensor:
            REPLAYED.append(lens)
            return result.copy_(work(lens))

        return replay


@pytest.fixture
def repeated(monkeypatch: Any) -> None:
    monkeypatch.setitem(GRAPHS, "cpu", Repeated)
    REPLAYED.clear()


def ask(config: Config, size: int, chip: str | None, **settings: Any) -> dict[str, list[int]]:
    """Tokens of six requests."""
    hardware = HardwareConfig(device="cpu", kernels="auto" if chip else "plain")
    config = replace(config, engine=replace(config.engine, **settings), hardware=hardware)
    backend = Backend(CPU, "gloo", CHIPS[chip] if chip else None)

    def work(tp: TP) -> Any:
        engine = load_engine(config, tp, backend)
        assert isinstance(engine, Engine)
        if tp.rank:
            return engine.follow()
        requests = [question(engine, chip, *pair) for pair in zip(MISTRAL.items, (40, 8, 30, 1, 24, 36), strict=True)]
        found = {name: output.token_ids for name, output in answers(engine, requests).items()}
        engine.stop()
        return found

    return run_ranks(size, work)[0]


def question(engine: Engine, chip: str | None, name: str, num_tokens: int) -> Request:
    """A golden one, or where the chip cannot attend to the golden checkpoint's heads, the shapes' one."""
    if chip is None:
        return MISTRAL.request(engine, name, max_new_tokens=num_tokens, ignore_eos=True)
    line = {"id": name, "question": "What is the shape in the middle?", "image": "shapes.png"}
    params = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
    return build_request(line, engine.prompts, params, ASSETS / "pictures")


@pytest.mark.parametrize(("size", "chip"), [(1, None), (2, None), (2, "910b")])
def test_graphs_give_the_same_tokens(size: int, chip: str | None, repeated: None) -> None:
    """Batches of 1 to 4 that grow and shrink, those of 3 padded; 910b: over the reference kernels of its plan."""
    settings: dict[str, Any] = {"dtype": "float16"} if chip else {"block_size": 4, "num_blocks": 105}
    config = config_for(
        ASSETS / "llava_next-shapes" if chip else MISTRAL, max_model_len=256, max_num_seqs=4, **settings
    )
    with operations_of(chip or "910b"):
        want, found = (ask(config, size, chip, decode_graph=mode) for mode in ("off", "on"))
    assert found == want
    assert {len(lens) for lens in REPLAYED} == {1, 2, 4} and any(lens[-1] == 1 for lens in REPLAYED)


def test_a_picture_by_single_tokens(repeated: None) -> None:
    """Steps of one new token a sequence that no graph is for: a picture's, and those after which none is sampled."""
    config = config_for(MISTRAL, max_model_len=256, max_num_seqs=1, max_num_batched_tokens=1)
    want = ask(config, 1, None, decode_graph="off")
    assert not REPLAYED
    assert ask(config, 1, None, decode_graph="on") == want and REPLAYED


def test_who_watches_the_layers_gets_no_graph(repeated: None) -> None:
    engine = load_engine(config_for(MISTRAL, decode_graph="on"), TP(), Backend(CPU, "gloo"))
    assert isinstance(engine, Engine)
    batch = Batch([1], [1], [1], [[0]], [], [0])
    engine.runner.keeps_all = True
    watched = engine.runner.forward(batch)
    assert not REPLAYED
    engine.runner.keeps_all = False
    torch.testing.assert_close(engine.runner.forward(batch), watched)
    assert REPLAYED == [[1]]


def test_padding_leaves_the_cache_alone(repeated: None) -> None:
    """Sequences that are not there write into blocks that no other has."""
    config = config_for(MISTRAL, max_model_len=64, max_num_seqs=8, block_size=4, decode_graph="on")
    engine = load_engine(config, TP(), Backend(CPU, "gloo"))
    assert isinstance(engine, Engine)
    cache, num_blocks = engine.runner.cache, engine.cache_shape.num_blocks
    assert engine.cache_shape.spare_blocks == 2 and cache.k.values.shape[1] == num_blocks + 2
    cache.k.values.fill_(7)
    engine.runner.forward(Batch([1] * 5, [1] * 5, [3] * 5, [[i] for i in range(5)], [], [0]))
    changed = (cache.k.values != 7).any(dim=(0, 2, 4)).nonzero().tolist()  # of (layers, blocks, heads, places, dim)
    assert changed == [[i, 2] for i in range(5)] + [[num_blocks, i] for i in range(3)]


def test_sizes() -> None:
    assert [graph_sizes(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


@pytest.mark.parametrize("window", [None, 3])
def test_fixed_tables(window: int | None) -> None:
    """What tables of their own say, wider by what the longest context may become."""
    tables, lens = [[2, 0, 5], [1]], [10, 3]
    own = DecodeTables(tables, lens, 4, CPU)
    fixed = FixedTables(torch.tensor([[2, 0, 5, 0], [1, 0, 0, 0]]).int(), own.context_lens, lens, 14, 4)
    mask = own.mask(window)
    assert (
        mask is not None and torch.equal(fixed.mask(window)[..., :10], mask) and not fixed.mask(window)[..., 10:].any()
    )
    assert torch.equal(fixed.slots.numbers[:, :10], own.slots.numbers)


def reason(family: str, device: str, chip: str | None, kernels: str = "auto", **settings: Any) -> str:
    folder = {"llava_next": MISTRAL.checkpoint}.get(family, ASSETS / f"{family}-shapes")
    config = config_for(folder, model=family, **settings)
    model, *_ = open_model(config, TP(), "cpu")
    settled, words = plan_graphs(config.engine, model, device, chip, kernels)
    assert settled.decode_graph == ("on" if words.startswith("graphs") else "off")
    return words


def test_the_plan_says_why(monkeypatch: Any) -> None:
    assert reason("llava_next", "npu", "910b") == "graphs captured for batches of 1, 2, 4"
    assert "A2 and A3 only" in reason("llava_next", "npu", "310p")
    assert "engine.decode_graph=off" in reason("llava_next", "npu", "910b", decode_graph="off")
    assert "hardware.kernels=plain" in reason("llava_next", "npu", "910b", "plain")
    assert "a CPU has no graphs" in reason("llava_next", "cpu", None)
    assert "never tried" in reason("llava_next", "cuda", None)
    assert "1, 2, 4" in reason("llava_next", "cuda", None, decode_graph="on")
    assert "its layers look at pictures" in reason("mllama", "npu", "910b")
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "2")
    assert "TASK_QUEUE_ENABLE=2" in reason("llava_next", "npu", "910b")


def test_asked_for_where_there_are_none() -> None:
    with pytest.raises(UserError, match=r"engine.decode_graph=on: CANN's documents.*; use auto or off"):
        reason("llava_next", "npu", "310p", decode_graph="on")


def test_a_sliding_window_that_contexts_outgrow() -> None:
    config = config_for(MISTRAL, max_model_len=64)
    model, *_ = open_model(config, TP(), "cpu")
    model.decoder.shape = replace(model.decoder.shape, window=64)
    assert plan_graphs(config.engine, model, "npu", "910b", "auto")[0].decode_graph == "on"
    model.decoder.shape = replace(model.decoder.shape, window=63)
    assert "sliding window of 63 tokens" in plan_graphs(config.engine, model, "npu", "910b", "auto")[1]
