"""Every family's shipped checkpoint through launch.py on emulated chips: the CPU's answers, its logits within float16's
tolerance. Ranks come from torchrun and from our own agent, and meet in the real ProcessGroupHCCL."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import config_for, convert, run_engine
from npu.jobs import HARDWARE, LAUNCH, REPOSITORY, Run, torchrun
from test_shapes import FAMILIES, SHAPES, write_questions

from mmdist.config import QuantConfig, SamplingParams
from mmdist.engine.engine import Engine
from mmdist.engine.record import Recorder, load_record, record_folder
from mmdist.tasks.requests import build_request, read_requests
from weights_tools.layouts import list_layouts

NUM_QUESTIONS, MAX_NEW_TOKENS = 3, 16
# Of the largest logit; a few layers of sums make it several of the 2^-11 and 2^-8 of one rounding.
TOLERANCE = {"float16": 0.003, "bfloat16": 0.02}


@dataclass(frozen=True)
class Reference:
    """What the CPU answers in float32; folder: the questions, and its logits beside answers.jsonl."""

    checkpoint: Path
    folder: Path
    texts: dict[str, str]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """references(family, scheme="auto"), each made once."""

    @cache
    def make(family: str, scheme: str = "auto") -> Reference:
        folder = tmp_path_factory.mktemp(family)
        checkpoint = convert(family, SHAPES[family], ()) if family in list_layouts() else SHAPES[family]
        write_questions(family, folder)
        lines = (folder / "requests.jsonl").read_text().splitlines(keepends=True)[:NUM_QUESTIONS]
        (folder / "requests.jsonl").write_text("".join(lines))
        config = config_for(checkpoint, model=family, dtype="float32", quant=QuantConfig(scheme=scheme))
        texts = run_engine(1, config, lambda engine: answer(engine, folder))
        return Reference(checkpoint, folder, texts)

    return make


def answer(engine: Engine, folder: Path) -> dict[str, str]:
    engine.recorder = Recorder(record_folder(folder / "answers.jsonl"))
    params = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, logprobs=1)
    entries = read_requests(folder / "requests.jsonl")
    texts = {}
    for output in engine.generate(build_request(entry, engine.prompts, params, folder) for entry in entries):
        if output.finish_reason is not None:
            assert output.error is None
            engine.recorder.save(output.id)
            texts[output.id] = output.text
    return texts


def ask(run: Run, launcher: list[str], soc: str, family: str, reference: Reference, out: Path, *more: str, **env: str):
    """The job itself, as a user would start it; its stderr."""
    done = run(
        [
            *launcher, f"model={family}", f"checkpoint={reference.checkpoint}", f"hardware={HARDWARE[soc]}",
            "task=generate", f"input={reference.folder / 'requests.jsonl'}", f"output={out}", "record=logits",
            f"max_new_tokens={MAX_NEW_TOKENS}", "engine.max_model_len=512", *more,
        ],
        soc, **env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def check(reference: Reference, out: Path, dtype: str) -> float:
    """Same texts; the largest error of a logit, as a share of the largest logit."""
    answers = {line["id"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert {name: line.get("text", line.get("answer")) for name, line in answers.items()} == reference.texts
    worst = 0.0
    for name in answers:
        got, want = (load_record(path, name) for path in (out, reference.folder / "answers.jsonl"))
        assert got is not None and want is not None and got.logits is not None and want.logits is not None
        assert got.logits.shape == want.logits.shape
        worst = max(worst, float((got.logits - want.logits).abs().max() / want.logits.abs().max()))
    assert worst < TOLERANCE[dtype], worst
    return worst


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_of_torchrun(family: str, soc: str, run_on_npu: Run, references: Any, tmp_path: Path) -> None:
    reference, out = references(family), tmp_path / "answers.jsonl"
    launcher = torchrun(2, *LAUNCH[1:])
    said = ask(run_on_npu, launcher, soc, family, reference, out, "dtype=float16")
    assert "world_size=2 on npu, collectives over cpu:gloo,npu:hccl" in said
    print(family, soc, check(reference, out, "float16"))


@pytest.mark.parametrize(("soc", "family"), [("Ascend310P3", "llava"), ("Ascend910B3", "mllama")])
def test_two_ranks_of_our_agent(family: str, soc: str, run_on_npu: Run, references: Any, tmp_path: Path) -> None:
    """World size, dtype and block size as they come; bfloat16 is the 910B's own."""
    reference, out = references(family), tmp_path / "answers.jsonl"
    more = ["world_size=2"] if soc == "Ascend910B3" else []  # a 300I DUO's two chips are taken as they are
    said = ask(run_on_npu, LAUNCH, soc, family, reference, out, *more)
    assert "starting 2 ranks" in said
    print(family, soc, check(reference, out, "bfloat16" if soc == "Ascend910B3" else "float16"))


