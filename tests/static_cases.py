"""What the tests of static files share: both small checkpoints exported, once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Case

from weights_tools.cli import main

GOLDEN_LENGTH, SHAPES_LENGTH = 104, 128


def export(model: str | Path, dst: Path, *more: str, length: int = GOLDEN_LENGTH) -> int:
    """Golden's sizes are no multiples of int4's groups."""
    modes = [] if any(word in more for word in ("--int4", "--int8", "--bf16")) else ["--int8"]
    argv = ["export", str(model), "--static", "--seq-length", str(length), "--dst", str(dst), *modes, *more]
    return main(argv)


@pytest.fixture(scope="session")
def static_golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dst = tmp_path_factory.mktemp("static") / "golden"
    assert export(Case("mllama").checkpoint, dst) == 0
    return dst


@pytest.fixture(scope="session")
def static_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dst = tmp_path_factory.mktemp("static") / "shapes"
    assert export("mllama", dst, "--int4", length=SHAPES_LENGTH) == 0
    return dst
