"""The engine's decoding on an emulated 910B, operation by operation and by captured graphs, as a line of JSON a rank;
run by test_replayed_decode.py: decode.py FAMILY CHECKPOINT FOLDER [quant], or decode.py break CHECKPOINT.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from one_chip import refused

from mmdist.backend import Backend, init_backend
from mmdist.config import Config, EngineConfig, HardwareConfig, ModelConfig, QuantConfig, SamplingParams
from mmdist.engine import graphs as engine_graphs
from mmdist.engine.engine import Engine
from mmdist.engine.load import load_engine
from mmdist.kernels.graphs import NpuGraphs
from mmdist.tasks.requests import build_request, read_requests
from mmdist.tp import TP, init_tp

RANK, SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
HARDWARE = HardwareConfig(device="npu")
NEW_TOKENS = (100, 3, 12, 1, 90, 7, 80)  # batches of 1 to 4 that grow and shrink, contexts of one block and of two


def load(family: str, checkpoint: str, tp: TP, backend: Backend, decode_graph: str, quant: str = "auto") -> Engine:
    """Four sequences at once, in fewer blocks than they grow to: some are preempted."""
    settings = EngineConfig(max_model_len=384, max_num_seqs=4, num_blocks=4, decode_graph=decode_graph)
    config = Config(
        model=ModelConfig(name=family), checkpoint=checkpoint, dtype="float16", hardware=HARDWARE, engine=settings,
        quant=QuantConfig(scheme=quant),
    )  # fmt: skip
    engine = load_engine(config, tp, backend)
    assert isinstance(engine, Engine)
    return engine


def watch(engine: Engine) -> tuple[list[int], list[int]]:
    """The sizes of the graphs that are replayed, and of the steps that decode."""
    replayed, steps, hidden = [], [], engine.runner.hidden

    def counted(batch: Any, *pictures: Any) -> torch.Tensor:
        steps.extend([len(batch.query_lens)] if batch.phase == "decode" else [])
        return hidden(batch, *pictures)

    engine.runner.hidden = counted  # type: ignore[method-assign]
    if engine.runner.graphs is not None:
        for size, replay in engine.runner.graphs.replays.items():
            engine.runner.graphs.replays[size] = lambda lens, of=replay: (replayed.append(len(lens)), of(lens))[1]
    return replayed, steps


def run(engine: Engine, folder: Path) -> dict[str, Any]:
    replayed, steps = watch(engine)
    if RANK:
        engine.follow()
        return {"replayed": replayed, "steps": steps}
    lines = islice(read_requests(folder / "requests.jsonl"), len(NEW_TOKENS))
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in NEW_TOKENS]
    pairs = zip(lines, params, strict=True)
    requests = [
        build_request({**line, "id": str(i)}, engine.prompts, own, folder) for i, (line, own) in enumerate(pairs)
    ]
    tokens = {out.id: out.token_ids for out in engine.generate(requests) if out.finish_reason is not None}
    engine.stop()
    lens = {request.id: len(request.prompt.token_ids) for request in requests}
    found = {"tokens": tokens, "prompts": lens, "replayed": replayed, "steps": steps}
    return {**found, "preempted": engine.scheduler.num_preemptions}


class Unwarned(NpuGraphs):
    """Replays without giving the lengths anew."""

    def capture(self, work: Callable, lens: list[int]) -> Callable:
        graphs = []
        real = self.npu.NPUGraph
        self.npu.NPUGraph = lambda: graphs.append(real()) or graphs[-1]
        try:
            super().capture(work, lens)
        finally:
            self.npu.NPUGraph = real
        return lambda lens: graphs[0].replay()


class Waiting(NpuGraphs):
    """Captures what asks for a number, as a print of it would."""

    def capture(self, work: Callable, lens: list[int]) -> Callable:
        return super().capture(lambda lens: work(lens) * work(lens).sum().item(), lens)


class Shared(engine_graphs.Inputs):
    """Sequences that are not there all write to one slot."""

    slots = 2

    def row(self, number: int) -> torch.Tensor:
        found = super().row(number)
        return found[:1].expand(self.size).contiguous() if number == self.slots else found


def broken(checkpoint: str, backend: Backend) -> dict[str, str]:
    """How each planted violation is refused."""
    engine = load("llava_next", checkpoint, TP(), backend, "on")
    settings = (engine.model, engine.runner.cache)

    def decode(kind: type[NpuGraphs]) -> None:
        found = engine_graphs.DecodeGraphs(*settings, kind(backend.device), 2, 384)
        found.hidden(engine_graphs.Batch([5, 5], [1, 1], [4, 4], [[0], [1]]))

    cases = {"no update": lambda: decode(Unwarned), "waits": lambda: decode(Waiting)}
    answers = {name: refused(work) for name, work in cases.items()}
    engine_graphs.Inputs = Shared  # type: ignore[misc]
    return {**answers, "shared slot": refused(lambda: decode(NpuGraphs))}


def main(family: str, checkpoint: str, *rest: str) -> dict[str, Any]:
    backend = init_backend(HARDWARE, local_rank=RANK, local_size=SIZE)
    if family == "break":
        return {"refused": broken(checkpoint, backend)}
    tp = init_tp(backend.collectives, "auto", rank=RANK, size=SIZE, local_size=SIZE, timeout_s=100)
    folder, *quant = rest
    modes = {mode: load(family, checkpoint, tp, backend, mode, *quant) for mode in ("off", "auto")}
    return {mode: run(engine, Path(folder)) for mode, engine in modes.items()}


if __name__ == "__main__":
    found = main(*sys.argv[1:])
    os.write(1, (json.dumps({"rank": RANK, **found}) + "\n").encode())
    os._exit(0)