def test_weights_in_integers(soc: str, run_on_npu: Run, references: Any, tmp_path: Path) -> None:
    """W8A16 through npu_weight_quant_batchmatmul; the CPU has the same integers."""
    reference, out = references("llava", "w8a16"), tmp_path / "answers.jsonl"
    ask(run_on_npu, LAUNCH, soc, "llava", reference, out, "world_size=2", "dtype=float16", "quant=w8a16")
    print(soc, check(reference, out, "float16"))


def test_eight_ranks(run_on_npu: Run, references: Any, tmp_path: Path) -> None:
    reference, out = references("llava_next"), tmp_path / "answers.jsonl"
    said = ask(run_on_npu, LAUNCH, "Ascend910B3", "llava_next", reference, out, "world_size=8", "dtype=float16")
    assert "starting 8 ranks" in said
    print(check(reference, out, "float16"))


def test_retrieval(soc: str, run_on_npu: Run, tmp_path: Path) -> None:
    """VLMo's scores of pictures and captions."""
    pairs = REPOSITORY / "examples" / "shapes" / "pairs.py"
    subprocess.run([LAUNCH[0], str(pairs), "--write", str(tmp_path)], check=True, capture_output=True)
    checkpoint = convert("vlmo", SHAPES["vlmo_retrieval"], ())
    texts = tmp_path / "few.txt"
    texts.write_text("".join((tmp_path / "texts.txt").read_text().splitlines(keepends=True)[:8]))
    asked = ["model=vlmo", f"checkpoint={checkpoint}", "task=generate", f"images={tmp_path / 'pictures'}"]
    asked += [f"texts={texts}", "world_size=2"]
    scores = {}
    for name, hardware in (
        ("npu", [f"hardware={HARDWARE[soc]}", "dtype=float16"]),
        ("cpu", ["hardware=cpu", "dtype=float32"]),
    ):
        output = tmp_path / f"{name}.npz"
        done = run_on_npu([*LAUNCH, *asked, f"output={output}", *hardware], soc)
        assert done.returncode == 0, done.stderr[-3000:]
        scores[name] = torch.tensor(np.load(output)["logits_per_image"])
    error = (scores["npu"] - scores["cpu"]).abs().max() / scores["cpu"].abs().max()
    assert error < TOLERANCE["float16"], error


def test_cann_not_sourced(run_on_npu: Run) -> None:
    """torch_npu is installed and cannot be imported: the CPU is used unless the NPU was asked for."""
    bare = {"LD_LIBRARY_PATH": "", "PYTHONPATH": str(REPOSITORY)}
    done = run_on_npu([*LAUNCH, "model=llava", "world_size=1"], "Ascend310P3", **bare)
    assert done.returncode == 0 and "the job runs on the CPU: CANN is not on the library path" in done.stderr
    done = run_on_npu([*LAUNCH, "model=llava", "hardware=300i_duo", "world_size=1"], "Ascend310P3", **bare)
    assert done.returncode == 2 and re.search(r"^error: .*set_env.sh$", done.stderr, re.M), done.stderr


def test_a_chip_without_bfloat16(run_on_npu: Run, tmp_path: Path) -> None:
    done = run_on_npu([*LAUNCH, "model=llava", "hardware=300i_duo", "dtype=bfloat16", "world_size=2"], "Ascend310P3")
    assert done.returncode == 2 and re.search(r"error: .*bfloat16", done.stderr), done.stderr


def test_more_ranks_than_chips(run_on_npu: Run) -> None:
    done = run_on_npu([*LAUNCH, "model=llava", "hardware=300i_duo", "world_size=4"], "Ascend310P3")
    assert done.returncode == 2 and "2 npu devices are visible" in done.stderr, done.stderr
