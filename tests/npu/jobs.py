"""What the tests on emulated NPUs share; without torch_npu they are skipped (make test-npu has it).

A plugin of tests/conftest.py: a conftest.py of this folder's own would take that one's name.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from npu.toolkit import emulated_environment

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs"
LAUNCH = [sys.executable, str(REPOSITORY / "launch.py")]
HARDWARE = {"Ascend310P3": "300i_duo", "Ascend910B3": "800i_a2"}
Run = Callable[..., subprocess.CompletedProcess]
Start = Callable[..., AbstractContextManager[subprocess.Popen]]


@pytest.fixture(params=list(HARDWARE))
def soc(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def toolkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("torch_npu") is None:
        pytest.skip("torch_npu is not installed here; make test-npu has an environment with it")
    return tmp_path_factory.mktemp("toolkit")


@pytest.fixture
def run_on_npu(toolkit: Path) -> Run:
    """run_on_npu(command, soc, devices=None, **env): a program on emulated chips."""

    def run_on_chips(command: list[str], soc: str, devices: int | None = None, **env: str) -> Any:
        whole = npu_environment(toolkit, soc, devices, **{"HCCL_IF_BASE_PORT": str(free_ports()), **env})
        return subprocess.run(command, capture_output=True, text=True, timeout=240, env=whole)

    return run_on_chips


@pytest.fixture
def start_on_npu(toolkit: Path) -> Start:
    """start_on_npu(command, soc, **env): the same, started and at the end killed; the launcher chooses the ports."""

    @contextmanager
    def start(command: list[str], soc: str, **env: str) -> Iterator[subprocess.Popen]:
        whole, pipe = npu_environment(toolkit, soc, **env), subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=whole) as job:
            try:
                yield job
            finally:
                job.kill()  # which ends its ranks

    return start


def npu_environment(toolkit: Path, soc: str, devices: int | None = None, **env: str) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if key != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    return inherited | emulated_environment(toolkit, soc, devices) | env


def free_ports(count: int = 16) -> int:
    """The first of some neighbouring ports that no one listens on."""
    for first in range(21000 + os.getpid() % 500 * 16, 60000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


def torchrun(size: int, *command: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", *command]


def results(done: subprocess.CompletedProcess) -> list[dict[str, Any]]:
    """What the ranks of a program in programs/ printed, one line of JSON each, in the order of the ranks."""
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stdout + done.stderr
    return sorted(lines, key=lambda line: line["rank"])
