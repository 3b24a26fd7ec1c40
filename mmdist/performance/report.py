"""performance.json, benchmark.csv and performance.md in the job's folder; each is replaced as a whole."""

from __future__ import annotations

import csv
import io
import json
import logging
import statistics
from pathlib import Path
from typing import Any

SCHEMA = 1
NAME = "performance.json"
# The ten columns of MindIE's benchmark.csv; times of one run, steps as lists.
CSV_COLUMNS = (
    "batch_size", "input_seq_len", "output_seq_len", "e2e_time(ms)", "prefill_time(ms)", "decoder_token_time(ms)",
    "prefill_count", "prefill_token_times", "decode_token_times", "prefill_average_time(ms)",
)  # fmt: skip
# Markdown: heading, field, digits.
TABLE = (
    ("batch", "batch_size", 0),
    ("input", "input_len", 0),
    ("output", "output_len", 0),
    ("tokens/s", "output_throughput", 1),
    ("pictures/s", "pictures_per_s", 2),
    ("TTFT ms", "median_ttft_ms", 1),
    ("TPOT ms", "median_tpot_ms", 2),
    ("ITL p99 ms", "p99_itl_ms", 2),
    ("memory limit", "share_of_memory_limit", 2),
    ("matrix limit", "share_of_matrix_limit", 2),
)
log = logging.getLogger("mmdist.performance")


class Report:
    """What has been measured so far, written anew after every point."""

    def __init__(self, folder: Path, config: dict[str, Any], machine: dict[str, Any]):
        self.folder = folder
        self.content: dict[str, Any] = {
            "schema": SCHEMA,
            "config": config,
            "machine": machine,
            "limits": None,
            "complete": False,
            "points": [],
        }

    def add(self, point: dict[str, Any], limits: dict[str, Any]) -> None:
        self.content["points"].append(point)
        self.content["limits"] = limits
        self.write()

    def finish(self) -> None:
        """There is no more to come."""
        self.content["complete"] = True
        self.write()

    def write(self) -> None:
        points = self.content["points"]
        write_whole(self.folder / NAME, json.dumps(self.content, indent=1, allow_nan=False) + "\n")
        write_whole(self.folder / "benchmark.csv", csv_text(points))
        write_whole(self.folder / "performance.md", markdown(self.content))


def write_whole(path: Path, content: str | bytes) -> None:
    """A reader, or a kill, finds the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)


def csv_text(points: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for point in points:
        if point["duration"] is not None:
            writer.writerow(csv_row(point))
    return out.getvalue()


def csv_row(point: dict[str, Any]) -> list[Any]:
    prefill, decode = point["steps_ms"]["prefill"], point["steps_ms"]["decode"]
    per_token = sum(decode) / (point["output_len"] - 1) if decode else 0.0
    times = (1000 * point["duration"], sum(prefill), per_token)
    return [
        point["batch_size"],
        point["input_len"],
        point["output_len"],
        *(f"{time:.3f}" for time in times),
        len(prefill),
        *(",".join(f"{step:.3f}" for step in steps) for steps in (prefill, decode)),
        f"{statistics.fmean(prefill):.3f}",
    ]


def markdown(content: dict[str, Any]) -> str:
    config, limits = content["config"], content["limits"]
    dtype = limits["matrix_dtype"]
    lines = [
        f"# {config['model']}, {config['world_size']} rank(s), {config['dtype']}, weights {config['quant']}",
        "",
        table(content["points"]),
        "",
        "Medians; the whole batch is begun at once. Shares are of what all ranks together reached in the same run: "
        f"{limits['memory_gb_per_s']:.1f} GB/s read, {limits['matrix_gflop_per_s']:.0f} GFLOP/s in {dtype}.",
    ]
    return "\n".join([*lines, *stops(content["points"])]) + "\n"


def table(points: list[dict[str, Any]]) -> str:
    head = ["| " + " | ".join(heading for heading, _, _ in TABLE) + " |", "|" + "---:|" * len(TABLE)]
    rows = (
        "| "
        + " | ".join("-" if point[name] is None else f"{point[name]:.{digits}f}" for _, name, digits in TABLE)
        + " |"
        for point in points
    )
    return "\n".join([*head, *rows])


def stops(points: list[dict[str, Any]]) -> list[str]:
    return [f"\nBatch {point['batch_size']}: {point['status']}." for point in points if point["status"] != "ok"]
