"""weights_tools quantize --calibration: the user's requests make the integers lose less, and nothing else changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Case, config_for, run_engine
from safetensors.torch import load_file, save_file
from test_parity import prompt_logits

from mmdist.engine.engine import Engine
from mmdist.quant import Scheme, find_amax, quantize
from weights_tools.calibrate import Scales, calibrate, clip
from weights_tools.cli import main

W4 = Scheme(4, 8)


def write_requests(case: Case, path: Path) -> Path:
    lines = [{**item, "images": list(map(str, case.image_paths(name)))} for name, item in case.items.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def logits(case: Case, folder: Path) -> np.ndarray:
    """Of every position of every prompt."""

    def work(engine: Engine) -> Any:
        return np.concatenate([prompt_logits(engine, case.request(engine, name)) for name in case.items])

    return run_engine(1, config_for(folder), work)


def test_scaling_alone_changes_no_number(mistral: Case, tmp_path: Path) -> None:
    """Factors go into what is before: with plain weights the model is the same."""
    calibration = calibrate("llava_next", mistral.checkpoint, write_requests(mistral, tmp_path / "r.jsonl"), W4)
    assert any(scales.columns is not None and (scales.columns != 1).any() for scales in calibration.scales.values())
    folder = Path(shutil.copytree(mistral.checkpoint, tmp_path / "scaled"))
    for file in folder.glob("*.safetensors"):
        tensors = {name: calibration.scaled(name, tensor.float()) for name, tensor in load_file(file).items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    assert np.abs(logits(mistral, folder) - logits(mistral, mistral.checkpoint)).max() <= 1e-5


def test_clipping_is_the_best_of_what_was_tried() -> None:
    """For inputs that are large where a row's largest weight is not."""
    torch.manual_seed(0)
    weight, inputs = torch.randn(4, 16), torch.randn(32, 16)
    weight[:, 0], inputs[:, 0] = 9.0, 0.0
    amax = clip(weight, inputs, Scheme(4))
    assert (amax < find_amax(weight, Scheme(4))).all()

    def loss(magnitude: torch.Tensor | None) -> float:
        wrong = quantize(weight, Scheme(4), magnitude).dequantize() - weight
        return float((inputs @ wrong.T).square().sum())

    assert loss(amax) < 0.5 * loss(None)


def test_scales_keep_the_dtype() -> None:
    scales = Scales(rows=torch.tensor([2.0, 0.5]), columns=torch.tensor([1.0, 4.0, 1.0]))
    scaled = scales.apply(torch.ones(2, 3, dtype=torch.bfloat16))
    assert scaled.dtype == torch.bfloat16 and scaled.tolist() == [[2, 8, 2], [0.5, 2, 0.5]]


@pytest.mark.parametrize("format", ("ascend", "compressed-tensors"))
def test_calibrated_is_nearer_to_the_plain_model(
    mistral: Case, tmp_path: Path, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = logits(mistral, mistral.checkpoint)
    requests = write_requests(mistral, tmp_path / "r.jsonl")
    errors = {}
    for name, more in (("free", []), ("calibrated", ["--calibration", str(requests)])):
        folder = tmp_path / name
        words = ["--scheme", "w4a16", "--group-size", "8", "--format", format, "--dst", str(folder)]
        assert main(["quantize", "llava_next", "--src", str(mistral.checkpoint), *words, *more]) == 0
        errors[name] = float(np.square(logits(mistral, folder) - plain).mean())
    assert errors["calibrated"] < 0.9 * errors["free"]
    assert "data-free" in capsys.readouterr().out


def test_requests_that_cannot_be_run(mistral: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.jsonl"
    words = ["quantize", "llava_next", "--src", str(mistral.checkpoint), "--scheme", "w4a16", "--group-size", "8"]
    for content, message in ((None, "r.jsonl"), ("", "no requests in it"), ('{"id": 1}\n', '"messages" or "prompt"')):
        if content is not None:
            file.write_text(content)
        assert main([*words, "--dst", str(tmp_path / "out"), "--calibration", str(file)]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
