"""The shipped checkpoints: their sizes, their answers on held-out questions at every world size, and the default."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import answers, config_for, convert, run_engine

from mmdist.config import SamplingParams
from mmdist.engine.engine import Engine
from mmdist.models.family import find_model, legal_world_sizes, load_model_config
from mmdist.tasks.requests import build_request, read_requests
from weights_tools.layouts import list_layouts

REPOSITORY = Path(__file__).parents[1]
SHAPES = {path.name.removesuffix("-shapes"): path for path in sorted(REPOSITORY.glob("assets/*-shapes"))}
FAMILIES = [name for name in SHAPES if name != "vlmo_retrieval"]
NUM_QUESTIONS = 40
MAX_BYTES = 4 * 2**20


def write_questions(family: str, folder: Path) -> dict[str, str]:
    """The first held-out questions of examples/shapes/evaluate.py; id -> answer."""
    evaluate = [sys.executable, str(REPOSITORY / "examples" / "shapes" / "evaluate.py"), "--family", family]
    subprocess.run([*evaluate, "--write", str(folder), "--num", str(NUM_QUESTIONS)], check=True, capture_output=True)
    expected = map(json.loads, (folder / "expected.jsonl").read_text().splitlines())
    return {line["id"]: line["answer"] for line in expected}


def ask(engine: Engine, folder: Path) -> dict[str, Any]:
    """What write_questions wrote, answered: by id."""
    params = SamplingParams(max_new_tokens=40)
    entries = read_requests(folder / "requests.jsonl")
    return answers(engine, [build_request(entry, engine.prompts, params, folder) for entry in entries])


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_right_and_the_same_at_every_world_size(family: str, tmp_path: Path) -> None:
    expected = write_questions(family, tmp_path)
    checkpoint = convert(family, SHAPES[family], ()) if family in list_layouts() else SHAPES[family]

    def work(engine: Engine) -> Any:
        outputs = ask(engine, tmp_path)
        assert not [output.error for output in outputs.values() if output.error is not None]
        return {item_id: output.text.strip() for item_id, output in outputs.items()}

    model = find_model(family)
    sizes = [size for size in legal_world_sizes(model, load_model_config(model, checkpoint)) if size in (1, 2, 4, 8)]
    config = config_for(checkpoint, model=family, max_num_seqs=8)
    texts = {size: run_engine(size, config, work) for size in sizes}
    right = sum(texts[1][item_id] == answer for item_id, answer in expected.items())
    assert right >= 0.9 * len(expected)
    assert all(found == texts[1] for found in texts.values())


@pytest.mark.parametrize("kv_cache_dtype", ("auto", "int8"))
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "vlmo"])
def test_native_kernels_answer_as_plain_torch_does(family: str, kv_cache_dtype: str, tmp_path: Path) -> None:
    """In bfloat16; where roundings decide, one answer in forty may differ."""
    expected = write_questions(family, tmp_path)
    checkpoint = convert(family, SHAPES[family], ()) if family in list_layouts() else SHAPES[family]

    def work(engine: Engine) -> Any:
        return {item_id: output.token_ids for item_id, output in ask(engine, tmp_path).items()}

    found = {}
    for kernels in ("auto", "plain"):
        config = config_for(checkpoint, model=family, dtype="bfloat16", max_num_seqs=8, kv_cache_dtype=kv_cache_dtype)
        config.hardware.kernels = kernels
        found[kernels] = run_engine(1, config, work)
    assert sum(found["auto"][item_id] != found["plain"][item_id] for item_id in expected) <= 1


def run_demo(*overrides: str) -> tuple[str, list[str]]:
    """The question line and the answer as it comes, of `python launch.py`."""
    command = [sys.executable, str(REPOSITORY / "launch.py"), *overrides]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ) as job:
        assert job.stdout is not None
        question = job.stdout.readline().decode()
        pieces = []
        while piece := os.read(job.stdout.fileno(), 4096):
            pieces.append(piece.decode())
    assert job.returncode == 0
    return question, pieces


def test_embedded_default_answers_and_streams() -> None:
    """`python launch.py` alone: two ranks, the shipped picture, the right answer, in pieces."""
    question, pieces = run_demo()
    assert question.startswith("assets/pictures/shapes.png: ")
    assert "".join(pieces).strip() == (REPOSITORY / "assets" / "pictures" / "shapes.txt").read_text().strip()
    assert len(pieces) > 1


@pytest.mark.parametrize("folder", SHAPES.values(), ids=SHAPES)
def test_shipped_checkpoints_are_small_and_readable(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)
