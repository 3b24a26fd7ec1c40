"""The machine's limits, measured beside every figure because a shared machine's drift by half within minutes."""

from __future__ import annotations

import json
import mmap
import time
from collections.abc import Callable
from pathlib import Path

import torch

GIB = 2**30
LAYERS, HEAD = "language_model.model.layers.", "language_model.lm_head."
BYTES_A_NUMBER = {"bf16": 2, "w8a16": 1, "w4a16": 0.5 + 4 / 128, "q8_0": 34 / 32, "q4_0": 18 / 32}
OUR_INTEGERS = ("w8a16", "w4a16")  # which keep the head in bfloat16


def best_s(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest run."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def read_bandwidth() -> float:
    """GB/s of torch's maximum over 1 GiB in huge pages, the best of five: what a loop of AVX-512 loads in C reaches."""
    with mmap.mmap(-1, GIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        data = torch.frombuffer(memory, dtype=torch.int32).fill_(1)
        rate = data.nbytes / best_s(data.max, 5) / 1e9
        del data  # a mapping that is looked at cannot be closed
    return rate


def matrix_rate() -> float:
    """GFLOP/s of a bfloat16 product (2048 x 4096) x (4096 x 4096), the best of five."""
    x, weight = torch.ones(2048, 4096, dtype=torch.bfloat16), torch.ones(4096, 4096, dtype=torch.bfloat16)
    return 2 * x.numel() * len(weight) / best_s(lambda: torch.nn.functional.linear(x, weight), 5) / 1e9


def count_numbers(checkpoint: Path) -> tuple[int, int]:
    """Of the decoder's layers, and of its head: a decoded token reads both, a prompt's multiplies with the first."""
    with (checkpoint / "model.safetensors").open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    sizes = {name: torch.Size(entry["shape"]).numel() for name, entry in header.items() if "shape" in entry}
    return tuple(sum(size for name, size in sizes.items() if name.startswith(part)) for part in (LAYERS, HEAD))


def bytes_a_token(checkpoint: Path, kind: str) -> float:
    """Bytes of weights that one step of decoding has to read."""
    layers, head = count_numbers(checkpoint)
    return layers * BYTES_A_NUMBER[kind] + head * BYTES_A_NUMBER["bf16" if kind in OUR_INTEGERS else kind]
