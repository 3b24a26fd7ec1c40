"""What the tests of weights_tools convert share: VLMo's original files to spoil, and the command."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN
from split_cases import one_line

from weights_tools.cli import main

FILE = "vlmo_base_patch16_480_vqa.pt"
Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """VLMo's original files, to spoil."""
    folder = tmp_path / "original"
    shutil.copytree(GOLDEN / "vlmo_vqa" / "checkpoint", folder, copy_function=shutil.copyfile)
    return folder


def edit(folder: Path, change: Edit, **save: Any) -> None:
    torch.save(change(torch.load(folder / FILE, weights_only=True)), folder / FILE, **save)


def run(src: Path, dst: Path, *more: str) -> int:
    return main(["convert", "vlmo", "--src", str(src), "--dst", str(dst), *more])


def refused(src: Path, dst: Path, capsys: pytest.CaptureFixture, *more: str) -> str:
    """The line of a convert that writes nothing."""
    assert run(src, dst, *more) == 2
    assert not dst.exists() and not dst.with_name(f"{dst.name}.partial").exists()
    return one_line(capsys)
