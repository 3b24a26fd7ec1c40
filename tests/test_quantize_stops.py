"""weights_tools quantize: interrupted, killed, told twice, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, config_for
from quant_cases import W4, description
from split_cases import (
    Q_PROJ,
    contents,
    flip_byte,
    kill_in_the_middle,
    one_line,
    source,
    spoil,
    stop_after,
    written_names,
)  # fmt: skip

from mmdist.config import UserError
from mmdist.engine.load import open_model
from mmdist.tp import TP
from weights_tools.cli import main
from weights_tools.journal import JOURNAL
from weights_tools.part_file import PartFile


@pytest.mark.parametrize("num_writes", [0, 50, 130])
@pytest.mark.parametrize("jobs", ["1", "3"])
def test_goes_on_where_it_stopped(
    w8a16: Path, tmp_path: Path, num_writes: int, jobs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["quantize", str(source()), "--scheme", "w8a16", "--dst", str(tmp_path / "dst"), "--jobs", jobs]
    with monkeypatch.context() as patched:
        stop_after(patched, num_writes, KeyboardInterrupt())
        assert main(argv) == 130
    assert not (tmp_path / "dst").exists()
    with pytest.raises(UserError):
        open_model(config_for(tmp_path / "dst.partial"), TP(), "cpu")
    done = len((tmp_path / "dst.partial" / JOURNAL).read_text().splitlines()) - 1
    assert (done > 30) == (num_writes > 0)
    written = written_names(monkeypatch)
    assert main(argv) == 0
    assert len(written) == 90 - done
    assert contents(tmp_path / "dst") == contents(w8a16)


def test_killed_in_the_middle(w8a16: Path, tmp_path: Path) -> None:
    argv = ["quantize", str(source()), "--scheme", "w8a16", "--dst", str(tmp_path / "dst")]
    kill_in_the_middle(argv, tmp_path / "dst")
    assert main(argv) == 0 and contents(tmp_path / "dst") == contents(w8a16)


@pytest.mark.parametrize("verb", ["quantize --scheme w8a16", "split --ranks 2", "export"])
def test_source_changed_while_it_is_read(
    checkpoint: Path,
    tp2: Path,
    tmp_path: Path,
    verb: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    name, *flags = verb.split()
    folder = tp2 if name == "export" else checkpoint
    argv = [name, str(folder), *flags, "--dst", str(tmp_path / "dst")]
    write, path = PartFile.write, sorted(folder.glob("*.safetensors"))[0]

    def touching(self: PartFile, stored: str, tensor: torch.Tensor) -> None:
        os.utime(path, ns=(1, 1))
        write(self, stored, tensor)

    with monkeypatch.context() as patched:
        patched.setattr(PartFile, "write", touching)
        assert main(argv) == 2
    assert f"{path}: changed while it was read; run again" in one_line(capsys)
    assert not (tmp_path / "dst").exists()
    assert main(argv) == 0


def test_what_verify_finds(w8a16: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = Path(shutil.copytree(w8a16, tmp_path / "damaged"))
    (file,) = folder.glob("*.safetensors")
    flip_byte(file, Q_PROJ)
    assert main(["verify", str(folder)]) == 1
    assert f"{file}: {Q_PROJ} is damaged: its sha256 is not the one in quantization.json" in capsys.readouterr().out


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 500 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("only root may mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


VERBS = ("quantize SRC --scheme w8a16", "split SRC --ranks 2", "export TP2", "convert vlmo --src VLMO")


@pytest.mark.parametrize("verb", VERBS)
def test_disk_full_in_the_middle(
    small_disk: Path, splits: dict, verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Another fills the disk after its room was checked; with room again, the same command goes on."""
    places = {"SRC": source(), "TP2": splits["mistral", 2], "VLMO": GOLDEN / "vlmo_vqa" / "checkpoint"}
    argv = [*(str(places.get(word, word)) for word in verb.split()), "--dst", str(small_disk / "dst")]
    capsys.readouterr()
    assert main(argv) == 2
    assert "needed, 500.0 KiB free; make room" in one_line(capsys)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 0, 1 << 30))
        assert main(argv) == 2
    assert "No space left on device" in one_line(capsys)
    assert [path.name for path in small_disk.iterdir()] == ["dst.partial"]
    done = len((small_disk / "dst.partial" / JOURNAL).read_text().splitlines())
    assert done > 1
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    assert main(argv) == 0
    assert main(["verify", str(small_disk / "dst")]) == 0


MISTAKES = {
    "SRC --scheme w4a16": "--group-size 128 does not divide the 160 columns of language_model",
    "SRC --scheme w4a16 --group-size 48": "does not divide the 160 columns",
    "SRC --scheme w8a16 --dst SRC --force": "source and target are the same folder",
    "SRC --scheme w8a16 --dst MADE": "is there already; choose another --dst, or --force",
    "SRC --scheme w8a16 --dst OTHER --force": "not a folder made by quantize",
    "MADE --scheme w4a16": "quantised already, as w8a16",
    "SRC --scheme w2a16": "invalid choice",
    "SRC": "required: --scheme",
    "SPLIT --scheme w8a16": "split already, for 2 ranks",
    "MIXED --scheme w8a16": "plain weights (model-00001-of-00003.safetensors) beside quantised",
    "NAN --scheme w8a16": f"{Q_PROJ} has NaN or infinite values",
    "INTEGERS --scheme w8a16": f"{Q_PROJ} is torch.int8, without scales and description",
}


@pytest.fixture
def places(w8a16: Path, splits: dict, tmp_path: Path) -> dict[str, Path]:
    found = {"SRC": Path(shutil.copytree(source(), tmp_path / "src")), "SPLIT": splits["mistral", 2]}
    for name in ("MADE", "OTHER", "MIXED", "NAN", "INTEGERS"):
        found[name] = Path(shutil.copytree(w8a16 if name == "MADE" else source(), tmp_path / name.lower()))
    (file,) = w8a16.glob("*.safetensors")
    shutil.copy(file, found["MIXED"])
    for name, edit in (("NAN", lambda x: x.fill_(math.nan)), ("INTEGERS", lambda x: x.to(torch.int8))):
        files = json.loads((found[name] / "model.safetensors.index.json").read_text())["weight_map"]
        spoil(found[name] / files[Q_PROJ], Q_PROJ, edit)
    return found


@pytest.mark.parametrize("command", MISTAKES)
def test_mistakes_are_one_line(
    command: str, places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    try:
        code = main(["quantize", *(str(places.get(word, word)) for word in command.split())])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    assert code == 2 and MISTAKES[command] in one_line(capsys)
    assert {path.name for path in tmp_path.iterdir() if not path.name.endswith(".partial")} == before


def test_dry_run_and_force(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ["quantize", str(source()), "--scheme", "w8a16", "--dst", str(tmp_path / "dst")]
    assert main([*argv, "--dry-run"]) == 0
    assert "21 of 90 tensors quantised as w8a16" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert main(argv) == 0
    assert main([*argv[:2], *W4, *argv[4:], "--force"]) == 0
    assert description(tmp_path / "dst")["model_quant_type"] == "W4A16"
    assert [path.name for path in tmp_path.iterdir()] == ["dst"]
