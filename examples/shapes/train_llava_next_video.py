"""Train the small LLaVA-NeXT-Video from the small LLaVA-NeXT.

python examples/shapes/train_llava_next_video.py --out FOLDER

Every step takes clips and a few pictures, so that questions about pictures are not unlearned.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import model_llava_next as base
from clip_rows import Clips, make_clips, sample_clip_question
from clips import CLIP_KINDS
from llava_parts import decode_rows, run_tower
from loop import Learner, Stage, run_stage
from model_llava_next_video import FORM, FRAME_TOKENS, VIDEO, build_model, pool, save_checkpoint, shift
from packing import Rows, Segment, Tally, answer_loss, describe, draw_turns, insert_features, pack_rows
from patches import PatchHeads, normalize, patch_loss, pick_labels, place_loss, word_directions, word_readers
from questions import KINDS
from recipe import build_parser, init_run, say_saved
from rows import NEWLINE, WORD_IDS, Pictures, encode, make_batch, make_pictures
from stages import WEIGHTS as PICTURE_WEIGHTS

BASE = Path(__file__).parents[2] / "assets" / "llava_next-shapes"
WEIGHTS = {
    **{"direction": 3.0, "mover": 3.0, "moves": 3.0},
    **{"color": 0.5, "shape": 0.5, "count": 0.5, "size": 0.5, "exists": 0.5},
}
NUM_CLIPS, NUM_PICTURES = 16, 4  # in a step
ROW_LENGTH = 100  # tokens of a clip's row
VISION = ("model.vision_tower.", "model.multi_modal_projector.", "heads.")
RATES = dict.fromkeys(VISION, 8e-4) | {"model.": 1.2e-3, "lm_head.": 1.2e-3}
SHIFTED = {word: int(shift(torch.tensor(i))) for word, i in WORD_IDS.items()}


def make_clip_rows(
    clips: Clips, picks: np.ndarray, rng: np.random.Generator, weights: dict[str, float], second_turn: float = 0.15
) -> Rows:
    def draw_segment(row: int) -> Segment:
        ask = partial(sample_clip_question, clips.clips[picks[row]], rng, weights)
        return draw_turns(ask, encode, [base.USER], rng, second_turn)

    # The placeholder of a picture here: it becomes <video> below, since every id from there on moves up by one.
    prefix = [base.BOS, base.USER, *[base.IMAGE] * (clips.num_frames * FRAME_TOKENS)]
    rows = pack_rows([prefix] * len(picks), draw_segment, length=ROW_LENGTH, pad=base.PAD)
    ids = torch.where(rows.ids == base.IMAGE, VIDEO, shift(rows.ids))
    return replace(rows, ids=ids, targets=shift(rows.targets))


def clip_logits(learner: Learner, rows: Rows, features: torch.Tensor) -> torch.Tensor:
    """features (clips * frames, P, width) of the tower."""
    model = learner.model
    projected = model.model.multi_modal_projector(pool(features)).reshape(len(rows.ids), -1, features.shape[-1])
    embeds = insert_features(model.get_input_embeddings()(rows.ids), rows.ids == VIDEO, projected)
    return decode_rows(model, embeds, rows)


def clip_loss(learner: Learner, clips: Clips, rng: np.random.Generator) -> torch.Tensor:
    picks = rng.choice(len(clips), NUM_CLIPS, replace=False)
    rows, tile_ids = make_clip_rows(clips, picks, rng, WEIGHTS), clips.tile_ids(picks)
    features, first = run_tower(learner.model, normalize(clips.tiles[tile_ids], base.MEAN, base.STD))
    answers = answer_loss(clip_logits(learner, rows, features), rows)
    return answers + 0.3 * frame_loss(learner, clips, tile_ids, features, first)


def frame_loss(
    learner: Learner, clips: Clips, tile_ids: np.ndarray, features: torch.Tensor, first: torch.Tensor
) -> torch.Tensor:
    labels, embeddings = pick_labels(clips, tile_ids), learner.model.get_input_embeddings().weight
    projected = learner.model.model.multi_modal_projector(features)
    looks = patch_loss(learner.heads, word_readers(embeddings, SHIFTED), projected, first, labels)
    return looks + 2 * place_loss(word_directions(embeddings, SHIFTED), projected, labels)


def picture_logits(learner: Learner, pictures: Pictures, picks: np.ndarray, rng: np.random.Generator, turns: float):
    """Logits and rows of pictures with all their tiles."""
    model, batch = learner.model, make_batch(pictures, picks, rng, PICTURE_WEIGHTS, turns)
    features, _ = run_tower(model, normalize(pictures.tiles[batch.tile_ids], base.MEAN, base.STD))
    projected = torch.cat([model.model.multi_modal_projector(features).flatten(0, 1), model.model.image_newline[None]])
    places = batch.ids == base.IMAGE
    rows = torch.where(batch.patches == NEWLINE, len(projected) - 1, batch.patches)
    batch = replace(batch, ids=shift(batch.ids), targets=shift(batch.targets))
    embeds = torch.where(places[..., None], projected[rows], model.get_input_embeddings()(batch.ids))
    return decode_rows(model, embeds, batch), batch


def step_loss(learner: Learner, clips: Clips, pictures: Pictures, rng: np.random.Generator) -> torch.Tensor:
    picks = rng.choice(len(pictures.scenes), NUM_PICTURES, replace=False)
    return clip_loss(learner, clips, rng) + 0.3 * answer_loss(*picture_logits(learner, pictures, picks, rng, 0.15))


@torch.no_grad()
def report(learner: Learner, clips: Clips, pictures: Pictures) -> str:
    """Teacher-forced exact answers about held-out clips, then about held-out pictures."""
    rng, of_clips, of_pictures = np.random.default_rng(learner.seed), Tally(), Tally()
    for begin in range(0, len(clips), 50):
        picks = np.arange(begin, min(begin + 50, len(clips)))
        rows = make_clip_rows(clips, picks, rng, WEIGHTS, 0.0)
        tiles = normalize(clips.tiles[clips.tile_ids(picks)], base.MEAN, base.STD)
        of_clips.add(clip_logits(learner, rows, run_tower(learner.model, tiles)[0]), rows)
    of_pictures.add(*picture_logits(learner, pictures, np.arange(len(pictures.scenes)), rng, 0.0))
    return f"{describe(of_clips.shares(), CLIP_KINDS)}\n  pictures {describe(of_pictures.shares(), KINDS)}"


def parse_args() -> argparse.Namespace:
    parser = build_parser(__doc__, pictures=3000, base=BASE)
    parser.add_argument("--clips", type=int, default=8000)
    parser.add_argument("--steps", type=int, default=1200)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    started = init_run(args)
    clips, held_out = (make_clips(args.seed + i, count, FORM) for i, count in enumerate((args.clips, 150)))
    pictures, held_out_pictures = (make_pictures(args.seed + i, count) for i, count in enumerate((args.pictures, 100)))
    print(f"{len(clips)} clips, {len(pictures.scenes)} pictures in {time.time() - started:.0f} s", flush=True)
    learner = Learner(build_model(args.base), PatchHeads(), args.seed, args.state)
    loss_of, found = partial(step_loss, learner, clips, pictures), partial(report, learner, held_out, held_out_pictures)
    run_stage(learner, Stage("B", args.steps, 50, RATES, loss_of, found))
    save_checkpoint(learner.model, args.out)
    say_saved(args.out, started)


if __name__ == "__main__":
    main()
