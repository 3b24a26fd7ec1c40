"""CPU cores: how many this process may use, and which of them a rank keeps to when several ranks share a machine."""

from __future__ import annotations

import os
from pathlib import Path

SYSTEM = Path("/sys/devices/system")
# Who sets one of these has said where threads go.
USERS_OWN = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


def count_cores() -> int:
    return len(os.sched_getaffinity(0))


def parse_cores(text: str) -> list[int]:
    """Linux's lists: "0-2,8" -> [0, 1, 2, 8]."""
    ends = [part.split("-") for part in text.strip().split(",") if part]
    return [core for end in ends for core in range(int(end[0]), int(end[-1]) + 1)]


def numa_nodes(system: Path = SYSTEM) -> dict[int, list[int]]:
    """Cores of each memory node; empty where Linux does not say."""
    folders = sorted(system.glob("node/node[0-9]*/cpulist"), key=lambda file: int(file.parent.name[4:]))
    return {int(file.parent.name[4:]): parse_cores(file.read_text()) for file in folders}


def find_share(allowed: set[int], local_rank: int, local_size: int, system: Path = SYSTEM) -> set[int]:
    """This rank's part of `allowed`: neighbours, so that a node or the threads of a core are split only where the ranks
    do not divide them."""
    node_of = {core: node for node, cores in numa_nodes(system).items() for core in cores}

    def place(core: int) -> tuple[int, int, int]:
        siblings = system / f"cpu/cpu{core}/topology/thread_siblings_list"
        first = min(parse_cores(siblings.read_text())) if siblings.exists() else core
        return node_of.get(core, 0), first, core

    ordered = sorted(allowed, key=place)
    first, last = (len(ordered) * rank // local_size for rank in (local_rank, local_rank + 1))
    return set(ordered[first:last])


def pin(local_rank: int, local_size: int) -> None:
    """Keep this rank's threads to its share of the cores, where they are enough and no one else has dealt them out.

    Threads started later inherit it, and memory they touch first comes from their node.
    """
    allowed = os.sched_getaffinity(0)
    dealt_out = allowed != os.sched_getaffinity(os.getppid()) or any(name in os.environ for name in USERS_OWN)
    if 1 < local_size <= len(allowed) and not dealt_out:
        os.sched_setaffinity(0, find_share(allowed, local_rank, local_size))
