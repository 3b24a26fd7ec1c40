"""weights_tools diff: equal and different checkpoints of every kind, in words, in JSON and as an exit code."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, Case
from safetensors.torch import load_file, save_file
from split_cases import Q_PROJ, flip_byte, one_line, source, spoil

from mmdist.manifest import part_file
from mmdist.quant import Ascend, Compressed, Scheme, quantize
from weights_tools import compare as comparing
from weights_tools.cli import main
from weights_tools.compare import compare

W8A16 = GOLDEN / "llava_next_mistral_w8a16" / "checkpoint"


def diff(a: Path, b: Path, capsys: pytest.CaptureFixture) -> tuple[int, dict]:
    capsys.readouterr()
    code = main(["diff", str(a), str(b), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_numbers_of_a_difference(checkpoint: Path, capsys: pytest.CaptureFixture):
    """Beside numpy's of the same tensors."""
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    path = checkpoint / index[Q_PROJ]
    before = load_file(path)[Q_PROJ]
    noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(0)).half() * 1e-3
    noise[:10] = 0
    spoil(path, Q_PROJ, lambda x: x + noise)
    code, facts = diff(source(), checkpoint, capsys)
    assert code == 1 and not facts["equal"] and facts["num_common"] == 90 and facts["num_different"] == 1
    (row,) = (row for row in facts["tensors"] if not row["equal"])
    a, b = (x.double().numpy().ravel() for x in (before, load_file(path)[Q_PROJ]))
    assert row["name"] == Q_PROJ and row["dtypes"] == ["F16", "F16"] and row["shapes"] == [[96, 96], [96, 96]]
    assert row["max_abs"] == np.abs(a - b).max() and row["num_equal"] == (a == b).sum() >= 960
    assert math.isclose(row["rms"], np.sqrt(np.mean((a - b) ** 2)), rel_tol=1e-12)
    assert math.isclose(row["cosine"], a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel_tol=1e-12)
    assert main(["diff", str(source()), str(checkpoint)]) == 1
    out = capsys.readouterr().out
    assert f"{row['num_equal']} of 9216" in out and "1 of 90 common tensors differ, 0 are in one alone" in out


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    whole = diff(source(), W8A16, capsys)[1]
    monkeypatch.setattr(comparing, "BLOCK", 1000)
    small = diff(source(), W8A16, capsys)[1]
    for a, b in zip(whole["tensors"], small["tensors"], strict=True):
        assert (a["max_abs"], a["num_equal"]) == (b["max_abs"], b["num_equal"])
        assert math.isclose(a["rms"], b["rms"], rel_tol=1e-9)


@pytest.mark.parametrize("size", [1, 8])
def test_split_folders_equal_their_source(splits: dict, size: int, capsys: pytest.CaptureFixture):
    assert main(["diff", str(splits["mistral", size]), str(source())]) == 0
    assert capsys.readouterr().out.endswith(f"equal: {splits['mistral', size]} and {source()}\n")
    assert diff(splits["mistral", 2], splits["mistral", size], capsys)[1]["equal"]


def test_quantised_weights_are_compared_as_numbers(tmp_path: Path, capsys: pytest.CaptureFixture):
    code, facts = diff(source(), W8A16, capsys)
    assert code == 1 and facts["num_different"] == 21 and facts["only_in_a"] == facts["only_in_b"] == []
    for row in facts["tensors"]:
        assert row["equal"] or (row["dtypes"] == ["F16", "w8a16"] and 0.9999 < row["cosine"] < 1)
    assert main(["split", str(W8A16), "--ranks", "4", "--dst", str(tmp_path / "tp4")]) == 0
    assert diff(tmp_path / "tp4", W8A16, capsys)[0] == 0


@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(4), Scheme(4, 16)], ids=lambda s: f"{s.name}-{s.group_size}")
def test_formats_of_the_same_integers_are_equal(
    scheme: Scheme, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(comparing, "BLOCK", 1000)  # several blocks a tensor
    for name, format in (("a", Ascend(scheme)), ("b", Compressed(scheme))):
        folder = Path(shutil.copytree(source(), tmp_path / name))
        types: dict[str, object] = {
            "version": "1.0.0",
            "model_quant_type": scheme.name.upper(),
            "group_size": scheme.group_size,
        }
        for path in folder.glob("*.safetensors"):
            tensors = load_file(path)
            for weight in [n for n in tensors if "language_model" in n and "_proj.weight" in n]:
                stored = format.write(quantize(tensors.pop(weight), scheme))
                tensors |= {f"{weight.removesuffix('weight')}{leaf}": x for leaf, x in stored.items()}
            quantised = {n for n in tensors if f"{n.removesuffix('_scale').removesuffix('_offset')}_scale" in tensors}
            types |= {n: scheme.name.upper() if n in quantised else "FLOAT" for n in tensors}
            save_file(tensors, path, {"format": "pt"})
        (folder / "model.safetensors.index.json").unlink()
        if name == "a":
            (folder / "quant_model_description.json").write_text(json.dumps(types))
            continue
        weights = {"num_bits": scheme.bits, "symmetric": True, "strategy": "group" if scheme.group_size else "channel"}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights | {"group_size": scheme.group_size or None}}}
        method = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
        config = json.loads((folder / "config.json").read_text()) | {"quantization_config": method}
        (folder / "config.json").write_text(json.dumps(config))
    code, facts = diff(tmp_path / "a", tmp_path / "b", capsys)
    assert (code, facts["num_common"], facts["num_different"]) == (0, 90, 0)


