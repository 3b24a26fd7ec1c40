"""What the tests of quantised folders share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Case
from safetensors.torch import load_file
from split_cases import source

from weights_tools.cli import main

W4 = ("--scheme", "w4a16", "--group-size", "32")
COMPRESSED = ("--format", "compressed-tensors")


def quantize(src: Path, dst: Path, *flags: str, model: str | None = None) -> Path:
    """W8A16 unless flags say other."""
    scheme = () if "--scheme" in flags else ("--scheme", "w8a16")
    named = (str(src),) if model is None else (model, "--src", str(src))
    assert main(["quantize", *named, "--dst", str(dst), *scheme, *flags]) == 0
    return dst


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


def golden() -> Case:
    return Case("llava_next_mistral_w8a16")


def description(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "quant_model_description.json").read_text())


@pytest.fixture(scope="session")
def w8a16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float golden case, quantised here."""
    return quantize(source(), tmp_path_factory.mktemp("quantised") / "w8a16")
