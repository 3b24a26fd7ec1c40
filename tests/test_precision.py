"""task=precision: what is the same passes, what is not is caught and named; whatever cannot be compared is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_tasks import main

from mmdist.config import REPOSITORY

PICTURES = REPOSITORY / "assets" / "pictures"
LLAVA_NEXT = ["model=llava_next", "dtype=float32", "max_new_tokens=6", "prompt=What is in the picture?"]


def precision(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and precision.json of the job."""
    code = main(monkeypatch, "task=precision", "output_dir=job", *arguments)
    return code, json.loads(Path("job/precision.json").read_text())


def test_two_ranks_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through launch.py, each side a job of its own."""
    code, found = precision(monkeypatch, *LLAVA_NEXT, f"data={PICTURES}", "reference=world_size_1", "world_size=2")
    assert code == 0 and found["passed"] and found["summary"]["compared"] == "logits"
    assert found["summary"]["requests"] == found["summary"]["requests_equal"] == 5
    assert 0 < found["summary"]["max_error"] < 1e-4
