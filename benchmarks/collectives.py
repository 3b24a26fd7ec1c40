"""Median microseconds of a collective between ranks of this machine, over shared memory and over gloo.

python benchmarks/collectives.py [--ranks 2] [--repeats 2000] [--json FILE]

A run of each kind alternates, round by round; a figure is the median over a round's calls on rank 0, then over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mmdist.collectives.distributed import DistributedCollectives
from mmdist.cores import pin
from mmdist.tp import TP, init_tp

ROUNDS = 3
FLOATS = (64, 4096, 131072)
BATCH = {"input_ids": list(range(10)), "context_lens": list(range(10))}  # about what a decode step sends


def cases() -> dict[str, Callable[[TP], object]]:
    """Each collective that is measured; its tensor is made once."""
    made: dict[str, Callable[[TP], object]] = {}
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        for count in FLOATS:
            x = torch.zeros(count, dtype=dtype)
            made[f"all_reduce {name} {count}"] = lambda tp, x=x: tp.all_reduce(x)
    logits = torch.zeros(1, 16000, dtype=torch.bfloat16)
    made["all_gather bfloat16 16000"] = lambda tp: tp.all_gather(logits)
    made["broadcast_object of a step"] = lambda tp: tp.broadcast_object(BATCH)
    return made


def median_us(call: Callable[[TP], object], tp: TP, repeats: int) -> float:
    times = []
    for _ in range(repeats + repeats // 10):
        start = time.perf_counter()
        call(tp)
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times[repeats // 10 :])


def rank_main(rank: int, size: int, port: int, repeats: int, results: mp.SimpleQueue) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    pin(rank, size)
    shm = init_tp("shm", "auto", rank=rank, size=size, local_size=size, timeout_s=60)
    gloo = TP(rank, size, DistributedCollectives(rank, size, None))
    rounds: dict[str, dict[str, list[float]]] = {name: {"shm": [], "gloo": []} for name in cases()}
    for _ in range(ROUNDS):
        for name, call in cases().items():
            rounds[name]["shm"].append(median_us(call, shm, repeats))
            rounds[name]["gloo"].append(median_us(call, gloo, max(20, repeats // 20)))
    if rank == 0:
        results.put(rounds)
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that unwinds its statics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(rank_main, (arguments.ranks, port, arguments.repeats, results), arguments.ranks)
    rounds = results.get()
    print(f"{arguments.ranks} ranks, {len(os.sched_getaffinity(0))} cores; microseconds, median of {ROUNDS} rounds")
    print(f"{'':28}{'shm':>9}{'gloo':>9}   spread of shm")
    for name, kinds in rounds.items():
        shm, gloo = (statistics.median(kinds[kind]) for kind in ("shm", "gloo"))
        print(f"{name:28}{shm:9.1f}{gloo:9.1f}   {min(kinds['shm']):.1f} to {max(kinds['shm']):.1f}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"ranks": arguments.ranks, "microseconds": rounds}, file)


if __name__ == "__main__":
    main()
