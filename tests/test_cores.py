"""Which cores a rank keeps to, on machines that are described in files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmdist.cores import find_share, numa_nodes, parse_cores

REPOSITORY = Path(__file__).parents[1]


def machine(folder: Path, nodes: list[str], *, threads_apart: int = 0) -> Path:
    """A /sys/devices/system; with threads_apart, cpu n and n + threads_apart are one core's two threads."""
    for node, cores in enumerate(nodes):
        (folder / f"node/node{node}").mkdir(parents=True)
        (folder / f"node/node{node}/cpulist").write_text(cores + "\n")
        for core in parse_cores(cores) if threads_apart else ():
            first = core % threads_apart
            (folder / f"cpu/cpu{core}/topology").mkdir(parents=True)
            (folder / f"cpu/cpu{core}/topology/thread_siblings_list").write_text(f"{first},{first + threads_apart}\n")
    return folder


def shares(system: Path, cores: int, size: int) -> list[set[int]]:
    return [find_share(set(range(cores)), rank, size, system) for rank in range(size)]


def test_lists_of_cores() -> None:
    assert parse_cores("0-2,8,10-11\n") == [0, 1, 2, 8, 10, 11] and parse_cores("\n") == []


def test_a_node_is_not_split_where_ranks_divide_it(tmp_path: Path) -> None:
    system = machine(tmp_path, ["0-6", "7-13"])
    assert shares(system, 14, 2) == [set(range(7)), set(range(7, 14))]
    for size in (4, 6):
        nodes = [{core // 7 for core in share} for share in shares(system, 14, size)]
        assert nodes == [{0}] * (size // 2) + [{1}] * (size // 2)
    assert [len(share) for share in shares(system, 14, 14)] == [1] * 14
    assert shares(system, 14, 1) == [set(range(14))]


def test_nodes_may_alternate_and_come_in_tens(tmp_path: Path) -> None:
    nodes = [",".join(str(core) for core in range(node, 24, 12)) for node in range(12)]
    system = machine(tmp_path, nodes)
    assert list(numa_nodes(system)) == list(range(12))
    assert shares(system, 24, 12) == [{node, node + 12} for node in range(12)]


def test_threads_of_a_core_stay_together(tmp_path: Path) -> None:
    system = machine(tmp_path, ["0-7"], threads_apart=4)
    assert shares(system, 8, 4) == [{core, core + 4} for core in range(4)]


def test_cores_that_are_not_ours_are_not_taken(tmp_path: Path) -> None:
    system = machine(tmp_path, ["0-7", "8-15"])
    assert [find_share({1, 5, 9, 13}, rank, 2, system) for rank in (0, 1)] == [{1, 5}, {9, 13}]
    assert find_share({3, 4}, 1, 2, tmp_path / "nothing") == {4}


PIN = """
import os, subprocess, sys
from mmdist.cores import pin
pin(int(sys.argv[1]), int(sys.argv[2]))
print(sorted(os.sched_getaffinity(0)))
"""


def pinned(rank: int, size: int, *, cores: set[int] | None = None, **env: str) -> list[int]:
    """Cores of a process that has pinned itself; `cores`: dealt out by its launcher."""
    deal = (lambda: os.sched_setaffinity(0, cores)) if cores else None
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **env}
    command = [sys.executable, "-c", PIN, str(rank), str(size)]
    return parse_cores(
        subprocess.check_output(command, text=True, env=env, preexec_fn=deal).strip("[]\n").replace(" ", "")
    )


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_ranks_pin_themselves_unless_someone_has() -> None:
    ours = sorted(os.sched_getaffinity(0))
    both = [pinned(rank, 2) for rank in (0, 1)]
    assert sorted(both[0] + both[1]) == ours and both[0] and both[1]
    assert pinned(0, 1) == ours
    assert pinned(0, len(ours) + 1) == ours
    assert pinned(0, 2, OMP_PROC_BIND="close") == ours
    assert pinned(0, 1, cores={ours[1]}) == [ours[1]]
    if len(ours) > 2:
        assert pinned(0, 2, cores=set(ours[:2])) == ours[:2]
