"""Collectives over shared memory: right, the same bits on every rank, in any order and size; over when a rank is."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_ranks, shm_ranks
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from mmdist.agent import report
from mmdist.collectives.shm import LostPeer
from mmdist.tp import TP

SIZES = (2, 3, 4, 8)
COUNTS = (1, 7, 63, 2049, 8193, 65536, 200001)  # around the ways taken by few, many and more than fits the segment
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)
REPOSITORY = Path(__file__).parents[1]


def numbers(size: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """(size, count): each rank's own."""
    x = torch.randn(size, count, generator=torch.Generator().manual_seed(count)) * 100
    return x.to(dtype)


def bits(x: torch.Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def in_order(x: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks as it is defined: one after the other, in float32, rounded once."""
    total = x[0].float()
    for row in x[1:]:
        total = total + row.float()
    return total.to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_all_reduce(size: int, dtype: torch.dtype) -> None:
    def work(tp: TP) -> list[torch.Tensor]:
        return [tp.all_reduce(numbers(size, count, dtype)[tp.rank].clone()) for count in COUNTS]

    first, *others = run_ranks(size, work)
    for i, count in enumerate(COUNTS):
        x = numbers(size, count, dtype)
        assert all(bits(other[i]) == bits(first[i]) for other in others)
        if dtype in (torch.float32, torch.bfloat16):
            assert bits(first[i]) == bits(in_order(x))
        roundings = 1 if dtype in (torch.bfloat16, torch.float16) else size
        precision = roundings * torch.finfo(dtype).eps if dtype.is_floating_point else 0
        error = (first[i].double() - x.double().sum(0)).abs()
        assert (error <= precision * x.double().abs().sum(0)).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_values_that_are_not_ordinary(dtype: torch.dtype) -> None:
    nan, inf, tiny = torch.nan, torch.inf, torch.finfo(dtype).tiny / 4
    rows = torch.tensor([[nan, 1, inf, inf, tiny, -0.0, 3e38], [1, nan, 1, -inf, tiny, -0.0, 3e38]], dtype=dtype)
    for count in (7, 70000):
        x = rows.repeat(1, count // 7)

        def work(tp: TP, x: torch.Tensor = x) -> tuple[torch.Tensor, torch.Tensor]:
            return tp.all_reduce(x[tp.rank].clone()), tp.all_max(x[tp.rank].clone())

        for total, largest in run_ranks(2, work):
            torch.testing.assert_close(total, x[0] + x[1], rtol=0, atol=0, equal_nan=True)
            assert total[4] == 2 * tiny and total[5].signbit()
            torch.testing.assert_close(largest, torch.maximum(x[0], x[1]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", SIZES)
def test_all_gather_and_broadcast(size: int) -> None:
    shapes = ((1, 1), (3, 5), (1, 200001), (700, 333), (2, 3, 4), (0, 4))
    messages = [b"x", b"", random.Random(0).randbytes(10_000_000)]

    def work(tp: TP) -> tuple[list, list, list]:
        own = [torch.full(shape, float(tp.rank)).bfloat16() + torch.arange(shape[-1]) for shape in shapes]
        sent = [tp.broadcast(x.clone()) for x in own]
        return [tp.all_gather(x) for x in own], sent, [tp.broadcast_object(m if tp.rank == 0 else 0) for m in messages]

    for gathered, sent, received in run_ranks(size, work):
        for shape, all_ranks, first in zip(shapes, gathered, sent, strict=True):
            rows = [torch.full(shape, float(rank)).bfloat16() + torch.arange(shape[-1]) for rank in range(size)]
            assert torch.equal(all_ranks, torch.cat(rows, dim=-1)) and torch.equal(first, rows[0])
        assert received == messages


def test_tensors_with_gaps() -> None:
    def work(tp: TP) -> tuple:
        x = torch.ones(4, 6)
        tp.all_reduce(x[:, ::2])
        tp.broadcast(x[:, 1:3].mul_(tp.rank + 1)[:, ::2])
        return x, tp.all_gather(x.t())

    for x, gathered in run_ranks(2, work):
        assert x[0, 0] == x[0, 4] == 2 and x[0, 3] == 1 and gathered.shape == (6, 8)
        assert x[0, 1] == 1


@pytest.mark.parametrize("size", (2, 5, 8))
def test_any_order_of_collectives(size: int) -> None:
    """Every rank checks each result, with pauses here and there, so that a slot written too early would be seen."""

    def work(tp: TP) -> None:
        plan, pause = random.Random(1), random.Random(tp.rank)
        for step in range(400):
            kind, count = plan.choice(("sum", "max", "gather", "send", "object")), plan.choice((1, 100, 9000, 70000))
            own = torch.full((count,), float(tp.rank + step))
            if pause.random() < 0.02:
                time.sleep(0.002)
            if kind == "sum":
                assert (tp.all_reduce(own) == sum(range(size)) + size * step).all()
            elif kind == "max":
                assert (tp.all_max(own) == size - 1 + step).all()
            elif kind == "gather":
                wanted = torch.arange(size).repeat_interleave(count) + step
                assert torch.equal(tp.all_gather(own), wanted.float())
            elif kind == "send":
                assert (tp.broadcast(own) == step).all()
            else:
                assert tp.broadcast_object([step] * (count // 10)) == [step] * (count // 10)

    run_ranks(size, work)


def test_a_rank_that_does_not_come() -> None:
    join, _ = shm_ranks(2, timeout_s=0.2)
    first, second = join(0), join(1)
    with pytest.raises(LostPeer, match=r"rank 1 did not come within 0\.2 s \(launcher\.timeout_s\)"):
        first.all_reduce(torch.ones(3))
    with pytest.raises(LostPeer):  # and not again
        first.all_reduce(torch.ones(3))
    with pytest.raises(LostPeer, match="rank 0"):
        second.all_gather(torch.ones(100000))
        second.all_gather(torch.ones(100000))


RANK = """
import sys, time, torch
from mmdist.tp import init_tp
rank, size, way = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
local_size = 1 if way == "apart" else size
tp = init_tp("auto", "auto", rank=rank, size=size, local_size=local_size, timeout_s=60)
x = torch.ones(5000)
tp.all_reduce(x)
assert (x == size).all() and tp.group.name == ("gloo" if way == "apart" else "shm")
print("ready", flush=True)
if way == "waits" and rank == 1:
    time.sleep(60)
while True:
    tp.all_reduce(x.fill_(1))
"""


@contextmanager
def processes(size: int, way: str) -> Iterator[list[subprocess.Popen]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", RANK]
    arguments = [[*command, str(rank), str(size), way] for rank in range(size)]
    ranks = [subprocess.Popen(a, stdout=-1, stderr=-1, text=True, env=env) for a in arguments]
    try:
        for rank in ranks:
            assert rank.stdout.readline() == "ready\n", rank.stderr.read()
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


@pytest.mark.parametrize("way", ("computes", "waits"))
def test_a_killed_rank_ends_the_others(way: str) -> None:
    """More ranks than cores; the others are in the midst of collectives, or have long been waiting for that rank."""
    before = set(Path("/dev/shm").iterdir())
    with processes(3, way) as ranks:
        time.sleep(0.5)
        assert all(rank.poll() is None for rank in ranks) and set(Path("/dev/shm").iterdir()) <= before
        ranks[1].send_signal(signal.SIGKILL)
        for rank in (ranks[0], ranks[2]):
            assert rank.wait(20) != 0 and "LostPeer: rank 1 has died" in rank.stderr.read()
    assert set(Path("/dev/shm").iterdir()) <= before


def test_ranks_of_several_machines_use_gloo() -> None:
    with processes(2, "apart") as ranks:
        ranks[0].kill()
        assert "(rank 0: 2 ranks on several machines); gloo is used instead" in ranks[0].communicate()[1]


def failure(tmp_path: Path, rank: int, text: str, timestamp: int) -> ProcessFailure:
    file = tmp_path / f"{rank}.json"
    info: dict[str, Any] = {"message": text, "extraInfo": {"py_callstack": "", "timestamp": timestamp}}
    file.write_text(json.dumps({"message": info}))
    return ProcessFailure(local_rank=rank, pid=100 + rank, exitcode=1, error_file=str(file))


def test_a_lost_peer_is_no_cause(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lost = failure(tmp_path, 0, "LostPeer: rank 1 has died", 1)
    cause = failure(tmp_path, 1, "ZeroDivisionError: division by zero", 2)
    assert report({0: lost, 1: cause}) == 1
    assert "rank 1 failed: ZeroDivisionError" in capsys.readouterr().err
