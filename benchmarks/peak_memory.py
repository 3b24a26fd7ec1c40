"""Peak memory of each rank beside its plan: (VmHWM - a bare runtime) / planned bytes, at most 1.2.

    python benchmarks/peak_memory.py [--world-size 2] [--checkpoint DIR]

The bare runtime is the same command on the tiny shapes checkpoint, less what its own plan counts. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_1b import make_bench_1b
from random_checkpoint import REPOSITORY

LAUNCH = [sys.executable, str(REPOSITORY / "launch.py")]
SHAPES = REPOSITORY / "assets" / "llava_next-shapes"
PICTURE = REPOSITORY / "assets" / "pictures" / "shapes.png"


def plan(checkpoint: Path, keys: list[str]) -> list[int]:
    """Planned bytes of each rank."""
    command = [*LAUNCH, "task=plan", "format=json", f"checkpoint={checkpoint}", "engine.max_num_seqs=1", *keys]
    made = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    parts = ("llm_bytes", "vision_bytes", "kv_bytes", "activation_bytes")
    return [max(sum(rank[part] for part in parts), rank["peak_load_bytes"]) for rank in made["ranks"]]


def peak(checkpoint: Path, keys: list[str]) -> list[int]:
    """VmHWM of each rank, polled until the job ends."""
    prompt = ["prompt=what is in the picture ?", f"image={PICTURE}", "max_new_tokens=16", "ignore_eos=true"]
    command = [*LAUNCH, f"checkpoint={checkpoint}", *prompt, *keys]
    highest: dict[int, int] = {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
        while job.poll() is None:
            children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
            for pid in map(int, children):
                highest[pid] = max(highest.get(pid, 0), read_peak(pid))
            time.sleep(0.02)
    assert job.returncode == 0, f"{' '.join(command)} failed"
    return [highest[pid] for pid in sorted(highest)]


def read_peak(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path)
    args = parser.parse_args()
    checkpoint = args.checkpoint or make_bench_1b()
    folder = tempfile.TemporaryDirectory()
    keys = [f"world_size={args.world_size}", f"output_dir={folder.name}/job"]
    bare = [measured - planned for measured, planned in zip(peak(SHAPES, keys), plan(SHAPES, keys), strict=True)]
    rows = zip(peak(checkpoint, keys), bare, plan(checkpoint, keys), strict=True)
    print("rank   peak MB   bare MB   plan MB   (peak - bare) / plan")
    for rank, (measured, runtime, planned) in enumerate(rows):
        ratio = (measured - runtime) / planned
        print(f"{rank:4}{measured / 1e6:10.0f}{runtime / 1e6:10.0f}{planned / 1e6:10.0f}{ratio:12.2f}")


if __name__ == "__main__":
    main()
