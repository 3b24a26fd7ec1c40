"""What the tests of weights_tools share: split folders of the golden checkpoints, and ways to spoil one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file, save_file

from mmdist.kernels.kernels import Kernels
from mmdist.loading import load_weights
from mmdist.models.family import build_model, find_model, load_model_config
from mmdist.plan import shard_plan
from mmdist.tp import TP
from mmdist.weights import open_checkpoint
from weights_tools.cli import main
from weights_tools.job import FolderJob
from weights_tools.journal import JOURNAL
from weights_tools.part_file import PartFile

CASES = [
    (case, size)
    for case, sizes in (("mistral", (1, 2, 4, 8)), ("vicuna", (1, 2, 4, 8)), ("34b", (1, 2, 4)))
    for size in sizes
]
Q_PROJ = "language_model.model.layers.1.self_attn.q_proj.weight"


def source(case: str = "mistral") -> Path:
    return GOLDEN / f"llava_next_{case}" / "checkpoint"


def make_split(folder: Path, case: str, size: int) -> Path:
    dst = folder / f"{case}-tp{size}"
    assert main(["split", str(source(case)), "--ranks", str(size), "--dst", str(dst)]) == 0
    return dst


@pytest.fixture(scope="session")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    folder = tmp_path_factory.mktemp("splits")
    return {(case, size): make_split(folder, case, size) for case, size in CASES}


@pytest.fixture
def tp2(splits: dict, tmp_path: Path) -> Path:
    """A split folder to spoil."""
    return shutil.copytree(splits["mistral", 2], tmp_path / "tp2")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return Path(shutil.copytree(source(), tmp_path / "source"))


def load(folder: Path, tp: TP) -> dict[str, torch.Tensor]:
    """This rank's parameters, loaded as the engine does."""
    family = find_model("llava_next")
    model = build_model(family, load_model_config(family, folder), tp, torch.float16)
    plan = shard_plan(model, tp)
    checkpoint = open_checkpoint(folder, family.renames, family.ignored, tp)
    checkpoint.check(plan, "llava_next")
    load_weights(model, checkpoint, plan, tp, Kernels(torch.device("cpu")))
    return {name: param for name, param in model.named_parameters() if not param.is_meta}


def spoil(path: Path, name: str, edit) -> None:
    """Change one tensor of a safetensors file (the file's metadata stays)."""
    tensors = load_file(path)
    tensors[name] = edit(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def flip_byte(path: Path, name: str) -> None:
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    raw[start + json.loads(raw[8:start])[name]["data_offsets"][0]] ^= 1
    path.write_bytes(raw)


def stop_after(monkeypatch: pytest.MonkeyPatch, num_writes: int, error: BaseException) -> None:
    write, count = PartFile.write, iter(range(num_writes))

    def stopping(self: PartFile, name: str, tensor: torch.Tensor) -> None:
        if next(count, None) is None:
            raise error
        write(self, name, tensor)

    monkeypatch.setattr(PartFile, "write", stopping)


def written_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the jobs that follow write, as they write it."""
    names: list[str] = []
    write = FolderJob._write_tensor

    def noting(self: FolderJob, name: str, files: Any) -> dict[str, Any]:
        names.append(name)
        return write(self, name, files)

    monkeypatch.setattr(FolderJob, "_write_tensor", noting)
    return names


KILLED = """
import os, signal, sys
from weights_tools import job
from weights_tools.cli import main
from weights_tools.journal import Journal
job.COMMIT_BYTES = 1
commit, before = Journal.commit, []
def killed(self, lines):
    before.append(lines)
    if len(before) > 20:
        os.kill(os.getpid(), signal.SIGKILL)
    commit(self, lines)
Journal.commit = killed
main(sys.argv[1:])
"""


def kill_in_the_middle(argv: list[str], dst: Path) -> None:
    """Run a verb and kill -9 it when some 20 tensors are on the disk."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, *argv], env=env)
    assert done.returncode == -signal.SIGKILL and not dst.exists()
    assert len((dst.with_name(f"{dst.name}.partial") / JOURNAL).read_text().splitlines()) > 15


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def one_line(capsys: pytest.CaptureFixture) -> str:
    """What went to stderr: one line, no traceback."""
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err, err
    return err
