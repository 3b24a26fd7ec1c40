"""The shipped checkpoint: its size, its answers on held-out questions at every world size, and the default command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import answers, config_for, run_engine

from mmdist.config import SamplingParams
from mmdist.engine.engine import Engine
from mmdist.tasks.requests import build_request, read_requests

REPOSITORY = Path(__file__).parents[1]
SHAPES = REPOSITORY / "assets" / "llava_next-shapes"
NUM_QUESTIONS = 66


def write_questions(folder: Path) -> dict[str, str]:
    """The first held-out questions of examples/shapes/evaluate.py; id -> answer."""
    evaluate = [sys.executable, str(REPOSITORY / "examples" / "shapes" / "evaluate.py")]
    subprocess.run([*evaluate, "--write", str(folder), "--num", str(NUM_QUESTIONS)], check=True, capture_output=True)
    expected = map(json.loads, (folder / "expected.jsonl").read_text().splitlines())
    return {line["id"]: line["answer"] for line in expected}


def test_answers_are_right_and_the_same_at_every_world_size(tmp_path: Path) -> None:
    expected = write_questions(tmp_path)
    params = SamplingParams(max_new_tokens=40)

    def work(engine: Engine) -> Any:
        entries = read_requests(tmp_path / "requests.jsonl")
        outputs = answers(engine, [build_request(entry, engine.prompts, params, tmp_path) for entry in entries])
        return {item_id: output.text.strip() for item_id, output in outputs.items()}

    texts = {size: run_engine(size, config_for(SHAPES, max_num_seqs=8), work) for size in (1, 2, 4, 8)}
    right = sum(texts[1][item_id] == answer for item_id, answer in expected.items())
    assert right >= 0.95 * len(expected)
    assert texts[1] == texts[2] == texts[4] == texts[8]


def test_embedded_default_answers_and_streams() -> None:
    """`python launch.py` alone: two ranks, the shipped picture, the right answer, in pieces."""
    command = [sys.executable, str(REPOSITORY / "launch.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ) as job:
        assert job.stdout is not None
        question = job.stdout.readline().decode()
        pieces = []
        while piece := os.read(job.stdout.fileno(), 4096):
            pieces.append(piece.decode())
    assert job.returncode == 0 and question.startswith("assets/pictures/shapes.png: ")
    assert "".join(pieces).strip() == (REPOSITORY / "assets" / "pictures" / "shapes.txt").read_text().strip()
    assert len(pieces) > 1


def test_shipped_checkpoint_is_small_and_readable() -> None:
    files = [path for path in SHAPES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6 * 2**20
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)
    config = json.loads((SHAPES / "config.json").read_text())["text_config"]
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (8, 4)
