"""A part of a split folder is hashed once a version of its file, and whatever changes makes it another version."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import config_for
from split_cases import Q_PROJ, flip_byte

from mmdist import checked
from mmdist.config import UserError
from mmdist.engine.load import open_model
from mmdist.kernels.kernels import Kernels
from mmdist.loading import load_weights
from mmdist.manifest import MANIFEST, part_file
from mmdist.rank_file import RankFile
from mmdist.tp import TP
from weights_tools.cli import main


@pytest.fixture(autouse=True)
def small_files_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of this test's own cache: the folder of the records."""
    monkeypatch.setattr(checked, "MIN_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mmdist" / "checked"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files hashed, as it goes on."""
    files: list[Path] = []
    hash_ahead = RankFile.hash_ahead

    def noting(self: RankFile, threads: int) -> None:
        files.append(self.path)
        hash_ahead(self, threads)

    monkeypatch.setattr(RankFile, "hash_ahead", noting)
    return files


def load_rank(folder: Path, rank: int = 1) -> None:
    tp = TP(rank, 2)
    model, plan, checkpoint, _ = open_model(config_for(folder), tp, "cpu", hash_ahead=True)
    load_weights(model, checkpoint, plan, tp, Kernels(torch.device("cpu")))


def test_hashed_once(tp2: Path, hashed: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        load_rank(tp2)
    path = tp2 / part_file(1, 2)
    assert hashed == [path]
    with caplog.at_level("INFO", "mmdist.load"):
        load_rank(tp2)
        assert f"{path}: checked before" in caplog.text
    load_rank(tp2, rank=0)
    assert hashed == [path, tp2 / part_file(0, 2)]


def test_what_is_only_opened_is_not_checked(tp2: Path, hashed: list[Path]) -> None:
    for _ in range(2):
        open_model(config_for(tp2), TP(1, 2), "cpu", hash_ahead=True)
    assert len(hashed) == 2


@pytest.mark.parametrize("restore", (False, True))
def test_a_flipped_byte_is_another_version(tp2: Path, restore: bool, hashed: list[Path]) -> None:
    """Where the time of the last change is set back, too."""
    load_rank(tp2)
    path = tp2 / part_file(1, 2)
    before = path.stat()
    flip_byte(path, Q_PROJ)
    if restore:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    for _ in range(2):  # what failed is not remembered
        with pytest.raises(UserError, match=f"{path}: {Q_PROJ} is damaged"):
            load_rank(tp2)
    assert len(hashed) == 3


def test_another_manifest_is_another_proof(tp2: Path, hashed: list[Path]) -> None:
    load_rank(tp2)
    manifest = json.loads((tp2 / MANIFEST).read_text())
    entry = next(entry for entry in manifest["tensors"] if entry["name"] == Q_PROJ)
    entry["parts"][1]["sha256"] = "0" * 64
    (tp2 / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"{Q_PROJ} is damaged"):
        load_rank(tp2)


def test_a_file_that_changes_while_it_is_read_is_not_remembered(tp2: Path, hashed: list[Path]) -> None:
    tp = TP(1, 2)
    model, plan, checkpoint, _ = open_model(config_for(tp2), tp, "cpu", hash_ahead=True)
    os.utime(tp2 / part_file(1, 2))
    load_weights(model, checkpoint, plan, tp, Kernels(torch.device("cpu")))
    load_rank(tp2)
    assert len(hashed) == 2


def test_verify_hashes_always(tp2: Path, small_files_too: Path, capsys: pytest.CaptureFixture) -> None:
    """Even what the records hold for checked."""
    load_rank(tp2)
    (record,) = small_files_too.iterdir()
    path = tp2 / part_file(1, 2)
    flip_byte(path, Q_PROJ)
    record.write_text(json.dumps(checked.find_version(path, tp2 / MANIFEST)))
    load_rank(tp2)  # as after damage beneath the file system
    assert main(["verify", str(tp2)]) == 1
    assert f"{path}: {Q_PROJ} is damaged" in capsys.readouterr().out


def test_records_that_cannot_be_read_or_written(tp2: Path, small_files_too: Path, hashed: list[Path]) -> None:
    load_rank(tp2)
    (record,) = small_files_too.iterdir()
    record.write_text("{")
    load_rank(tp2)
    record.unlink()
    small_files_too.rmdir()
    small_files_too.write_text("a file in its place")
    for _ in range(2):
        load_rank(tp2)
    assert len(hashed) == 4


def test_small_files_leave_no_record(tp2: Path, small_files_too: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked, "MIN_BYTES", 16 << 20)
    load_rank(tp2)
    assert not small_files_too.exists()
