"""Process start to first token from a packed split folder beside transformers on the plain one, and bytes read.

    python benchmarks/first_token.py [--rounds 5] [--world-sizes 1 2]

The model is benchmarks/bench_1b.py's in bfloat16, its files in the page cache; transformers' script loads with
from_pretrained and generates one token of the same prompt. The first load of each folder checks its hashes and is shown
by itself. Rounds alternate; ratios are taken within a round. Then the page cache lets the split folder go, and each
rank's bytes from the disk (/proc/PID/io) are compared with its file.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_1b import FOLDER, make_bench_1b
from random_checkpoint import REPOSITORY

TRANSFORMERS = """
import sys, torch
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor
model = LlavaNextForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
processor = LlavaNextProcessor.from_pretrained(sys.argv[1])
text = processor.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True)
inputs = processor(text=text, return_tensors="pt")
token_ids = model.generate(**inputs, max_new_tokens=1, min_new_tokens=1, do_sample=False)
print("token:", processor.tokenizer.decode(token_ids[0, -1:]), flush=True)
"""
ROUND_OFF = 1.01  # of its file: what a rank may read


def split(source: Path, size: int) -> Path:
    folder = source.with_name(f"{source.name}-packed-tp{size}")
    if not folder.exists():
        command = [sys.executable, "-m", "weights_tools", "split", "llava_next", "--packed", "--ranks", str(size)]
        subprocess.run([*command, "--src", str(source), "--dst", str(folder)], check=True, cwd=REPOSITORY)
    return folder


def launch(folder: Path, job: str) -> list[str]:
    keys = [f"checkpoint={folder}", "prompt=hello", "max_new_tokens=1", "ignore_eos=true", f"output_dir={job}"]
    return [sys.executable, str(REPOSITORY / "launch.py"), "model=llava_next", *keys]


def first_token_s(command: list[str]) -> float:
    """Seconds from the start of the process to the first byte of its answer."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as job:
        assert job.stdout is not None
        assert job.stdout.read(1), f"{' '.join(command[:2])} ... answered nothing"
        seconds = time.perf_counter() - start
        job.stdout.read()
    assert job.returncode == 0, f"{' '.join(command[:2])} ... failed"
    return seconds


def ours_s(folder: Path) -> float:
    with tempfile.TemporaryDirectory() as job:
        return first_token_s(launch(folder, f"{job}/job"))


def read_into_cache(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        subprocess.run(["cat", str(path)], check=True, stdout=subprocess.DEVNULL)


def drop_from_cache(folder: Path) -> None:
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def bytes_read(folder: Path, size: int) -> list[int]:
    """What each rank reads from the disk, polled until the job ends."""
    drop_from_cache(folder)
    found: dict[int, int] = {}
    output_dir = tempfile.TemporaryDirectory()
    command = launch(folder, f"{output_dir.name}/job")
    with output_dir, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
        while job.poll() is None:
            children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
            for pid in [job.pid] if size == 1 else map(int, children):
                found[pid] = max(found.get(pid, 0), read_counter(pid))
            time.sleep(0.02)
    assert job.returncode == 0, "launch.py failed"
    return [found[pid] for pid in sorted(found)]


def read_counter(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    source = make_bench_1b(FOLDER)
    folders = {size: split(source, size) for size in args.world_sizes}
    for folder in (source, *folders.values()):
        read_into_cache(folder)
    for folder in folders.values():
        print(f"{folder.name}: {ours_s(folder):.2f} s when its hashes are checked")
    times: dict[int, list[float]] = {size: [] for size in (0, *folders)}
    for _ in range(args.rounds):
        times[0].append(first_token_s([sys.executable, "-c", TRANSFORMERS, str(source)]))
        for size, folder in folders.items():
            times[size].append(ours_s(folder))
    print(f"transformers: first token after {statistics.median(times[0]):.2f} s ({min(times[0]):.2f} at best)")
    for size in folders:
        ratio = statistics.median(ours / theirs for ours, theirs in zip(times[size], times[0], strict=True))
        found = f"{statistics.median(times[size]):.2f} s ({min(times[size]):.2f} at best)"
        print(f"mmdist, {size} ranks: {found}, {ratio:.2f} of transformers' time in the same round")
    for size, folder in folders.items():
        files = [path.stat().st_size for path in sorted(folder.glob("*.safetensors"))]
        for rank, (read, there) in enumerate(zip(bytes_read(folder, size), files, strict=True)):
            words = "as it should be" if read <= ROUND_OFF * there else "TOO MUCH"
            print(f"{size} ranks, rank {rank}: {read / 1e6:.1f} MB read, its file {there / 1e6:.1f} MB: {words}")


if __name__ == "__main__":
    main()
