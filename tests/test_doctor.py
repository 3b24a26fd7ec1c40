"""task=doctor: what it finds on this machine, and on ones where something is in the way."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_ranks

import launch
from mmdist.config import HardwareConfig
from mmdist.native import build
from mmdist.tasks import doctor


def examine(monkeypatch: Any, capsys: Any, *arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    monkeypatch.setattr(sys, "argv", ["launch.py", "task=doctor", "format=json", *arguments])
    code = launch.main()
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] == (code == 0)
    return code, {finding["name"]: finding for finding in said["findings"]}


def test_a_machine_that_is_well(monkeypatch: Any, capsys: Any) -> None:
    code, found = examine(monkeypatch, capsys, "hardware=cpu", "world_size=2")
    assert code == 0 and "broken" not in {finding["state"] for finding in found.values()}
    assert torch.__version__ in found["packages"]["value"]
    level, _, rest = found["kernels"]["value"].partition(", ")
    assert level == build.find_toolchain("auto").level and Path(rest.partition(" (")[0]).is_file()
    assert found["collectives"]["value"].startswith("shm")
    run_ranks(2, lambda tp: tp.all_reduce(torch.ones(1)))  # and so it is


def test_the_table_is_a_line_a_finding(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["launch.py", "task=doctor", "hardware=cpu", "hardware.kernels=plain"])
    assert launch.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert "kernels      plain torch, as asked" in lines and lines[0].startswith("python       3.")


def test_without_a_compiler(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    """A note, with its cure; broken only where native kernels or shared memory were asked for."""
    monkeypatch.setenv("CC", "/nowhere/cc")
    code, found = examine(monkeypatch, capsys, "hardware=cpu")
    assert code == 0
    for name in ("kernels", "collectives"):
        assert found[name]["state"] == "note" and "CC=/nowhere/cc: no such program" in found[name]["value"]
        assert found[name]["cure"] == "unset CC or name a C compiler"
    for asked, name in (("kernels=portable", "kernels"), ("collectives=shm", "collectives")):
        code, found = examine(monkeypatch, capsys, "hardware=cpu", f"hardware.{asked}")
        assert code == 1 and found[name]["state"] == "broken" and found[name]["cure"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_device_that_is_not_there(monkeypatch: Any, capsys: Any) -> None:
    code, found = examine(monkeypatch, capsys, "hardware=cuda")
    assert code == 1 and found["device"]["state"] == "broken" and "use hardware=cpu" in found["device"]["cure"]


def test_packages_that_do_not_fit() -> None:
    assert doctor.packages(doctor.required_packages()).state == "ok"
    found = doctor.packages(["torch==1.0", "transformers", "no-such-package>=1"])
    assert found.state == "broken" and "no-such-package missing" in found.value
    assert found.cure == "pip install 'torch==1.0' 'no-such-package>=1'"


def test_what_a_container_may_have(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text(str(2**29) + "\n")
    cores, memory = doctor.cores(tmp_path), doctor.memory(HardwareConfig(), tmp_path)
    assert (cores.state, memory.state) == ("note", "note")
    assert "a quota of 0.5" in cores.value and memory.cure.startswith("hardware.memory_gib=0.5")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor.cores(tmp_path).state == doctor.memory(HardwareConfig(), tmp_path).state == "ok"


def test_more_ranks_than_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert doctor.ranks(HardwareConfig(), "cpu", cores).state == "ok"
    assert doctor.ranks(HardwareConfig(), "cpu", cores + 1).state == "note"
