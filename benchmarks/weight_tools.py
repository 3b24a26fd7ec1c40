"""split and quantize beside `cp -r` and fsync of the same folder: seconds, ratios, peak memory, what hashing costs.

python benchmarks/weight_tools.py [--runs 3] [--source DIR]

The source is benchmarks/bench_1b.py's checkpoint (2.7 GB, made when it is not there), read once before the first run so
that all find it in the page cache. Each command is a process of its own; its seconds are those after Python's imports,
and beside them those of the whole process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_1b import make_bench_1b

REPOSITORY = Path(__file__).resolve().parents[1]
COMMANDS = {
    "split, 4 ranks": ["split", "llava_next", "--ranks", "4"],
    "split, not hashed": ["split", "llava_next", "--ranks", "4"],
    "quantize, w8a16": ["quantize", "llava_next", "--scheme", "w8a16"],
    "quantize, not hashed": ["quantize", "llava_next", "--scheme", "w8a16"],
    "quantize, w4a16 compressed-tensors": [
        "quantize", "llava_next", "--scheme", "w4a16", "--format", "compressed-tensors",
    ],
}  # fmt: skip
CHILD = """
import json, os, resource, sys, time
from weights_tools import quantize, split
from weights_tools.cli import main
if sys.argv[1] == "unhashed":
    quantize.sha256 = split.sha256 = lambda tensor: ""
start = time.perf_counter()
assert main(sys.argv[2:]) == 0
seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak_bytes": peak}), flush=True)
os._exit(0)  # as the console script ends
"""


def copy(source: Path, target: Path) -> dict[str, Any]:
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for path in [*target.iterdir(), target]:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "process_seconds": seconds}


def run_tool(name: str, source: Path, target: Path) -> dict[str, Any]:
    hashed = "unhashed" if "not hashed" in name else "hashed"
    start = time.perf_counter()
    command = [sys.executable, "-c", CHILD, hashed, *COMMANDS[name], "--src", str(source), "--dst", str(target)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    return {**json.loads(done.stdout.splitlines()[-1]), "process_seconds": time.perf_counter() - start}


def largest_tensor(source: Path) -> int:
    sizes = []
    for path in source.glob("*.safetensors"):
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        spans = (entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
        sizes += [last - first for first, last in spans]
    return max(sizes)


def show(results: dict[str, list[dict[str, Any]]], allowed: int) -> None:
    cp = statistics.median(run["seconds"] for run in results["cp -r, fsync"])
    for name, runs in results.items():
        seconds = [run["seconds"] for run in runs]
        middle, whole = statistics.median(seconds), statistics.median(run["process_seconds"] for run in runs)
        words = (
            f"{name:<36} {middle:6.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), {cp / middle:5.2f} of cp's speed"
        )
        if "peak_bytes" in runs[0]:
            peak = max(run["peak_bytes"] for run in runs)
            words += f"; with Python's start {whole:.2f} s, {cp / whole:.2f}"
            words += f"; peak {peak / 1e6:.0f} MB of {allowed / 1e6:.0f} allowed"
        print(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--source", type=Path, help="another LLaVA-NeXT checkpoint")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    source = args.source or make_bench_1b()
    subprocess.run(["cat", *map(str, source.iterdir())], check=True, stdout=subprocess.DEVNULL)
    results: dict[str, list[dict[str, Any]]] = {"cp -r, fsync": [], **{name: [] for name in COMMANDS}}
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        for _ in range(args.runs):
            for name, runs in results.items():
                target = Path(folder) / "target"
                runs.append(run_tool(name, source, target) if name in COMMANDS else copy(source, target))
                shutil.rmtree(target)
    show(results, 600 * 10**6 + 2 * largest_tensor(source))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
