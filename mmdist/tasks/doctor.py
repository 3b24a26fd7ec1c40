"""task=doctor: what this machine has, what a job would use of it, and what is in its way, each with its cure.

Exit code 1 where something keeps jobs from running; what only costs speed or memory is a note.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from mmdist.backend import GIB, count_devices, find_device, threads_per_rank
from mmdist.collectives.shm import NoShm, probe_shm
from mmdist.config import EXIT_FAILED, HardwareConfig, UserError
from mmdist.cores import count_cores, numa_nodes
from mmdist.native.build import BuildError, cache_folder, find_toolchain, open_level
from mmdist.task_config import DoctorConfig

ON_RANKS = False
CGROUP = Path("/sys/fs/cgroup")
FREE_DISK = GIB // 4  # a few libraries, with room


@dataclass
class Finding:
    name: str
    value: str
    state: str = "ok"  # or note, or broken
    cure: str = ""


def check(config: DoctorConfig) -> None:
    pass


def run(config: DoctorConfig) -> int:
    findings = list(examine(config))
    ok = all(finding.state != "broken" for finding in findings)
    if config.format == "json":
        print(json.dumps({"ok": ok, "findings": [asdict(finding) for finding in findings]}))
    else:
        print("\n".join(line(finding) for finding in findings))
    return 0 if ok else EXIT_FAILED


def line(finding: Finding) -> str:
    mark = "" if finding.state == "ok" else f"{finding.state.upper()}: "
    cure = f"\n{'':13}-> {finding.cure}" if finding.cure else ""
    return f"{finding.name:12} {mark}{finding.value}{cure}"


def examine(config: DoctorConfig) -> Iterator[Finding]:
    hardware = config.hardware
    yield Finding("python", f"{platform.python_version()} ({sys.executable})")
    yield packages(required_packages())
    try:
        device = find_device(hardware)
    except UserError as error:
        yield Finding("device", *broken(str(error)))
        device = "cpu"
    else:
        yield Finding("device", describe_device(device))
    yield cores(CGROUP)
    yield memory(hardware, CGROUP)
    size = config.world_size if isinstance(config.world_size, int) else max(1, count_devices(device))
    yield ranks(hardware, device, size)
    yield from (kernels(hardware), cache()) if device == "cpu" else ()
    yield collectives(hardware, device)


def broken(error: str) -> tuple[str, str, str]:
    """An error that tells its cure after a semicolon, as (value, state, cure)."""
    what, _, cure = error.partition("; ")
    return what, "broken", cure


def required_packages() -> list[str]:
    try:
        return [name for name in requires("mmdist") or [] if "extra ==" not in name]
    except PackageNotFoundError:  # a checkout that was not installed says nothing of what it needs
        return ["torch", "transformers"]


def packages(required: list[str]) -> Finding:
    shown, wrong = [], []
    for requirement in map(Requirement, required):
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = "missing"
        if found == "missing" or not requirement.specifier.contains(found, prereleases=True):
            wrong.append(str(requirement))
        if requirement.name in ("torch", "transformers") or str(requirement) in wrong:
            shown.append(f"{requirement.name} {found}")
    cure = f"pip install {' '.join(repr(name) for name in wrong)}" if wrong else ""
    return Finding("packages", ", ".join(shown), "broken" if wrong else "ok", cure)


def describe_device(device: str) -> str:
    if device == "cpu":
        return f"cpu ({platform.machine()})"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{device}: {', '.join(names)}"


def cores(cgroup: Path) -> Finding:
    """Those of this process's affinity; a quota of time, which threads do not see, slows whoever uses them all."""
    count, nodes = count_cores(), numa_nodes()
    value = f"{count} of {os.cpu_count()} may be used; memory nodes: {len(nodes) or 'unknown'}"
    quota = read_words(cgroup / "cpu.max")
    if quota and quota[0] != "max" and int(quota[0]) < count * int(quota[1]):
        allowed = int(quota[0]) / int(quota[1])
        cure = f"hardware.threads_per_rank={max(1, int(allowed))} divided by the ranks"
        return Finding("cores", f"{value}, but the container has a quota of {allowed:g}", "note", cure)
    return Finding("cores", value)


def memory(hardware: HardwareConfig, cgroup: Path) -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = next(row for row in Path("/proc/meminfo").read_text().splitlines() if row.startswith("MemAvailable"))
    value = f"{total / GIB:.1f} GiB, {int(available.split()[1]) * 1024 / GIB:.1f} available"
    limit = read_words(cgroup / "memory.max")
    if limit and limit[0] != "max" and int(limit[0]) < total and hardware.memory_gib is None:
        allowed = int(limit[0]) / GIB
        cure = f"hardware.memory_gib={allowed:.1f}, so that plans count with it"
        return Finding("memory", f"{value}, but the container may have {allowed:.1f}", "note", cure)
    return Finding("memory", value)


def read_words(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def ranks(hardware: HardwareConfig, device: str, size: int) -> Finding:
    threads = threads_per_rank(hardware, size)
    if device == "cpu" and size > count_cores():
        cure = f"world_size={count_cores()} or fewer, where the memory allows it"
        return Finding("ranks", f"{size} on {count_cores()} cores: they take turns", "note", cure)
    pinned = ", each on its own cores" if device == "cpu" and size > 1 and hardware.pin == "auto" else ""
    return Finding("ranks", f"{size} x {threads} threads{pinned}")


def kernels(hardware: HardwareConfig) -> Finding:
    """Compiles them, if no one has yet."""
    if hardware.kernels == "plain":
        return Finding("kernels", "plain torch, as asked")
    try:
        native = open_level(hardware.kernels)
    except (BuildError, UserError) as error:
        value, state, cure = broken(str(error))
        return Finding("kernels", f"plain torch: {value}", "note" if hardware.kernels == "auto" else state, cure)
    return Finding("kernels", f"{native.level}, {native.path} ({find_toolchain(hardware.kernels).version})")


def cache() -> Finding:
    try:
        folder = cache_folder()
    except (BuildError, OSError) as error:
        return Finding("cache", *broken(str(error)))
    free = shutil.disk_usage(folder).free
    value = f"{folder}, {free / GIB:.1f} GiB free"
    return Finding("cache", value) if free >= FREE_DISK else Finding("cache", value, "broken", f"make room on {folder}")


def collectives(hardware: HardwareConfig, device: str) -> Finding:
    if device != "cpu":
        return Finding("collectives", "nccl")
    if hardware.collectives == "gloo":
        return Finding("collectives", "gloo, as asked")
    try:
        probe_shm(open_level("auto" if hardware.kernels == "plain" else hardware.kernels))
    except (BuildError, UserError, NoShm, OSError) as error:
        value, state, cure = broken(str(error))
        slow = f"gloo, a millisecond each instead of microseconds: {value}"
        return Finding("collectives", slow, "note" if hardware.collectives == "auto" else state, cure)
    return Finding("collectives", "shm (gloo between machines)")
