"""Made-up results with realistic figures, for what reads performance.json."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from mmdist.performance.results import Result

PHASES = {"preprocess": 0.03, "vision": 0.09, "broadcast": 0.01, "prefill": 0.2, "decode": 0.6, "sample": 0.02,
          "detokenise": 0.01, "other": 0.04}  # fmt: skip


def make_point(batch_size: int, *, speed: float = 1.0, ranks: int = 2, output_len: int = 256) -> dict[str, Any]:
    """speed: times as fast as a small computer."""
    draw = random.Random(f"{batch_size} {speed} {ranks}")
    step_ms = (20 + 2 * batch_size) / speed * draw.uniform(0.97, 1.03)
    ttft_ms = 180 * batch_size / speed * draw.uniform(0.95, 1.1)
    decode_ms = step_ms * (output_len - 1)
    duration_ms = decode_ms + ttft_ms
    rate = 1000 * batch_size * output_len / duration_ms
    times = {"ttft": ttft_ms, "tpot": step_ms, "itl": step_ms, "e2el": duration_ms}
    if output_len == 1:
        times |= {"tpot": None, "itl": None}
    phases = {name: share * duration_ms for name, share in PHASES.items()}
    return {
        "batch_size": batch_size, "input_len": 320, "output_len": output_len, "num_pictures": 1,
        "num_video_frames": 0, "repeats": 3, "status": "ok", "duration": duration_ms / 1000,
        "request_throughput": 1000 * batch_size / duration_ms, "output_throughput": rate,
        "total_token_throughput": rate * (320 + output_len) / output_len,
        "pictures_per_s": 1000 * batch_size / duration_ms,
        **{f"{kind}_{name}_ms": value and value * factor for name, value in times.items()
           for kind, factor in (("mean", 1.01), ("median", 1.0), ("p99", 1.15))},
        "spread": {"output_throughput": [rate * 0.95, rate * 1.04], "median_ttft_ms": [ttft_ms * 0.93, ttft_ms * 1.08],
                   "median_tpot_ms": None if output_len == 1 else [step_ms * 0.96, step_ms * 1.05]},
        "phases_ms": phases | ({"decode": None} if output_len == 1 else {}),
        "collectives": {"time_ms": [0.1 * duration_ms] * ranks, "bytes": 10**7 * batch_size, "calls": 9000},
        "peak_memory_gib": [3.2 / ranks + 0.1 * batch_size] * ranks,
        "share_of_memory_limit": None if output_len == 1 else 0.61, "share_of_matrix_limit": 0.42,
    }  # fmt: skip


def stopped_point(batch_size: int, reason: str) -> dict[str, Any]:
    point = make_point(batch_size)
    kept = ("batch_size", "input_len", "output_len", "num_pictures", "num_video_frames")
    return {name: point[name] if name in kept else None for name in point} | {
        "repeats": 0,
        "status": f"stopped: {reason}",
    }


def make_content(batch_sizes: Iterable[int] = range(1, 11), *, speed: float = 1.0, ranks: int = 2,
                 output_len: int = 256, **config: Any) -> dict[str, Any]:  # fmt: skip
    """One job's performance.json."""
    points = [make_point(size, speed=speed, ranks=ranks, output_len=output_len) for size in batch_sizes]
    return {
        "schema": 1,
        "config": {"model": "llava_next", "world_size": ranks, "quant": "none", "dtype": "bfloat16", "device": "cpu",
                   "kernels": "avx512_bf16", "collectives": "shm" if ranks > 1 else None,
                   "checkpoint": "/data/llava_next-shapes", "threads_per_rank": 1, "overrides": ["output_len=256"],
                   **config},
        "machine": {"cpu": "Some CPU @ 2.00GHz", "cores": 2, "memory_gib": 23.5, "accelerators": [], "python": "3.11.7",
                    "torch": "2.13.0+cpu", "transformers": "5.23.0", "mmdist": "0.1.0",
                    "date": "2026-11-21T17:00:00+00:00"},
        "limits": {"memory_gb_per_s": 31.4, "matrix_gflop_per_s": 912.0, "matrix_dtype": "bfloat16",
                   "decode_bytes_per_token": 2_000_000_000, "prefill_flop_per_token": 2_100_000_000},
        "points": points,
    }  # fmt: skip


def make_sweep(
    models: Iterable[str] = ("llava", "llava_next"),
    sizes: Iterable[int] = (1, 2, 4),
    quants: Iterable[str] = ("none", "w8a16"),
    batch_sizes: Iterable[int] = (1, 2, 4, 8),
) -> list[Result]:
    """A job for each of them."""
    results = []
    for m, model in enumerate(models):
        for ranks in sizes:
            for quant in quants:
                overrides = {"model": model, "world_size": str(ranks), "quant": quant}
                speed = ranks**0.8 * (1 + 0.3 * m) * (1.4 if quant == "w8a16" else 1)
                content = make_content(batch_sizes, speed=speed, ranks=ranks, model=model, quant=quant)
                folder = ",".join(f"{key}={value}" for key, value in overrides.items())
                results.append(Result(overrides, content, folder=folder))
    return results
