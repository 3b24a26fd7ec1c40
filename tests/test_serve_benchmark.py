"""benchmarks/serve.py against a real server, and its figures by the names of `vllm bench serve --save-result`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serve_cases import Server

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "serve.py"
# Of vllm/benchmarks/serve.py, 0.32, with --percentile-metrics ttft,tpot,itl,e2el --save-result --save-detailed.
FIELDS = {
    *("date", "backend", "num_prompts", "request_rate", "burstiness", "max_concurrency"),
    *("duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput"),
    *("request_goodput", "output_throughput", "total_token_throughput"),
    *("input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "generated_texts", "errors"),
    *(f"{how}_{kind}_ms" for how in ("mean", "median", "std", "p99") for kind in ("ttft", "tpot", "itl", "e2el")),
}


def run_load(server: Server, file: Path, *words: str) -> dict[str, Any]:
    sizes = ["--requests", "6", "--pictures", "2", "--picture-size", "64", "--output-len", "8"]
    command = [sys.executable, str(SCRIPT), "--url", server.url, *sizes, "--output", str(file), *words]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return json.loads(file.read_text())["rounds"][0][0]


@pytest.mark.parametrize("loop", (["--concurrency", "3"], ["--rate", "20"]))
def test_figures_have_the_names_of_vllm(server: Server, tmp_path: Path, loop: list[str]) -> None:
    figures = run_load(server, tmp_path / "load.json", "--goodput", "ttft:60000", "e2el:60000", *loop)
    assert figures.keys() >= FIELDS
    assert (figures["completed"], figures["failed"], figures["total_output_tokens"]) == (6, 0, 6 * 8)
    assert figures["request_goodput"] == figures["request_throughput"] > 0
    assert figures["start_times"] == sorted(figures["start_times"])
    assert all(0 < first < whole for first, whole in zip(figures["ttfts"], figures["latencies"], strict=True))


def test_goodput_counts_what_was_in_time(server: Server, tmp_path: Path) -> None:
    figures = run_load(server, tmp_path / "load.json", "--goodput", "e2el:0.001")
    assert figures["request_goodput"] == 0 and figures["completed"] == 6


def test_no_server_is_said() -> None:
    command = [sys.executable, str(SCRIPT), "--url", "http://127.0.0.1:9", "--requests", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "no OpenAI server answers there" in done.stderr
