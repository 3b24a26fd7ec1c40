"""The machine under a job: cores, memory, shared memory, limits of a process, ports."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from mmdist.agent import PORTS
from mmdist.backend import GIB
from mmdist.config import HardwareConfig, LauncherConfig
from mmdist.cores import count_cores, numa_nodes
from mmdist.doctor.finding import Finding
from mmdist.ports import is_port_free

CGROUP = Path("/sys/fs/cgroup")
SHM = Path("/dev/shm")
MIN_SHM = GIB  # NCCL and HCCL put tens of MB a rank there; Docker gives 64 MB in all
MIN_OPEN_FILES = 4096  # shards, sockets to every rank, libraries
MIN_THREADS = 512  # a rank: torch's, the native kernels', gloo's and the tokenizer's
SEED_PORTS = range(20000, 20051)  # what the Ascend scripts use; ours are among them


def cores(cgroup: Path = CGROUP) -> Finding:
    """Those of this process's affinity; a quota of time, which threads do not see, slows whoever uses them all."""
    count, nodes = count_cores(), numa_nodes()
    value = f"{count} of {os.cpu_count()} may be used; memory nodes: {len(nodes) or 'unknown'}"
    quota = read_words(cgroup / "cpu.max")
    if quota and quota[0] != "max" and int(quota[0]) < count * int(quota[1]):
        allowed = int(quota[0]) / int(quota[1])
        cure = f"hardware.threads_per_rank={max(1, int(allowed))} divided by the ranks"
        return Finding("cores", f"{value}, but the container has a quota of {allowed:g}", "note", cure)
    return Finding("cores", value)


def memory(hardware: HardwareConfig, cgroup: Path = CGROUP) -> Finding:
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


def shared_memory(device: str, folder: Path = SHM) -> Finding:
    """/dev/shm, which the accelerators' collectives use; ours on a CPU are in a file of no folder (memfd)."""
    if not folder.is_dir():
        total, value = 0, f"no {folder}"
    else:
        space = os.statvfs(folder)
        total = space.f_frsize * space.f_blocks
        value = f"{folder}: {total / GIB:.2f} GiB, {space.f_frsize * space.f_bavail / GIB:.2f} free"
    if device == "cpu" or total >= MIN_SHM:
        return Finding("shm", value)
    return Finding("shm", value, "note", "mount -o remount,size=8g /dev/shm; in Docker: docker run --shm-size=8g")


def limits(device: str) -> Finding:
    """What a process may have; the soft limits, which `ulimit` raises up to the hard ones."""
    rows = [
        ("open files", resource.RLIMIT_NOFILE, MIN_OPEN_FILES, "ulimit -n 65536"),
        ("processes", resource.RLIMIT_NPROC, MIN_THREADS, "ulimit -u 65536"),
        ("address space", resource.RLIMIT_AS, resource.RLIM_INFINITY, "ulimit -v unlimited"),
    ]
    if device != "cpu":  # memory that cards reach by themselves is locked
        rows.append(("locked memory", resource.RLIMIT_MEMLOCK, resource.RLIM_INFINITY, "ulimit -l unlimited"))
    shown, cures = [], []
    for name, number, least, cure in rows:
        found = resource.getrlimit(number)[0]
        shown.append(f"{name} {'unlimited' if found == resource.RLIM_INFINITY else found}")
        if found != resource.RLIM_INFINITY and (least == resource.RLIM_INFINITY or found < least):
            cures.append(cure)
    return Finding("ulimits", ", ".join(shown), "note" if cures else "ok", "; ".join(cures))


def ports(launcher: LauncherConfig) -> Finding:
    """Those a job would meet on, and the others of the Ascend scripts' range."""
    busy = [port for port in SEED_PORTS if not is_port_free(port)]
    value = f"{SEED_PORTS[0]}-{SEED_PORTS[-1]}: " + (f"in use: {', '.join(map(str, busy))}" if busy else "free")
    who = f"ss -ltnp 'sport >= :{SEED_PORTS[0]} and sport <= :{SEED_PORTS[-1]}' names the programs"
    asked = str(launcher.master_port or os.environ.get("MASTER_PORT", ""))
    if asked.isdigit() and not is_port_free(int(asked)):
        cure = "launcher.master_port=PORT, or unset MASTER_PORT; " + who
        return Finding("ports", f"{value}; {asked}, which is asked for, is in use", "broken", cure)
    if not asked and set(PORTS) <= set(busy):
        return Finding("ports", value, "broken", f"launcher.master_port=PORT with another one; {who}")
    if busy:
        return Finding("ports", f"{value}; a job takes the first free of {PORTS[0]}-{PORTS[-1]}", "note", who)
    return Finding("ports", value)
