"""weights_tools verify: values, sources and cuts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from split_cases import Q_PROJ, source, spoil

from mmdist.manifest import load_manifest, part_file, save_manifest
from weights_tools.cli import main


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_found_in_source_and_split(
    checkpoint: Path, tmp_path: Path, value: float, capsys: pytest.CaptureFixture
):
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    path = checkpoint / index[Q_PROJ]
    spoil(path, Q_PROJ, lambda x: x.index_put((torch.tensor(90), torch.tensor(5)), torch.tensor(value).half()))
    words = f"{Q_PROJ} has {int(value != value)} NaN and {int(value == value)} infinite values"
    assert main(["verify", str(checkpoint)]) == 1
    assert f"{path}: {words}" in capsys.readouterr().out
    dst = tmp_path / "dst"
    assert main(["split", str(checkpoint), "--ranks", "2", "--dst", str(dst)]) == 0
    assert main(["verify", str(dst)]) == 1
    out = capsys.readouterr().out
    assert f"{dst / part_file(1, 2)}: {words}" in out and part_file(0, 2) not in out.partition("KiB)")[2]


def test_verify_against_another_source(tp2: Path, checkpoint: Path, capsys: pytest.CaptureFixture):
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    path = checkpoint / index[Q_PROJ]
    spoil(path, Q_PROJ, lambda x: x + 1)
    extra = load_file(path) | {"extra": torch.zeros(1)}
    save_file(extra, path)
    (checkpoint / "tokenizer.json").write_text("{}")
    assert main(["verify", str(tp2), "--against", str(checkpoint)]) == 1
    out = capsys.readouterr().out
    assert f"{path}: {Q_PROJ} is not the tensor that was split" in out
    assert f"{path}: extra is in no part of {tp2}" in out
    assert f"{tp2 / 'tokenizer.json'}: missing or not the same" in out
    assert "3 problems" in out


def test_verify_against_sees_a_wrong_cut(tp2: Path, capsys: pytest.CaptureFixture):
    """Ranks exchanged, hashes included: whole in itself, but not a cut of the source."""
    files = [load_file(tp2 / part_file(rank, 2)) for rank in range(2)]
    files[0][Q_PROJ], files[1][Q_PROJ] = files[1][Q_PROJ], files[0][Q_PROJ]
    for rank in range(2):
        save_file(files[rank], tp2 / part_file(rank, 2))
    manifest = load_manifest(tp2)
    first, second = next(entry for entry in manifest.tensors if entry.name == Q_PROJ).parts
    first.sha256, second.sha256 = second.sha256, first.sha256
    save_manifest(manifest, tp2)
    assert main(["verify", str(tp2)]) == 0
    assert main(["verify", str(tp2), "--against", str(source())]) == 1
    assert f"{Q_PROJ} cut for rank 1 is not the part in the manifest" in capsys.readouterr().out


def test_verify_a_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture):
    assert main(["verify", str(checkpoint)]) == 0
    index = checkpoint / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    file = weight_map.pop(Q_PROJ)
    index.write_text(json.dumps({"weight_map": {**weight_map, "nothing": file}}))
    assert main(["verify", str(checkpoint)]) == 1
    out = capsys.readouterr().out
    assert f"nothing is listed in {file} but is not there" in out and f"{Q_PROJ} is in {file} but is not listed" in out
    path = checkpoint / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["verify", str(checkpoint)]) == 1
    assert f"{path}: truncated" in capsys.readouterr().out
