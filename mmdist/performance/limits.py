"""The machine's limits, measured beside every figure because a shared machine's drift by half within minutes.

All ranks measure at once, so that each has its share of what they share.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F

from mmdist.backend import GIB, synchronize
from mmdist.engine.encoder import EncoderEngine
from mmdist.engine.load import AnyEngine
from mmdist.models.quantized import linears
from mmdist.plan import bytes_per_rank
from mmdist.tp import TP

CPU = torch.device("cpu")
REPEATS, ENOUGH_S = 5, 1.0
READ_BYTES, MIN_READ_BYTES = GIB, GIB // 4  # of all ranks, and of one: more than caches hold
PRODUCT, CARD_PRODUCT = (2048, 4096, 4096), (8192, 8192, 8192)  # rows, columns, inner


@dataclass(frozen=True)
class Limits:
    """Of all ranks together, in the run's own dtype."""

    memory_gb_per_s: float
    matrix_gflop_per_s: float


@dataclass(frozen=True)
class Work:
    """What the model cannot do without, over all ranks: bytes of weights a decode step reads, of keys and values a
    token in the cache, of a picture looked at; floating-point operations a token of a prompt takes (2 for each number
    in the layers; attention's, which grow with the prompt, left out)."""

    decode_bytes_per_token: int
    kv_bytes_per_token: int
    picture_bytes: int
    prefill_flop_per_token: int


def measure_limits(tp: TP, device: torch.device, dtype: torch.dtype) -> Limits:
    return Limits(read_bandwidth(tp, device), matrix_rate(tp, device, dtype))


def read_bandwidth(tp: TP = TP(), device: torch.device = CPU) -> float:  # noqa: B008  a frozen value
    """GB/s of torch's maximum over 1 GiB, on a CPU in huge pages: what a loop of AVX-512 loads in C reaches."""
    size = max(READ_BYTES // tp.size, MIN_READ_BYTES)
    if device.type != "cpu":
        data = torch.ones(size // 4, dtype=torch.int32, device=device)
        return tp.size * data.nbytes / best_s(data.max, tp, device) / 1e9
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        data = torch.frombuffer(memory, dtype=torch.int32).fill_(1)
        rate = tp.size * data.nbytes / best_s(data.max, tp, device) / 1e9
        del data  # a mapping that is looked at cannot be closed
    return rate


def matrix_rate(
    tp: TP = TP(),  # noqa: B008  a frozen value
    device: torch.device = CPU,
    dtype: torch.dtype = torch.bfloat16,
) -> float:
    """GFLOP/s of a product, on a CPU (2048 x 4096) x (4096 x 4096)."""
    rows, columns, inner = PRODUCT if device.type == "cpu" else CARD_PRODUCT
    x, weight = (torch.ones(count, inner, dtype=dtype, device=device) for count in (rows, columns))
    return tp.size * 2 * rows * columns * inner / best_s(lambda: F.linear(x, weight), tp, device) / 1e9


def best_s(run: Callable[[], object], tp: TP, device: torch.device) -> float:
    """Seconds until all ranks have run it, begun together: the fastest of a few times."""
    times: list[float] = []
    while len(times) < REPEATS and sum(times) < ENOUGH_S:
        tp.all_reduce(torch.zeros(1))  # none begins before the others
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(float(tp.all_max(torch.tensor(time.perf_counter() - start))))
    return min(times)


def find_work(engine: AnyEngine) -> Work | None:
    """None for models that do not generate. Every rank asks at once, as each counts its own part."""
    tp = engine.tp
    if isinstance(engine, EncoderEngine):
        return None
    model = engine.model
    layers, head = (bytes_per_rank(module, tp)[0] for module in (model.decoder.layers, model.lm_head))
    shape = engine.cache_shape
    pages = shape.bytes(model.dtype) // (shape.num_blocks * shape.block_size)
    numbers = sum(prod(module.shape or module.weight.shape) for _, module in linears(model.decoder.layers))
    own = [layers + head, pages, model.memory_numbers() * model.dtype.itemsize, 2 * numbers]
    return Work(*map(int, tp.all_reduce(torch.tensor(own, dtype=torch.float64)).tolist()))
