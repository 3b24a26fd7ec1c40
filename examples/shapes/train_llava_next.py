"""Train the small LLaVA-NeXT on coloured shapes: python examples/shapes/train_llava_next.py --out FOLDER."""

from __future__ import annotations

import time

from transformers import LlavaNextForConditionalGeneration

from loop import Learner
from model_llava_next import build_config, save_checkpoint
from patches import PatchHeads
from recipe import build_parser, init_run, say_saved
from rows import make_pictures
from stages import ROUNDS, run_round, run_stage_a


def main() -> None:
    args = build_parser(__doc__, pictures=20000).parse_args()
    started = init_run(args)
    pictures = make_pictures(args.seed, args.pictures)
    held_out = make_pictures(args.seed + 1, 150)
    print(f"{len(pictures.scenes)} pictures, {len(pictures.tiles)} tiles in {time.time() - started:.0f} s", flush=True)
    model = LlavaNextForConditionalGeneration(build_config()).float()
    learner = Learner(model, PatchHeads(), args.seed, args.state)
    run_stage_a(learner, pictures)
    for plan in ROUNDS:
        run_round(learner, pictures, held_out, plan)
    save_checkpoint(model, args.out)
    say_saved(args.out, started)


if __name__ == "__main__":
    main()
