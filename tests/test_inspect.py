"""weights_tools inspect: checkpoints, split folders, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Case
from safetensors.torch import load_file, save_file
from split_cases import load, source

from mmdist.config import UserError
from mmdist.manifest import part_file
from mmdist.tp import TP
from weights_tools.cli import main


def test_inspect_a_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture):
    assert main(["inspect", str(checkpoint)]) == 0
    out = capsys.readouterr().out
    assert "llava_next" in out and "90 tensors in 3 files" in out and "legal world sizes: 1, 2, 4, 8" in out
    assert main(["inspect", str(checkpoint), "--ranks", "8", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    held = facts["bytes_by_placement"]
    copies = 8 // 2  # two KV heads on eight ranks
    total = held["cut"] + held["copied"] * copies + held["replicated"] * 8 + held["rank0"]
    assert sum(facts["bytes_per_rank"]) == total and sum(held.values()) == facts["num_bytes"]
    assert facts["missing"] == facts["unused"] == []


def test_inspect_names_what_does_not_fit(checkpoint: Path, capsys: pytest.CaptureFixture):
    """It is what the error about missing tensors tells people to run."""
    (path,) = checkpoint.glob("model-00003*")
    tensors = load_file(path)
    tensors["something.else"] = tensors.pop("language_model.model.norm.weight")
    save_file(tensors, path)
    with pytest.raises(UserError, match=f"weights_tools inspect {checkpoint}"):
        load(checkpoint, TP())
    for more in ([], ["--ranks", "4"]):
        assert main(["inspect", str(checkpoint), *more]) == 0
        out = capsys.readouterr().out
        assert "missing: 1\n  decoder.norm.weight\n" in out and "unused: 1\n  something.else\n" in out


def test_inspect_a_split_folder(tp2: Path, capsys: pytest.CaptureFixture):
    (tp2 / part_file(1, 2)).unlink()
    assert main(["inspect", str(tp2)]) == 0
    out = capsys.readouterr().out
    assert "split for world_size=2" in out and str(source()) in out and f"{part_file(1, 2)}  MISSING" in out


def test_inspect_quantised_folders(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = Case("llava_next_mistral_w8a16").checkpoint
    assert main(["split", str(folder), "--ranks", "2", "--dst", str(tmp_path / "tp2")]) == 0
    for path in (folder, tmp_path / "tp2"):
        capsys.readouterr()
        assert main(["inspect", str(path)]) == 0
        assert "quantised: w8a16, a scale a row, stored as ascend has it" in capsys.readouterr().out
        assert main(["inspect", str(path), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["quantised"] == {"scheme": "w8a16", "group_size": 0, "format": "ascend"}
        assert facts["num_tensors"] == 132 and facts["dtypes"]["I8"] == 21


@pytest.mark.parametrize("name", ["mllama", "llama_adapter_lora", "minigpt4"])
def test_inspect_every_kind_of_family(name: str, capsys: pytest.CaptureFixture):
    case = Case(name)
    folder = case.checkpoint
    capsys.readouterr()
    assert main(["inspect", str(folder), "--ranks", "2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"] == case.model and facts["quantised"] is None and 2 in facts["legal_world_sizes"]
    assert facts["missing"] == facts["unused"] == facts["misshapen"] == []
