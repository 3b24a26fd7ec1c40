"""Train the small Llama-3.2-Vision from the small LLaVA-NeXT: python examples/shapes/train_mllama.py --out FOLDER."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers.models.mllama import modeling_mllama

import model_llava_next as base
import model_mllama as m
from families import FAMILIES
from loop import Learner, Stage, run_stage
from mllama_rows import PREFIX, Canvases, make_canvases, make_rows
from packing import Rows, Tally, answer_loss, describe, segment_mask
from patches import (
    LABELS,
    PatchHeads,
    measure_patches,
    normalize,
    patch_loss,
    place_loss,
    word_directions,
    word_readers,
)
from questions import KINDS
from recipe import build_parser, init_run, say_saved

BASE = Path(__file__).parents[2] / "assets" / "llava_next-shapes"
FAMILY = FAMILIES["mllama"]
WEIGHTS = {
    **{"color": 1.5, "shape": 1.0, "count": 1.5, "size": 1.5, "side": 2.0, "level": 2.0, "exists": 1.0},
    **{"caption": 2.0, "list": 1.0, "where": 1.0, "either": 2.0, "left_of": 1.5, "above": 1.5},
}
BATCH_SIZE = 24
VISION = ("model.vision_model.", "model.multi_modal_projector.", "heads.")
RATES = dict.fromkeys(VISION, 1e-3) | {"model.": 1.6e-3, "lm_head.": 1.6e-3}
PATCHES = (m.TILE // m.PATCH) ** 2


def encode_pictures(
    learner: Learner, canvases: Canvases, picks: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States (B, 4, 1 + P, hidden) that the decoder looks at, first-layer features (B, 4, P, width), tiles (B, 4)."""
    model, vision = learner.model.model, learner.model.model.vision_model
    used = torch.arange(m.MAX_TILES) < torch.from_numpy(canvases.num_tiles[picks])[:, None]
    pixels = normalize(canvases.tiles[picks].reshape(-1, 3, m.TILE, m.TILE), base.MEAN, base.STD)
    pixels = pixels.view(len(picks), 1, m.MAX_TILES, 3, m.TILE, m.TILE) * used[:, None, :, None, None, None]
    ratio_ids = torch.from_numpy(canvases.ratio_ids[picks])[:, None]
    found = vision(pixels, ratio_ids, used[:, None].long()).last_hidden_state[:, 0]
    width = vision.hidden_size
    # transformers stacks the layers' outputs in a new last dim and flattens it into the width.
    inner = found[..., width:].unflatten(-1, (width, len(m.INDICES)))
    return model.multi_modal_projector(found), inner[:, :, 1:, :, 0], used


def find_logits(learner: Learner, rows: Rows, states: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """Logits (answers' tokens, vocabulary); every token from <|image|> on sees the picture."""
    model = learner.model.model
    sees = torch.arange(rows.ids.shape[1]) >= len(PREFIX) - 1
    tiles = (sees[None, :, None, None] & used[:, None, None]).float()
    mask, full_rows = modeling_mllama._prepare_cross_attention_mask(tiles, states.shape[2], states.dtype)
    hidden = model.language_model(
        inputs_embeds=model.language_model.embed_tokens(rows.ids),
        attention_mask=segment_mask(rows.segments),
        position_ids=rows.positions,
        cross_attention_states=states.flatten(1, 2),
        cross_attention_mask=mask,
        full_text_row_masked_out_mask=full_rows,
        use_cache=False,
    ).last_hidden_state
    return learner.model.lm_head(hidden[rows.asked])


def readers_of(learner: Learner) -> torch.Tensor:
    return word_readers(learner.model.model.language_model.embed_tokens.weight, m.WORD_IDS)


def pick_labels(canvases: Canvases, picks: np.ndarray, used: torch.Tensor) -> dict[str, torch.Tensor]:
    """Labels of the used tiles, (tiles, P)."""
    return {name: torch.from_numpy(getattr(canvases, name)[picks])[used] for name in (*LABELS, "places")}


def tile_loss(
    learner: Learner, canvases: Canvases, picks: np.ndarray, states: torch.Tensor, first: torch.Tensor, used
) -> torch.Tensor:
    """The patch loss of the used tiles, with places in the whole picture."""
    labels, features = pick_labels(canvases, picks, used), states[used][:, 1:]
    looks = patch_loss(learner.heads, readers_of(learner), features, first[used], labels)
    directions = word_directions(learner.model.model.language_model.embed_tokens.weight, m.WORD_IDS)
    return looks + 2 * place_loss(directions, features, labels | {"centers": labels["places"]})


def patches_loss(learner: Learner, canvases: Canvases, rng: np.random.Generator) -> torch.Tensor:
    picks = rng.choice(len(canvases), BATCH_SIZE, replace=False)
    return tile_loss(learner, canvases, picks, *encode_pictures(learner, canvases, picks))


def answers_loss(learner: Learner, canvases: Canvases, rng: np.random.Generator) -> torch.Tensor:
    picks = rng.choice(len(canvases), BATCH_SIZE, replace=False)
    rows = make_rows(canvases, picks, rng, WEIGHTS, second_turn=0.15)
    states, first, used = encode_pictures(learner, canvases, picks)
    loss = answer_loss(find_logits(learner, rows, states, used), rows)
    return loss + 0.3 * tile_loss(learner, canvases, picks, states, first, used)


@torch.no_grad()
def report_patches(learner: Learner, canvases: Canvases) -> str:
    picks = np.arange(len(canvases))
    states, _, used = encode_pictures(learner, canvases, picks)
    return measure_patches(readers_of(learner), states[used][:, 1:], pick_labels(canvases, picks, used))


@torch.no_grad()
def report_answers(learner: Learner, canvases: Canvases) -> str:
    """Teacher-forced exact answers; the mean is over the kinds that the family is asked."""
    rng, tally = np.random.default_rng(learner.seed), Tally()
    for begin in range(0, len(canvases), 50):
        picks = np.arange(begin, min(begin + 50, len(canvases)))
        rows = make_rows(canvases, picks, rng, WEIGHTS, second_turn=0.0)
        states, _, used = encode_pictures(learner, canvases, picks)
        tally.add(find_logits(learner, rows, states, used), rows)
    return describe(tally.shares(), [kind for kind in FAMILY.kinds if kind in KINDS])


def parse_args() -> argparse.Namespace:
    parser = build_parser(__doc__, pictures=8000, base=BASE)
    parser.add_argument("--steps", type=int, nargs=2, default=(300, 600), help="of the patch loss, and of answers")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    started = init_run(args)
    drawn = (FAMILY.mean_side, FAMILY.aspects)
    canvases, held_out = (make_canvases(args.seed + i, count, *drawn) for i, count in enumerate((args.pictures, 150)))
    print(f"{len(canvases)} pictures in {time.time() - started:.0f} s", flush=True)
    learner = Learner(m.build_model(args.base), PatchHeads(), args.seed, args.state)
    vision_rates = dict.fromkeys(VISION, 2e-3)
    patch_steps, answer_steps = args.steps
    loss_of, report = partial(patches_loss, learner, canvases), partial(report_patches, learner, held_out)
    run_stage(learner, Stage("A", patch_steps, 50, vision_rates, loss_of, report))
    loss_of, report = partial(answers_loss, learner, canvases), partial(report_answers, learner, held_out)
    run_stage(learner, Stage("B", answer_steps, 100, RATES, loss_of, report))
    m.save_checkpoint(learner.model, args.out)
    say_saved(args.out, started)


if __name__ == "__main__":
    main()
