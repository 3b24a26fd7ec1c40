"""What stands between a job and its chips, said in one line with the cure; on a machine that has none."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.elastic.multiprocessing import ProcessFailure

from mmdist import ascend, backend, cli
from mmdist.agent import report, run_agent
from mmdist.ascend import CHIPS, check_cards, explain_import
from mmdist.config import HardwareConfig, LauncherConfig, UserError
from mmdist.hccl import OBSOLETE, PORT_COUNT, check_ports, hccl_environment, obsolete_variables

DUO = CHIPS["310p"]


@pytest.fixture(autouse=True)
def forget() -> None:
    for function in (ascend.npu_problem, ascend.load_torch_npu, backend.warn_once):
        function.cache_clear()


def install(folder: Path, monkeypatch: Any, version: str) -> None:
    """A torch_npu of that version as pip leaves it, which fails as the real one does without CANN."""
    (folder / "torch_npu").mkdir()
    (folder / "torch_npu" / "__init__.py").write_text("raise ImportError('libhccl.so: cannot open shared object')\n")
    info = folder / f"torch_npu-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch-npu\nVersion: {version}\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    monkeypatch.syspath_prepend(str(folder))


def error_of(monkeypatch: Any, capsys: Any, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["launch.py", *arguments])
    assert cli.main() == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("INFO ")]
    assert len(lines) == 1
    return lines[0]


def test_bfloat16_on_a_300i_duo(monkeypatch: Any, capsys: Any) -> None:
    """Said before anything is asked of the machine, and by task=plan."""
    for task in ("chat", "plan"):
        line = error_of(monkeypatch, capsys, f"task={task}", "model=llava", "hardware=300i_duo", "dtype=bfloat16")
        assert "a 300I DUO (310P) computes in float16; use dtype=float16 or auto" in line


@pytest.mark.parametrize(
    ("setting", "words"),
    (("engine.block_size=16", "blocks of 128, 64"), ("engine.kv_cache_dtype=int8", "use auto")),
)
def test_caches_no_operation_reads(setting: str, words: str, monkeypatch: Any, capsys: Any) -> None:
    assert words in error_of(monkeypatch, capsys, "task=plan", "model=llava", "hardware=300i_duo", setting)


def test_a_plan_needs_no_chip(monkeypatch: Any, capsys: Any) -> None:
    for hardware, chip in (("300i_duo", "310p"), ("800i_a2", "910b")):
        monkeypatch.setattr(sys, "argv", ["launch.py", "task=plan", "model=llava", f"hardware={hardware}"])
        assert cli.main() == 0
        said = capsys.readouterr().out
        assert f"kernels: npu {chip}" in said and "decode" in said and "world_size=2" in said


def test_no_torch_npu(monkeypatch: Any, capsys: Any) -> None:
    line = error_of(monkeypatch, capsys, "model=llava", "hardware=300i_duo")
    assert "torch_npu is not installed; pip install torch-npu==2.13.0.*" in line


def test_cann_is_not_sourced(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    install(tmp_path, monkeypatch, "2.13.0")
    line = error_of(monkeypatch, capsys, "model=llava", "hardware=300i_duo")
    assert "CANN is not on the library path (libhccl.so" in line and "set_env.sh" in line


def test_torch_npu_of_another_torch(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    install(tmp_path, monkeypatch, "2.9.0.post1")
    line = error_of(monkeypatch, capsys, "model=llava", "hardware=300i_duo")
    assert "torch_npu 2.9.0 is not for torch 2.13.0; pip install torch-npu==2.13.0.*" in line


def test_hardware_auto_says_why_it_takes_the_cpu(monkeypatch: Any, tmp_path: Path, caplog: Any) -> None:
    install(tmp_path, monkeypatch, "2.9.0")
    for _ in range(2):
        assert backend.find_device(HardwareConfig()) == ("cuda" if torch.cuda.is_available() else "cpu")
    said = [record.getMessage() for record in caplog.records]
    assert torch.cuda.is_available() or [line.count("is not for torch") for line in said] == [1]


def test_torch_loads_beside_a_torch_npu_that_cannot(tmp_path: Path, monkeypatch: Any) -> None:
    """Plain torch does not: this is what mmdist/__init__.py is for."""
    install(tmp_path, monkeypatch, "2.13.0")
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    for first, code in (("import torch", 1), ("import mmdist.config, torch", 0)):
        done = subprocess.run(
            [sys.executable, "-c", first], env={**environment, "PYTHONPATH": paths}, capture_output=True
        )
        assert done.returncode == code, done.stderr.decode()


def test_what_an_import_says() -> None:
    libgomp = explain_import("/opt/env/lib/libgomp.so.1: cannot allocate memory in static TLS block")
    assert libgomp.endswith("; export LD_PRELOAD=/opt/env/lib/libgomp.so.1:$LD_PRELOAD")
    assert "CPU build" in explain_import(
        "Two accelerators cannot be used at the same time in PyTorch: npu and cuda.\nmore"
    )
    assert "do not fit" in explain_import("libop_plugin_atb.so: undefined symbol: _ZN3atb9OperationE")


def test_more_ranks_than_chips(monkeypatch: Any) -> None:
    monkeypatch.setattr(backend, "count_devices", lambda device: 2)
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "4,5")
    words = "world_size=4: 2 npu devices are visible .ASCEND_RT_VISIBLE_DEVICES=4,5.; lower world_size to 2"
    with pytest.raises(UserError, match=words):
        backend.check_visible(HardwareConfig(device="npu", chip="310p"), "npu", 4)
    with pytest.raises(UserError, match="for NPUs"):
        backend.check_visible(HardwareConfig(pin="card"), "cpu", 2)


@pytest.mark.parametrize(
    ("visible", "size", "words"),
    (("0,1", 2, None), ("2,3,6,7", 4, None), ("0,1,2,3", 2, None), ("5,4", 2, None), ("0", 1, "1 chips are visible"),
     ("0,1,2", 2, "3 chips are visible"), ("1,2", 2, "whole cards"), ("0,1,2,3", 3, "whole cards"),
     ("0;1", 2, "with commas")),
)  # fmt: skip
def test_whole_cards(visible: str, size: int, words: str | None, monkeypatch: Any) -> None:
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", visible)
    if words is None:
        check_cards(DUO, size, visible.count(",") + 1)
        return
    with pytest.raises(UserError, match=words):
        check_cards(DUO, size, visible.count(",") + 1)


def test_two_jobs_have_ports_of_their_own() -> None:
    with hccl_environment(1800) as one, hccl_environment(60) as two:
        first, second = (int(job["HCCL_IF_BASE_PORT"]) for job in (one, two))
        assert abs(first - second) >= PORT_COUNT
    assert one["HCCL_EXEC_TIMEOUT"] == str(26 * 68) and two["HCCL_EXEC_TIMEOUT"] == "68"
    assert int(one["HCCL_EVENT_TIMEOUT"]) > int(one["HCCL_EXEC_TIMEOUT"]) < 1800
    assert (one["HCCL_CONNECT_TIMEOUT"], two["HCCL_CONNECT_TIMEOUT"]) == ("1800", "120")


def test_ports_that_are_taken(monkeypatch: Any) -> None:
    """By another job, by a program, or no number."""
    with hccl_environment(60) as job:
        monkeypatch.setenv("HCCL_IF_BASE_PORT", job["HCCL_IF_BASE_PORT"])
        with pytest.raises(UserError, match=r"of another job of yours.; unset it"), hccl_environment(60):
            pass
    with hccl_environment(60) as again:
        assert again["HCCL_IF_BASE_PORT"] == job["HCCL_IF_BASE_PORT"]
    with socket.socket() as program:
        program.bind(("", int(job["HCCL_IF_BASE_PORT"]) + 3))
        with pytest.raises(UserError, match=f"in use .{program.getsockname()[1]}."), hccl_environment(60):
            pass
    monkeypatch.setenv("HCCL_IF_BASE_PORT", "auto")
    with pytest.raises(UserError, match="expected a port number"), hccl_environment(60):
        pass


def test_a_word_about_obsolete_variables(monkeypatch: Any) -> None:
    for name in (*OBSOLETE, "TASK_QUEUE_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    assert obsolete_variables() == []
    monkeypatch.setenv("ATB_CONVERT_NCHW_TO_ND", "1")
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "1")
    assert obsolete_variables() == ["ATB_CONVERT_NCHW_TO_ND is passed on, but is obsolete: nothing in MindIE reads it"]


def failed(folder: Path, rank: int, text: str, at: int) -> ProcessFailure:
    """A rank that left its error where the agent looks."""
    found = ProcessFailure(local_rank=rank, pid=10 + rank, exitcode=1, error_file=str(folder / "none"))
    found.message, found.timestamp = {"message": text, "extraInfo": {"py_callstack": ""}}, at
    return found


def test_the_first_cause_and_not_a_socket_that_timed_out(capsys: Any, tmp_path: Path) -> None:
    """Rank 0 only noticed that rank 1 was gone, and said so first."""
    lost = failed(tmp_path, 0, "RuntimeError: EI0006: Getting socket times out. HCCL function error: HcclAllReduce", 1)
    cause = failed(tmp_path, 1, "RuntimeError: NPU out of memory. Tried to allocate 2.00 GiB", 2)
    assert report({0: lost, 1: cause}) == 1
    assert "rank 1 failed: RuntimeError: NPU out of memory" in capsys.readouterr().err


RANKS = """
import os, signal, sys, time
from pathlib import Path

