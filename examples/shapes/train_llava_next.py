"""Train the small LLaVA-NeXT on coloured shapes: python examples/shapes/train_llava_next.py --out FOLDER."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from transformers import LlavaNextForConditionalGeneration

from loop import Learner
from model_llava_next import build_config, save_checkpoint
from patches import PatchHeads
from rows import make_pictures
from stages import ROUNDS, run_round, run_stage_a


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pictures", type=int, default=20000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--state", type=Path, help="file that keeps the training state; goes on from it if it exists")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    started = time.time()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    pictures = make_pictures(args.seed, args.pictures)
    held_out = make_pictures(args.seed + 1, 150)
    print(f"{len(pictures.scenes)} pictures, {len(pictures.tiles)} tiles in {time.time() - started:.0f} s", flush=True)
    model = LlavaNextForConditionalGeneration(build_config()).float()
    learner = Learner(model, PatchHeads(), args.seed, args.state)
    run_stage_a(learner, pictures)
    for plan in ROUNDS:
        run_round(learner, pictures, held_out, plan)
    save_checkpoint(model, args.out)
    print(f"saved {args.out} after {(time.time() - started) / 60:.1f} min", flush=True)


if __name__ == "__main__":
    main()
