"""What the tests share: ranks as threads of one process, golden cases, and a loader for a rank's engine."""

from __future__ import annotations

import atexit
import json
import logging
import mmap
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

from mmdist.backend import Backend
from mmdist.collectives.distributed import DistributedCollectives
from mmdist.collectives.shm import ShmCollectives, create_segment
from mmdist.config import Config, EngineConfig, ModelConfig, QuantConfig, SamplingParams
from mmdist.engine.engine import Engine
from mmdist.engine.load import load_engine
from mmdist.engine.request import Output, Request
from mmdist.native.build import load_library
from mmdist.tasks.requests import build_request
from mmdist.tp import TP
from weights_tools.cli import main as weights_tools

pytest_plugins = [
    "split_cases",
    "convert_cases",
    "quant_cases",
    "static_cases",
    "npu.jobs",
    "vision_cases",
    "serve_cases",
    "format_cases",
]
GOLDEN = Path(__file__).parent / "data" / "golden"


@dataclass(frozen=True)
class Family:
    """Whose a golden case is. folder: its files, if several cases share them. settings: `weights_tools convert --set`
    for an original layout; None for a Hugging Face folder."""

    model: str
    folder: str | None = None
    settings: tuple[str, ...] | None = None


FAMILIES = {
    "llava_next_mistral": Family("llava_next"),
    "llava_next_vicuna": Family("llava_next"),
    "llava_next_34b": Family("llava_next"),
    "llava_next_mistral_w8a16": Family("llava_next"),
    "llava_15": Family("llava"),
    "llava_next_video": Family("llava_next_video"),
    "mllama": Family("mllama"),
    "minigpt4": Family("minigpt4", settings=()),
    "minigpt4_llama2": Family("minigpt4", settings=()),
    "llama_adapter_bias": Family("llama_adapter", "llama_adapter", ("adapter=BIAS-7B.pth", "clip=clip/ViT-L-14.pt")),
    "llama_adapter_lora": Family(
        "llama_adapter", "llama_adapter", ("adapter=LORA-BIAS-7B.pth", "clip=clip_plain/ViT-L-14.pt")
    ),
}
CPU = Backend(torch.device("cpu"), "gloo")
CONVERTED: dict[str, Path] = {}  # original layouts, each converted once a session

torch.set_num_threads(1)


@dataclass
class Case:
    """A golden case of a family that generates: a tiny checkpoint, its inputs, and what the reference code made."""

    name: str

    @property
    def family(self) -> Family:
        return FAMILIES[self.name]

    @property
    def folder(self) -> Path:
        return GOLDEN / (self.family.folder or self.name)

    @property
    def model(self) -> str:
        return self.family.model

    @property
    def checkpoint(self) -> Path:
        source = self.folder / "checkpoint"
        if self.family.settings is None:
            return source
        if self.name not in CONVERTED:
            CONVERTED[self.name] = convert(self.model, source, self.family.settings)
        return CONVERTED[self.name]

    @property
    def items(self) -> dict[str, dict[str, Any]]:
        """Requests as a user writes them, by id."""
        lines = json.loads((self.folder / "inputs" / "items.json").read_text())["items"]
        return {item["id"]: item for item in lines if item.get("case", self.name) == self.name}

    def reference(self) -> Any:
        return np.load(self.folder / "golden.npz")

    def image_paths(self, item_id: str) -> list[Path]:
        return [self.folder / "inputs" / name for name in self.items[item_id].get("images", [])]

    def request(self, engine: Engine, item_id: str, **params: Any) -> Request:
        entry = {key: value for key, value in self.items[item_id].items() if key != "case"}
        return build_request(entry, engine.prompts, SamplingParams(**params), self.folder / "inputs")


def convert(model: str, source: Path, settings: tuple[str, ...]) -> Path:
    """An original layout as one plain folder, in a temporary place."""
    folder = Path(tempfile.mkdtemp(prefix="mmdist-tests-")) / model
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    sets = [word for setting in settings for word in ("--set", setting)]
    assert weights_tools(["convert", model, "--src", str(source), "--dst", str(folder), *sets]) == 0
    return folder


def config_for(
    checkpoint: Path | Case,
    *,
    model: str = "llava_next",
    dtype: str = "float32",
    quant: QuantConfig | None = None,
    **engine: Any,
) -> Config:
    """A golden case, or a checkpoint of the family `model`."""
    model = checkpoint.model if isinstance(checkpoint, Case) else model
    checkpoint = checkpoint.checkpoint if isinstance(checkpoint, Case) else checkpoint
    settings = EngineConfig(**{"max_model_len": 512, "max_num_seqs": 4, **engine})
    quant = quant or QuantConfig()
    return Config(checkpoint=str(checkpoint), model=ModelConfig(name=model), dtype=dtype, quant=quant, engine=settings)


def run_ranks(size: int, work: Callable[[TP], Any], collectives: str = "shm") -> list[Any]:
    """work(tp) on each of `size` ranks, which are threads; their results. They share memory, or (torch) torch's
    threaded process group."""
    if size == 1:
        return [work(TP())]
    join, leave = (shm_ranks if collectives == "shm" else torch_ranks)(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def rank_main(rank: int) -> None:
        try:
            results[rank] = work(join(rank))
        except BaseException as error:
            errors.append(error)

    try:
        threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and not errors:
                thread.join(0.05)
    finally:
        leave()
    if errors:
        raise errors[0]
    return results


Ranks = tuple[Callable[[int], TP], Callable[[], None]]


def shm_ranks(size: int, timeout_s: float = 60) -> Ranks:
    """(a rank's TP, what to do at the end)"""
    native = load_library()
    assert native is not None, "the tests need a C compiler"
    fd = create_segment(native, size)
    segment = mmap.mmap(fd, 0)
    os.close(fd)
    unwatched = [-1] * size  # threads die with their process
    return lambda rank: TP(
        rank, size, ShmCollectives(native, segment, rank, unwatched, spin_us=0, timeout_s=timeout_s)
    ), lambda: None


def torch_ranks(size: int) -> Ranks:
    store = dist.HashStore()
    _install_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)

    def join(rank: int) -> TP:
        dist.init_process_group("threaded", rank=rank, world_size=size, store=store)
        return TP(rank, size, DistributedCollectives(rank, size, dist.group.WORLD))

    def leave() -> None:
        ProcessLocalGroup.reset()
        _uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)

    return join, leave


def run_engine(size: int, config: Config, work: Callable[[Engine], Any]) -> Any:
    """work(engine) on rank 0 of `size` ranks, the others following; rank 0's result."""

    def rank_work(tp: TP) -> Any:
        engine = load_engine(config, tp, CPU)
        if tp.rank > 0:
            return engine.follow()
        result = work(engine)
        engine.stop()
        return result

    return run_ranks(size, rank_work)[0]


def answers(engine: Engine, requests: list[Request]) -> dict[str, Output]:
    """The last output of each request."""
    return {output.id: output for output in engine.generate(requests) if output.finish_reason is not None}


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture
def mistral() -> Case:
    return Case("llava_next_mistral")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Jobs write outputs/ into the test's own folder; nothing of a surrounding launcher leaks in, no log handler out
    (it would hold a stderr that is closed with its test)."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    yield
    log = logging.getLogger("mmdist")
    log.handlers.clear()
    log.propagate = True
