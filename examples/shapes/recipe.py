"""What the commands that train share: their arguments, their beginning and their last line."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch


def build_parser(description: str | None, *, pictures: int, base: Path | None = None) -> argparse.ArgumentParser:
    """pictures: how many are drawn; base: the checkpoint that training starts from, None for none."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of what is trained")
    if base is not None:
        parser.add_argument("--base", type=Path, default=base, help="the small LLaVA-NeXT to start from")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pictures", type=int, default=pictures)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--state", type=Path, help="file that keeps the training state; goes on from it if it exists")
    return parser


def init_run(args: argparse.Namespace) -> float:
    """Seed and threads; returns the time."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    return time.time()


def say_saved(folder: Path, started: float) -> None:
    print(f"saved {folder} after {(time.time() - started) / 60:.1f} min", flush=True)
