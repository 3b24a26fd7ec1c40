"""A second of all-reduces between the ranks that a job would have: right sums, and how long they take.

`exchange` starts them as a job does; `be_rank` is one of them.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import time
from contextlib import redirect_stderr
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from mmdist.agent import run_agent
from mmdist.backend import init_backend, threads_per_rank
from mmdist.config import HardwareConfig, LauncherConfig, UserError
from mmdist.doctor.finding import Finding
from mmdist.shipped import PACKAGE
from mmdist.tp import TP, init_tp

TIMEOUT_S = 100  # ranks that have not met by then never will; HCCL reports after 68
SECONDS = 0.5  # for each of the sizes
SMALL, LARGE = 8 << 10, 16 << 20  # bytes: about what a layer reduces for one token, and for a long prompt
RANK = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); from mmdist.doctor.exchange import be_rank; be_rank()"
CURE = "NCCL_DEBUG=INFO or HCCL's logs say more; on a CPU: hardware.collectives=gloo"


def exchange(hardware: HardwareConfig, launcher: LauncherConfig, device: str, size: int) -> Finding:
    """Starts `size` ranks, which takes as long as it takes a job."""
    if size == 1:
        return Finding("all-reduce", "one rank has nothing to exchange")
    hardware, launcher = (
        replace(hardware, device=device),
        replace(launcher, timeout_s=min(TIMEOUT_S, launcher.timeout_s)),
    )
    with tempfile.TemporaryDirectory(prefix="mmdist-") as folder:
        path = Path(folder) / "found.json"
        command = [sys.executable, "-c", RANK, json.dumps(asdict(hardware)), str(launcher.timeout_s), str(path)]
        problem = run_ranks(command, size, launcher, threads_per_rank(hardware, size))
        if problem:
            return Finding("all-reduce", problem, "broken", CURE)
        found = json.loads(path.read_text())
    ranks = f"{size} ranks over {found['name']}"
    if found["wrong"]:
        return Finding("all-reduce", f"{ranks}: {found['wrong']}", "broken", CURE)
    small, large = found["seconds"]
    speed = f"{SMALL >> 10} KiB in {small * 1e6:.0f} us, {LARGE >> 20} MiB at {LARGE / large / 1e9:.1f} GB/s"
    return Finding("all-reduce", f"{ranks}: {speed}")


def run_ranks(command: list[str], size: int, launcher: LauncherConfig, threads: int) -> str:
    """Why the ranks failed, in a line; nothing where they did not."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            code = run_agent(command, size, launcher, threads)
    except UserError as error:  # no port
        return str(error)
    lines = said.getvalue().splitlines() or [f"the ranks ended with exit code {code}"]
    return lines[0].removeprefix("error: ") if code else ""


def measure(tp: TP, device: torch.device, count: int) -> float:
    """Median seconds of an all-reduce of `count` float32 numbers, each rank making as many as rank 0 has time for."""
    x = torch.zeros(count, device=device)
    took: list[float] = []
    while tp.broadcast_object(sum(took) < SECONDS):
        synchronize(device)
        start = time.perf_counter()
        tp.all_reduce(x)
        synchronize(device)
        took.append(time.perf_counter() - start)
    return median(took)


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def check_sums(tp: TP, device: torch.device) -> str:
    """What is wrong with the sums, said by the first rank that has a wrong one; else nothing."""
    mine = torch.arange(1000, device=device, dtype=torch.float32) * (tp.rank + 1)
    wanted = torch.arange(1000, device=device, dtype=torch.float32) * (tp.size * (tp.size + 1) // 2)
    wrong = (tp.all_reduce(mine) != wanted).sum().float().reshape(1)
    counts = tp.all_gather(wrong).tolist()
    return next((f"rank {rank} has {int(n)} of 1000 sums wrong" for rank, n in enumerate(counts) if n), "")


@record
def be_rank() -> None:
    hardware, timeout_s, path = HardwareConfig(**json.loads(sys.argv[1])), int(sys.argv[2]), Path(sys.argv[3])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = init_backend(hardware, local_rank=rank, local_size=size)
    places = {"rank": rank, "size": size, "local_size": size}
    tp = init_tp(backend.collectives, hardware.kernels, **places, timeout_s=timeout_s)
    wrong = check_sums(tp, backend.device)
    seconds = [measure(tp, backend.device, nbytes // 4) for nbytes in (SMALL, LARGE)]
    if rank == 0:
        path.write_text(json.dumps({"name": tp.others.name, "wrong": wrong, "seconds": seconds}))
    tp.broadcast_object(None)  # no rank leaves while another still reads from it
