"""Cold start of the default: seconds from process start to the first character of the answer.

python benchmarks/startup.py [--runs 5]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LAUNCH = Path(__file__).resolve().parents[1] / "launch.py"


def first_token_s() -> float:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(LAUNCH), f"output_dir={folder}/job"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as job:
            assert job.stdout is not None
            job.stdout.readline()  # the question
            job.stdout.read(1)
            seconds = time.perf_counter() - start
            job.stdout.read()
    assert job.returncode == 0, "launch.py failed"
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    times = [first_token_s() for _ in range(parser.parse_args().runs)]
    print(f"first token after {min(times):.1f} s min, {statistics.median(times):.1f} s median, {max(times):.1f} s max")


if __name__ == "__main__":
    main()
