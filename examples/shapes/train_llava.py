"""Train the small LLaVA-1.5 from the small LLaVA-NeXT: python examples/shapes/train_llava.py --out FOLDER."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

import model_llava_next as base
from llava_parts import decode_rows, encode_tiles
from loop import Learner
from model_llava import FORM, build_model, save_checkpoint
from packing import Rows, insert_features
from patches import PatchHeads, word_directions, word_readers
from recipe import build_parser, init_run, say_saved
from rows import WORD_IDS, encode
from square_stages import Round, Trainee, run_answer_stage, run_patch_stage
from squares import make_squares
from stages import WEIGHTS

BASE = Path(__file__).parents[2] / "assets" / "llava_next-shapes"
VISION = ("model.vision_tower.", "model.multi_modal_projector.", "heads.")
RATES = dict.fromkeys(VISION, 5e-4) | {"model.": 1e-3, "lm_head.": 1e-3}
WEIGHTS_LLAVA = WEIGHTS | {"either": 2.0, "left_of": 3.0, "above": 3.0}
ROUND = Round("B", 400, 400, RATES, WEIGHTS_LLAVA)


def build_trainee(learner: Learner) -> Trainee:
    model: LlavaForConditionalGeneration = learner.model

    def find_logits(rows: Rows, features: torch.Tensor) -> torch.Tensor:
        embeds = model.get_input_embeddings()(rows.ids)
        return decode_rows(model, insert_features(embeds, rows.ids == base.IMAGE, features), rows)

    return Trainee(
        learner=learner,
        mean=base.MEAN,
        std=base.STD,
        encode_tiles=lambda tiles: encode_tiles(model, tiles),
        find_logits=find_logits,
        find_readers=lambda: word_readers(model.get_input_embeddings().weight, WORD_IDS),
        find_directions=lambda: word_directions(model.get_input_embeddings().weight, WORD_IDS),
        encode=encode,
        prefix=[base.BOS, base.USER, *[base.IMAGE] * FORM.num_patches],
        between=[base.USER],
        pad=base.PAD,
        row_length=2 + FORM.num_patches + 98,
    )


def main() -> None:
    args = build_parser(__doc__, pictures=8000, base=BASE).parse_args()
    started = init_run(args)
    squares = make_squares(args.seed, args.pictures, FORM)
    held_out = make_squares(args.seed + 1, 150, FORM)
    print(f"{len(squares)} pictures in {time.time() - started:.0f} s", flush=True)
    trainee = build_trainee(Learner(build_model(args.base), PatchHeads(), args.seed, args.state))
    run_patch_stage(trainee, squares, 100, dict.fromkeys(VISION, 1e-3))
    run_answer_stage(trainee, squares, held_out, ROUND)
    save_checkpoint(trainee.learner.model, args.out)
    say_saved(args.out, started)


if __name__ == "__main__":
    main()
