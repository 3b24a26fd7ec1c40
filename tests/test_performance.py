"""task=performance: figures from times that are given, exact prompts, phases that add up, ranks that report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CPU, Case, config_for, run_ranks

from mmdist.config import UserError
from mmdist.models.base import Prompt
from mmdist.performance import limits
from mmdist.performance.figures import Case as Point
from mmdist.performance.figures import measured_point
from mmdist.performance.limits import Limits, Work
from mmdist.performance.ranks import RankReport
from mmdist.performance.workload import Run, fit
from mmdist.task_config import PerformanceConfig
from mmdist.tasks import performance


def a_run(seconds: float) -> Run:
    """Two requests of three tokens; prefill takes a quarter of the time, decode half."""
    arrivals = [[seconds / 4, seconds / 2, seconds], [seconds / 2, seconds * 3 / 4, seconds]]
    phases = {"prefill": seconds / 4, "decode": seconds / 2, "sample": seconds / 8}
    steps = {"prefill": [seconds / 4], "decode": [seconds / 4, seconds / 4]}
    return Run(seconds, arrivals, phases, steps, 10, [RankReport(1.0, 100, 4, seconds), RankReport(2.0, 100, 4, None)])


def test_figures_of_times_that_are_given() -> None:
    work = Work(decode_bytes_per_token=10**9, kv_bytes_per_token=10**6, picture_bytes=0, prefill_flop_per_token=10**9)
    runs = [a_run(4.0), a_run(1.0), a_run(2.0)]
    point = measured_point(Point(2, 10, 3, 1, 0), runs, Limits(100.0, 200.0), work, 1e-6)
    assert point["duration"] == 2.0 and point["output_throughput"] == 3.0 and point["pictures_per_s"] == 1.0
    assert point["total_token_throughput"] == 13.0 and point["repeats"] == 3 and point["status"] == "ok"
    assert point["median_ttft_ms"] == 750 and point["median_e2el_ms"] == 2000
    assert point["median_tpot_ms"] == 625.0  # of 1500, 1000, 375, 250, 750, 500
    assert point["spread"]["output_throughput"] == [1.5, 6.0] and point["spread"]["median_ttft_ms"] == [375, 1500]
    assert sum(point["phases_ms"].values()) == pytest.approx(2000) and point["phases_ms"]["other"] == 250
    assert point["collectives"] == {"time_ms": [1.0, 2.0], "bytes": 100, "calls": 4}
    assert point["peak_memory_gib"] == [4.0, None]
    step_gb = 1 + 2 * (10 + 1.5) * 0.001
    assert point["share_of_memory_limit"] == pytest.approx(step_gb / 0.625 / 100)
    assert point["share_of_matrix_limit"] == pytest.approx(2 * 10 / 0.5 / 200)
    assert point["share_of_measuring"] == pytest.approx(5e-6)


def test_prompts_have_exactly_the_length_asked_for() -> None:
    made = Prompt([1, 9, 9, 5, 6], image_positions=[1, 2])
    for length in (3, 4, 5, 9):
        fitted = fit(made, length, seed=0)
        assert len(fitted.token_ids) == length and fitted.image_positions == [1, 2]
        assert fitted.token_ids[:5] == made.token_ids[:length] and 9 not in fitted.token_ids[5:]
    assert fit(made, 50, seed=1).token_ids != fit(made, 50, seed=2).token_ids
    with pytest.raises(UserError, match="input_len=2: the picture alone takes 2 tokens, with 1 of text before it"):
        fit(made, 2, seed=0)


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured of the machine says nothing here, and takes seconds."""
    monkeypatch.setattr(limits, "PRODUCT", (64, 64, 64))
    monkeypatch.setattr(limits, "MIN_READ_BYTES", 2**20)
    monkeypatch.setattr(limits, "READ_BYTES", 2**20)


def measure(case: Case, size: int, **keys: Any) -> dict[str, Any]:
    """What rank 0 of `size` writes."""
    common = {"warmup": 0, "repeats": 2, "output_len": 4, "batch_sizes": [1, 3], "output_dir": "."}
    config = PerformanceConfig(**{**vars(config_for(case)), **common, **keys})

    def rank_work(tp: Any) -> int:
        engine = performance.open_engine(config, tp, CPU)
        if tp.rank > 0:
            return performance.follow(config, engine)
        code = performance.run(config, engine)
        engine.stop()
        return code

    assert run_ranks(size, rank_work) == [0] * size
    return json.loads(Path("performance.json").read_text())


@pytest.mark.parametrize("size", [1, 2])
def test_points_of_a_job(mistral: Case, size: int) -> None:
    image = str(mistral.image_paths("panorama")[0])
    made = measure(mistral, size, image=image, input_len=150)
    assert [(point["batch_size"], point["input_len"], point["output_len"]) for point in made["points"]] == [
        (1, 150, 4),
        (3, 150, 4),
    ]
    for point in made["points"]:
        assert sum(point["phases_ms"].values()) == pytest.approx(1000 * point["duration"])
        assert all(point["phases_ms"][name] > 0 for name in ("preprocess", "vision", "prefill", "decode", "other"))
        assert len(point["steps_ms"]["decode"]) == 3 and point["median_ttft_ms"] < point["median_e2el_ms"]
        assert len(point["collectives"]["time_ms"]) == len(point["peak_memory_gib"]) == size
        assert (point["collectives"]["calls"] > 0) == (size > 1) == (point["collectives"]["bytes"] > 0)
    assert not list(Path().glob("*.partial"))