def test_names_shapes_and_dtypes(checkpoint: Path, capsys: pytest.CaptureFixture):
    tensors = {name: x for path in checkpoint.glob("*.safetensors") for name, x in load_file(path).items()}
    tensors["extra"] = tensors.pop("language_model.model.norm.weight")
    tensors["language_model.lm_head.weight"] = tensors["language_model.lm_head.weight"][:-1].contiguous()
    tensors[Q_PROJ] = tensors[Q_PROJ].float()
    for path in checkpoint.glob("model*"):
        path.unlink()
    save_file(tensors, checkpoint / "model.safetensors")
    code, facts = diff(source(), checkpoint, capsys)
    assert code == 1 and facts["num_different"] == 2
    assert facts["only_in_a"] == ["language_model.model.norm.weight"] and facts["only_in_b"] == ["extra"]
    rows = {row["name"]: row for row in facts["tensors"]}
    assert rows["language_model.lm_head.weight"]["shapes"] == [[416, 96], [415, 96]]
    assert "max_abs" not in rows["language_model.lm_head.weight"]
    wide = rows[Q_PROJ]  # other bytes, the same numbers
    assert wide["dtypes"] == ["F16", "F32"] and wide["num_equal"] == wide["num_values"] and not wide["equal"]
    assert main(["diff", str(source()), str(checkpoint)]) == 1
    out = capsys.readouterr().out
    assert f"only in {checkpoint}: extra" in out and "[416, 96] / [415, 96]" in out and "F16 / F32" in out


def test_names_of_another_version_are_the_same(checkpoint: Path, capsys: pytest.CaptureFixture):
    """The hub's names, and those that transformers 5 writes."""
    for path in checkpoint.glob("*.safetensors"):
        tensors = load_file(path)
        renamed = {
            f"model.{name}".replace("model.language_model.model.", "model.language_model.").replace(
                "model.language_model.lm_head.", "lm_head."
            ): x
            for name, x in tensors.items()
        }
        save_file(renamed, path, {"format": "pt"})
    (checkpoint / "model.safetensors.index.json").unlink()
    assert diff(source(), checkpoint, capsys)[0] == 0


def test_folders_of_no_family(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Any folders of safetensors can be compared, by their names as they stand."""
    for name, value in (("a", 1.0), ("b", math.nan), ("c", math.nan)):
        (tmp_path / name).mkdir()
        tensors = {"x": torch.tensor([0.0, value, math.inf]), "n": torch.tensor(3), "none": torch.zeros(0, 2)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    assert diff(tmp_path / "b", tmp_path / "c", capsys)[0] == 0
    code, facts = diff(tmp_path / "a", tmp_path / "b", capsys)
    (row,) = (row for row in facts["tensors"] if not row["equal"])
    assert code == 1 and row["name"] == "x" and row["max_abs"] == "nan" and row["num_equal"] == 2
    assert main(["diff", str(tmp_path / "a"), str(Case("mllama").checkpoint)]) == 1


def test_compare_zero_and_nothing():
    zero, one = torch.zeros(2, 2), torch.ones(2, 2)
    assert compare([(zero, zero)]).cosine == 1 and compare([(zero, one)]).cosine == 0
    assert compare([(zero, one)]).rms == 1 and compare([]).is_equal


def test_damaged_parts_are_refused(tp2: Path, capsys: pytest.CaptureFixture):
    flip_byte(tp2 / part_file(1, 2), Q_PROJ)
    assert main(["diff", str(tp2), str(source())]) == 2
    assert f"{tp2 / part_file(1, 2)}: {Q_PROJ} is damaged" in one_line(capsys)


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["diff", str(tmp_path / "no_such"), str(source())]) == 2
    assert "no_such: no such folder" in one_line(capsys)
    (tmp_path / "empty").mkdir()
    assert main(["diff", str(source()), str(tmp_path / "empty")]) == 2
    assert "the weights are missing" in one_line(capsys)