if os.environ["RANK"] == "1":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(sys.argv[1]).touch()
    time.sleep(60)
while not Path(sys.argv[1]).exists():
    time.sleep(0.05)
sys.exit(7)
"""


def test_a_rank_that_the_agent_had_to_kill_is_no_cause(capfd: Any, tmp_path: Path) -> None:
    """Rank 1 does not hear SIGTERM, as one that hangs in a driver; rank 0 chose its exit code."""
    assert run_agent([sys.executable, "-c", RANKS, str(tmp_path / "ready")], 2, LauncherConfig(), 1) == 7
    assert "killed" not in capfd.readouterr().err


def test_a_rank_that_someone_killed_is_the_cause(capsys: Any, tmp_path: Path) -> None:
    lost = failed(tmp_path, 0, "RuntimeError: EI0002: HcclAllReduce", 1)
    killed = ProcessFailure(local_rank=1, pid=11, exitcode=-9, error_file="none")
    assert report({0: lost, 1: killed}) == 1
    assert "rank 1 was killed by SIGKILL (pid 11)" in capsys.readouterr().err
    assert report({0: lost, 1: killed}, stopped={11}) == 1
    assert "rank 0 failed: RuntimeError: EI0002" in capsys.readouterr().err


def test_the_ports_of_torchrun_are_its_users(monkeypatch: Any) -> None:
    """Looked at by one rank of the machine; under our agent they are locked for the job already."""
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MMDIST_AGENT", raising=False)
    with socket.socket() as program:
        program.bind(("", 0))
        monkeypatch.setenv("HCCL_IF_BASE_PORT", str(program.getsockname()[1] - 3))
        with pytest.raises(UserError, match=r"some are in use .*; export HCCL_IF_BASE_PORT=PORT, 16 free ones"):
            check_ports()
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # on several machines another rank may be further
        check_ports()
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        monkeypatch.setenv("MMDIST_AGENT", "1")
        check_ports()
