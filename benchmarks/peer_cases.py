"""What vs_peers.py asks of each system."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from systems import System

NEW_TOKENS = 24
PROMPT_TOKENS = 16
TEXT = "USER: <image>\nWhat is this? ASSISTANT:"


@dataclass(frozen=True)
class Case:
    """run: a system's figure. limit_unit: of the limit it is held against, memory's or the matrix product's."""

    run: Callable[[System], float]
    unit: str
    limit_unit: str = ""
    batch: int = 1
    needs_warm_up: bool = True


def prompts(batch: int, length: int) -> list[list[int]]:
    """Random token ids above the special ones."""
    generator = torch.Generator().manual_seed(batch * length)
    return torch.randint(8, 31000, (batch, length), generator=generator).tolist()


def first_tokens(system: System) -> list[list[int]]:
    return system.ask(command="generate", prompts=prompts(10, PROMPT_TOKENS), new_tokens=1)["tokens"]


def decode_rate(system: System, batch: int) -> float:
    """Tokens/s after the first ones."""
    ids = prompts(batch, PROMPT_TOKENS)
    first, all_of_them = (
        system.ask(command="generate", prompts=ids, new_tokens=count)["seconds"] for count in (1, 1 + NEW_TOKENS)
    )
    return batch * NEW_TOKENS / (all_of_them - first)


def prefill_rate(system: System) -> float:
    """Prompt tokens/s to the first token."""
    return 1024 / system.ask(command="generate", prompts=prompts(1, 1024), new_tokens=1)["seconds"]


def picture_s(system: System) -> float:
    """Seconds from a picture's file to the first token."""
    with tempfile.TemporaryDirectory() as folder:
        return system.ask(command="picture", text=TEXT, path=str(make_picture(Path(folder))))["seconds"]


def start_s(system: System) -> float:
    """Seconds from a process's start to its first token, files in the page cache."""
    worker = system.start()
    try:
        worker.ask(command="generate", prompts=prompts(1, PROMPT_TOKENS), new_tokens=1)
        return worker.age()
    finally:
        worker.close()


def rate_beside_busy(system: System) -> float:
    """Decoding beside a busy process on the last core, as a share of the rate without it."""
    quiet = decode_rate(system, 1)
    with busy_core(max(os.sched_getaffinity(0))):
        return decode_rate(system, 1) / quiet


@contextmanager
def busy_core(core: int) -> Iterator[None]:
    program = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        yield
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def make_picture(folder: Path) -> Path:
    """336 x 336 of noise."""
    pixels = torch.randint(0, 256, (336, 336, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    path = folder / "picture.png"
    Image.fromarray(pixels.numpy()).save(path)
    return path


CASES = {
    "decode 1": Case(lambda system: decode_rate(system, 1), "tok/s", "GB/s"),
    "decode 4": Case(lambda system: decode_rate(system, 4), "tok/s", "GB/s", batch=4),
    "decode 10": Case(lambda system: decode_rate(system, 10), "tok/s", "GB/s", batch=10),
    "prefill 1024": Case(prefill_rate, "tok/s", "GFLOP/s"),
    "picture": Case(picture_s, "s"),
    "busy": Case(rate_beside_busy, "of quiet", needs_warm_up=False),
    "start": Case(start_s, "s", needs_warm_up=False),
}
