"""task=doctor: what it finds on this machine, and on ones where something is in the way."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_ranks

from mmdist import cli
from mmdist.agent import PORTS
from mmdist.config import HardwareConfig, LauncherConfig
from mmdist.doctor import ascend, compute, exchange, machine, packages
from mmdist.native import build
from mmdist.tp import TP

ALONE = ("hardware=cpu", "world_size=1")


def examine(monkeypatch: Any, capsys: Any, *arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    monkeypatch.setattr(sys, "argv", ["launch.py", "task=doctor", "format=json", *arguments])
    code = cli.main()
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] == (code == 0)
    return code, {finding["name"]: finding for finding in said["findings"]}


def test_a_machine_that_is_well(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # the ranks find mmdist without being in its folder
    code, found = examine(monkeypatch, capsys, "hardware=cpu", "world_size=2")
    assert code == 0 and "broken" not in {finding["state"] for finding in found.values()}
    assert torch.__version__ in found["packages"]["value"]
    level, _, rest = found["kernels"]["value"].partition(", ")
    assert level == build.find_toolchain("auto").level and Path(rest.partition(" (")[0]).is_file()
    assert found["collectives"]["value"].startswith("shm")
    assert re.fullmatch(r"2 ranks over shm: 8 KiB in \d+ us, 16 MiB at [\d.]+ GB/s", found["all-reduce"]["value"])
    assert not list(tmp_path.iterdir())


def test_ranks_that_fail_say_why(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "0")
    code, found = examine(monkeypatch, capsys, "hardware=cpu", "world_size=2", "hardware.collectives=gloo")
    assert code == 1 and found["all-reduce"]["state"] == "broken"
    assert "RuntimeError: set_num_threads expects a positive" in found["all-reduce"]["value"]


def test_wrong_sums_are_found() -> None:
    def run(tp: TP) -> str:
        return exchange.check_sums(TP(tp.rank, tp.size, Forgetful(tp.others)), torch.device("cpu"))

    assert run_ranks(2, lambda tp: exchange.check_sums(tp, torch.device("cpu"))) == ["", ""]
    assert run_ranks(2, run) == 2 * ["rank 1 has 999 of 1000 sums wrong"]


class Forgetful:
    """Collectives whose sums do not arrive at rank 1."""

    def __init__(self, real: Any):
        self.real = real

    def all_sum(self, x: torch.Tensor) -> None:
        own = x.clone()
        self.real.all_sum(x)
        if self.real.rank == 1:
            x.copy_(own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def test_ports_that_others_use() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        found = machine.ports(LauncherConfig(master_port=port))
        assert found.state == "broken" and f"{port}, which is asked for, is in use" in found.value
        assert found.cure.startswith("launcher.master_port=")
    assert "which is asked for" not in machine.ports(LauncherConfig(master_port=port)).value
    free = next(port for port in PORTS if machine.is_port_free(port))
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # free, though a job may just have left it
        other.bind(("", free))
        other.listen()
        found = machine.ports(LauncherConfig())
        assert found.state == "note" and str(free) in found.value and "ss -ltnp" in found.cure


def test_variables_that_hide_devices(monkeypatch: Any) -> None:
    assert compute.visible_devices("cpu", 2).state == "ok"
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0,0")
    found = compute.visible_devices("cpu", 2)
    assert found.state == "broken" and found.cure == "export ASCEND_RT_VISIBLE_DEVICES=0,1"
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0,1")
    assert compute.visible_devices("cpu", 2).value == "ASCEND_RT_VISIBLE_DEVICES='0,1'"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_more_ranks_than_devices(monkeypatch: Any) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = compute.visible_devices("cuda", 2)
    assert found.state == "broken" and "0 devices for 2 ranks" in found.value
    assert found.cure.startswith("export CUDA_VISIBLE_DEVICES=0,1")


def test_limits_of_a_process() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, hard))
    try:
        found = machine.limits("cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found.state == "note" and "open files 1000" in found.value and "ulimit -n 65536" in found.cure
    assert "locked memory" not in found.value and "locked memory" in machine.limits("cuda").value


def test_shared_memory_matters_to_cards(tmp_path: Path) -> None:
    nowhere = tmp_path / "shm"
    assert machine.shared_memory("cpu", nowhere).state == "ok"
    found = machine.shared_memory("cuda", nowhere)
    assert found.state == "note" and "--shm-size" in found.cure
    assert "GiB" in machine.shared_memory("cpu").value


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build")
def test_cards_that_torch_is_not_built_for(tmp_path: Path) -> None:
    assert packages.cuda_build(tmp_path) is None
    (tmp_path / "nvidia0").touch()
    found = packages.cuda_build(tmp_path)
    assert found is not None and found.state == "note" and found.cure.startswith("pip install torch==2.")


def test_torch_npu_and_cann(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "davinci0").touch()
    (tmp_path / "davinci_manager").touch()
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", str(tmp_path / "latest"))
    found = ascend.ascend(tmp_path)
    assert found is not None and found.value.startswith("1 devices") and found.value.endswith("CANN missing")
    info = tmp_path / "latest" / "x86_64-linux" / "ascend_toolkit_install.info"
    info.parent.mkdir(parents=True)
    info.write_text("package_name=Ascend-cann-toolkit\nversion=8.5.0\ninnerversion=V100\n")
    assert ascend.find_cann(tmp_path / "latest") == "8.5.0"
    (info.parent / "ascend_compiler_install.info").write_text("version=8.5.1\n")
    assert ascend.find_cann(tmp_path / "latest") == "8.5.0"
    info.unlink()
    assert ascend.find_cann(tmp_path / "latest") == "8.5.1"
    for adapter in ("2.13.0", "2.13.0.post1"):
        assert ascend.find_cure("2.13.0+cpu", adapter, "8.5.0") == ""
    for adapter in (None, "2.12.0", "2.13.01"):
        assert ascend.find_cure("2.13.0+cpu", adapter, "8.5.0") == "pip install 'torch-npu==2.13.0.*'"
    assert "set_env.sh" in ascend.find_cure("2.13.0+cpu", "2.13.0", None)


def test_the_table_is_a_line_a_finding(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["launch.py", "task=doctor", *ALONE, "hardware.kernels=plain"])
    assert cli.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert "kernels      plain torch, as asked" in lines and lines[0].startswith("python       3.")


def test_without_a_compiler(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    """A note, with its cure; broken only where native kernels or shared memory were asked for."""
    monkeypatch.setenv("CC", "/nowhere/cc")
    code, found = examine(monkeypatch, capsys, *ALONE)
    assert code == 0
    for name in ("kernels", "collectives"):
        assert found[name]["state"] == "note" and "CC=/nowhere/cc: no such program" in found[name]["value"]
        assert found[name]["cure"] == "unset CC or name a C compiler"
    for asked, name in (("kernels=portable", "kernels"), ("collectives=shm", "collectives")):
        code, found = examine(monkeypatch, capsys, *ALONE, f"hardware.{asked}")
        assert code == 1 and found[name]["state"] == "broken" and found[name]["cure"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_device_that_is_not_there(monkeypatch: Any, capsys: Any) -> None:
    code, found = examine(monkeypatch, capsys, "hardware=cuda", "world_size=1")
    assert code == 1 and found["device"]["state"] == "broken" and "use hardware=cpu" in found["device"]["cure"]


def test_packages_that_do_not_fit() -> None:
    assert packages.packages(packages.required_packages()).state == "ok"
    found = packages.packages(["torch==1.0", "transformers", "no-such-package>=1"])
    assert found.state == "broken" and "no-such-package missing" in found.value
    assert found.cure == "pip install 'torch==1.0' 'no-such-package>=1'"


def test_what_a_container_may_have(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text(str(2**29) + "\n")
    cores, memory = machine.cores(tmp_path), machine.memory(HardwareConfig(), tmp_path)
    assert (cores.state, memory.state) == ("note", "note")
    assert "a quota of 0.5" in cores.value and memory.cure.startswith("hardware.memory_gib=0.5")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.cores(tmp_path).state == machine.memory(HardwareConfig(), tmp_path).state == "ok"


def test_more_ranks_than_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert compute.ranks(HardwareConfig(), "cpu", cores).state == "ok"
    assert compute.ranks(HardwareConfig(), "cpu", cores + 1).state == "note"
