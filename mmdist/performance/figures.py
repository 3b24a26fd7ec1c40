"""Runs to one point of performance.json; names as in `vllm bench`, units in them, null where nothing was measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mmdist.performance.limits import Limits, Work
from mmdist.performance.workload import Run
from mmdist.spans import PHASES

NO_FIGURES = (
    "duration", "request_throughput", "output_throughput", "total_token_throughput", "pictures_per_s",
    *(f"{kind}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el") for kind in ("mean", "median", "p99")),
    "spread", "phases_ms", "steps_ms", "collectives", "peak_memory_gib", "share_of_memory_limit",
    "share_of_matrix_limit", "share_of_measuring",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What a point's runs had in common. input_len: the tokens that went through the model, of each request."""

    batch_size: int
    input_len: int
    output_len: int
    num_pictures: int
    num_video_frames: int


def stopped_point(case: Case, reason: str) -> dict[str, Any]:
    """A point that was not run."""
    return {**vars(case), "repeats": 0, "status": f"stopped: {reason}", **dict.fromkeys(NO_FIGURES)}


def measured_point(
    case: Case, runs: Sequence[Run], limits: Limits, work: Work | None, span_cost_s: float
) -> dict[str, Any]:
    """Latencies over the requests of all runs; what belongs together (duration, phases, collectives) of the run whose
    duration is the median; spread: lowest and highest over the runs."""
    middle = sorted(runs, key=lambda run: run.duration)[(len(runs) - 1) // 2]
    seconds = middle.duration
    tokens = case.batch_size * case.output_len
    rates = {
        "duration": seconds,
        "request_throughput": case.batch_size / seconds,
        "output_throughput": tokens / seconds,
        "total_token_throughput": (tokens + case.batch_size * case.input_len) / seconds,
        "pictures_per_s": case.batch_size * case.num_pictures / seconds if case.num_pictures else None,
    }
    shares = find_shares(case, middle, limits, work)
    return {
        **vars(case),
        "repeats": len(runs),
        "status": "ok",
        **rates,
        **latencies(runs),
        "spread": find_spread(runs, tokens),
        "phases_ms": find_phases(middle, case.output_len),
        "steps_ms": {name: [1000 * step for step in steps] for name, steps in middle.steps.items()},
        "collectives": {
            "time_ms": [report.collective_ms for report in middle.ranks],
            "bytes": middle.ranks[0].collective_bytes,
            "calls": middle.ranks[0].collective_calls,
        },
        "peak_memory_gib": highest_memory(runs),
        **shares,
        "share_of_measuring": (middle.num_spans + middle.ranks[0].collective_calls) * span_cost_s / seconds,
    }


def latencies(runs: Sequence[Run]) -> dict[str, float | None]:
    requests = [arrivals for run in runs for arrivals in run.arrivals]
    found = {
        "ttft": [arrivals[0] for arrivals in requests],
        "tpot": [tpot for arrivals in requests if (tpot := find_tpot(arrivals)) is not None],
        "itl": [later - earlier for arrivals in requests for earlier, later in pairwise(arrivals)],
        "e2el": [arrivals[-1] for arrivals in requests],
    }
    return {
        f"{kind}_{name}_ms": reckon([1000 * value for value in values]) if values else None
        for name, values in found.items()
        for kind, reckon in RECKONINGS.items()
    }


def find_tpot(arrivals: Sequence[float]) -> float | None:
    """Seconds per output token after the first; None where there is no second."""
    return (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1) if len(arrivals) > 1 else None


def p99(values: Sequence[float]) -> float:
    """As numpy's percentile (and vLLM) has it: between two values in proportion."""
    ordered = sorted(values)
    place = 0.99 * (len(ordered) - 1)
    below, above = ordered[int(place)], ordered[min(int(place) + 1, len(ordered) - 1)]
    return below + (above - below) * (place - int(place))


RECKONINGS: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": statistics.fmean,
    "median": statistics.median,
    "p99": p99,
}


def find_spread(runs: Sequence[Run], tokens: int) -> dict[str, list[float] | None]:
    """[lowest, highest] over the runs."""

    def ends(values: Sequence[float]) -> list[float] | None:
        return [min(values), max(values)] if values else None

    each = [latencies([run]) for run in runs]
    return {
        "output_throughput": ends([tokens / run.duration for run in runs]),
        **{
            name: ends([value for found in each if (value := found[name]) is not None])
            for name in ("median_ttft_ms", "median_tpot_ms")
        },
    }


def find_phases(run: Run, output_len: int) -> dict[str, float | None]:
    """Rank 0's milliseconds of each phase; `other` (scheduling, laying out batches) makes them add up."""
    phases: dict[str, float | None] = {name: 1000 * run.phases.get(name, 0.0) for name in PHASES}
    phases["other"] = 1000 * (run.duration - sum(run.phases.get(name, 0.0) for name in PHASES))
    if output_len == 1:
        phases["decode"] = None
    return phases


def highest_memory(runs: Sequence[Run]) -> list[float | None]:
    """Of each rank, over the runs."""
    by_rank = zip(*([report.peak_memory_gib for report in run.ranks] for run in runs), strict=True)
    return [max((gib for gib in rank if gib is not None), default=None) for rank in by_rank]


def find_shares(case: Case, run: Run, limits: Limits, work: Work | None) -> dict[str, float | None]:
    """Memory: bytes a decode step must read (weights once; of every request, keys and values of a context that is half
    answered, and its picture's) in the median time per output token. Matrix: the prompts' products in prefill's time.
    """
    memory = matrix = None
    tpots = [tpot for arrivals in run.arrivals if (tpot := find_tpot(arrivals)) is not None]
    if work is not None and tpots:
        context = (case.input_len + case.output_len / 2) * work.kv_bytes_per_token
        pictures = case.num_pictures * work.picture_bytes
        step_bytes = work.decode_bytes_per_token + case.batch_size * (context + pictures)
        memory = step_bytes / statistics.median(tpots) / 1e9 / limits.memory_gb_per_s
    if work is not None and run.phases.get("prefill"):
        products = case.batch_size * case.input_len * work.prefill_flop_per_token
        matrix = products / run.phases["prefill"] / 1e9 / limits.matrix_gflop_per_s
    return {"share_of_memory_limit": memory, "share_of_matrix_limit": matrix}
