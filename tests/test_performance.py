"""task=performance: figures from times that are given, exact prompts, phases that add up, ranks that report."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CPU, Case, config_for, run_ranks
from vlmo_cases import config as vlmo_config
from vlmo_cases import inputs

from mmdist import spans
from mmdist.config import EngineConfig, HardwareConfig, UserError
from mmdist.models.base import Prompt
from mmdist.performance import limits
from mmdist.performance.figures import Case as Point
from mmdist.performance.figures import measured_point
from mmdist.performance.limits import Limits, Work
from mmdist.performance.ranks import RankReport
from mmdist.performance.report import CSV_COLUMNS
from mmdist.performance.workload import Run, fit
from mmdist.task_config import PerformanceConfig
from mmdist.tasks import performance
from mmdist.tp import TP

LAUNCH = str(Path(__file__).parents[1] / "launch.py")


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
    assert point["share_of_measuring"] == pytest.approx((10 + 4) * 1e-6 / 2)


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
    config = PerformanceConfig(
        **{**vars(config_for(case, prefix_cache=False, embedding_cache_mib=0)), **common, **keys}
    )

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


def test_a_trace_of_each_rank_names_the_phases(mistral: Case) -> None:
    """A real job: torch has one profiler a process."""
    words = [f"checkpoint={mistral.checkpoint}", "task=performance", "world_size=2", "profile=true", "output_dir=job"]
    words += ["batch_sizes=[2]", "output_len=4", "repeats=1", "warmup=0", "input_len=20"]
    subprocess.run([sys.executable, LAUNCH, *words], check=True, capture_output=True)
    for rank in (0, 1):
        with gzip.open(f"job/trace-batch2-rank{rank}.json.gz") as file:
            names = {event.get("name") for event in json.load(file)["traceEvents"]}
        assert {"prefill", "decode", "broadcast"} <= names and ("detokenise" in names) == (rank == 0)
    made = json.loads(Path("job/performance.json").read_text())
    assert len(made["points"]) == 1 and made["config"]["world_size"] == 2
    assert {"batch_sizes=[2]", "profile=True"} <= set(made["config"]["overrides"])


def test_climbs_until_memory_ends_it(mistral: Case) -> None:
    """A request of 20 tokens takes two blocks; 11 of them hold 5."""
    keys = {"input_len": 16, "climb": True, "repeats": 1, "batch_sizes": [1, 2]}
    points = measure(mistral, 1, engine=EngineConfig(num_blocks=11), **keys)["points"]
    assert [point["batch_size"] for point in points] == [1, 2, 4, 5, 6]
    assert [point["status"] for point in points[:-1]] == ["ok"] * 4
    assert points[-1]["status"] == "stopped: memory for the KV cache holds 5 requests of 20 tokens"
    assert points[-1]["output_throughput"] is None
    rows = list(csv.DictReader(Path("benchmark.csv").read_text().splitlines()))
    assert len(rows) == 4 and list(rows[0]) == list(CSV_COLUMNS) and len(CSV_COLUMNS) == 10
    assert rows[3]["batch_size"] == "5" and len(rows[3]["decode_token_times"].split(",")) == 3
    assert "Batch 6: stopped: memory" in Path("performance.md").read_text()


def test_climbs_until_it_is_too_slow(mistral: Case) -> None:
    points = measure(mistral, 1, climb=True, max_tpot_ms=1e-6, repeats=1)["points"]
    assert [point["batch_size"] for point in points] == [1]
    assert points[0]["status"] == "stopped: the median TPOT is above max_tpot_ms=1e-06" and points[0]["median_tpot_ms"]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"engine": EngineConfig(num_blocks=32), "input_len": 16, "batch_sizes": [17]},
            "holds 16 requests of 20 tokens",
        ),
        ({"output_len": 600}, "output_len=600 come to"),
        ({"input_len": 600}, "a prompt of 600 tokens"),
        ({"hardware": HardwareConfig(memory_gib=0.001)}, "lower engine.max_num_seqs=3 .*; batch_sizes= .* sets it"),
        ({"video": "clip.npy"}, "this family takes pictures only"),
    ],
)
def test_what_cannot_be_measured_is_one_line(mistral: Case, keys: dict[str, Any], words: str) -> None:
    np.save("clip.npy", np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=words):
        measure(mistral, 1, **keys)
    assert not Path("performance.json").exists()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"batch_sizes": []}, "whole numbers above 0"),
        ({"batch_sizes": [0]}, "whole numbers above 0"),
        ({"repeats": 0}, "repeats=0"),
        ({"max_tpot_ms": 5.0}, "climb=true beside it"),
        ({"image": "a.png", "video": "b.mp4"}, "not both"),
        ({"batch_sizes": [4096]}, "engine.max_num_batched_tokens=2048 is below"),
    ],
)
def test_wrong_keys(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        PerformanceConfig(**keys)


def test_an_inner_span_is_not_its_outer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0, 1, 3, 6, 10, 15, 21])
    monkeypatch.setattr(spans, "perf_counter", lambda: next(times))
    timed = spans.TimedSpans(lambda: None)
    with timed("prefill"), timed("broadcast"):  # from 1 to 10, from 3 to 6
        pass
    with timed("prefill"):  # from 15 to 21
        pass
    assert timed.seconds == {"prefill": 2 + 4 + 6, "broadcast": 3}
    assert timed.entered == {"prefill": [9, 6], "broadcast": [3]}


@pytest.mark.parametrize("case", ["vlmo_vqa", "vlmo_retrieval"])
def test_vlmo_answers_at_once(case: str) -> None:
    keys = {**vars(vlmo_config(case)), "image": str(inputs("vlmo_vqa") / "mono.png"), "batch_sizes": [3]}
    config = PerformanceConfig(**{**keys, "warmup": 0, "output_dir": "."})
    engine = performance.open_engine(config, TP(), CPU)
    assert performance.run(config, engine) == 0
    (point,) = json.loads(Path("performance.json").read_text())["points"]
    assert point["output_len"] == 1 and point["median_tpot_ms"] is None and point["phases_ms"]["decode"] is None
    assert point["median_ttft_ms"] == point["median_e2el_ms"] and point["phases_ms"]["prefill"] > 0
    with pytest.raises(UserError, match="leave input_len= out"):
        performance.run(replace(config, input_len=9), engine)
