"""The two training stages and their losses.

Stage A teaches the vision tower and the projector what a patch shows, in the language of the word embeddings. Stage B
trains everything on answers and keeps the patch loss as a small helper. Colours come within a hundred steps; shapes
need the occupancy loss on the first layer, without which whatever asks for a shape stays at chance for very long.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import LlavaNextForConditionalGeneration

import model_llava_next as m
from llava_parts import decode_rows, encode_tiles
from loop import Learner, Stage, run_stage
from packing import Tally, answer_loss, describe
from patches import (
    measure_patches,
    normalize,
    patch_loss,
    pick_labels,
    place_loss,
    word_directions,
    word_readers,
)
from questions import KINDS
from rows import NEWLINE, WORD_IDS, Batch, Pictures, make_batch

WEIGHTS = {
    "color": 1.5,
    "shape": 1.0,
    "count": 1.5,
    "size": 1.5,
    "side": 2.0,
    "level": 2.0,
    "left_of": 2.0,
    "above": 2.0,
    "exists": 1.0,
    "caption": 2.0,
    "list": 1.5,
    "where": 1.0,
}
BATCH_SIZE = 32


def tile_loss(
    learner: Learner,
    projected: torch.Tensor,
    first: torch.Tensor,
    pictures: Pictures,
    tile_ids: np.ndarray,
    *,
    places: bool = False,
) -> torch.Tensor:
    """The patch loss of some tiles, with places in the base tiles among them if asked."""
    labels = pick_labels(pictures, tile_ids)
    embeddings = learner.model.get_input_embeddings().weight
    loss = patch_loss(learner.heads, word_readers(embeddings, WORD_IDS), projected, first, labels)
    if places:
        base = torch.from_numpy(np.isin(tile_ids, pictures.starts))
        of_base = {name: values[base] for name, values in labels.items()}
        loss = loss + 2 * place_loss(word_directions(embeddings, WORD_IDS), projected[base], of_base)
    return loss


def answer_logits(model: LlavaNextForConditionalGeneration, batch: Batch, projected: torch.Tensor) -> torch.Tensor:
    """Logits (answers' tokens, vocabulary) over the whole batch in row order."""
    features = torch.cat([projected.flatten(0, 1), model.model.image_newline[None]])
    rows = torch.where(batch.patches == NEWLINE, len(features) - 1, batch.patches)
    embeds = model.get_input_embeddings()(batch.ids)
    embeds = torch.where((batch.ids == m.IMAGE)[..., None], features[rows], embeds)
    return decode_rows(model, embeds, batch)


@torch.no_grad()
def measure(model: LlavaNextForConditionalGeneration, pictures: Pictures, seed: int) -> dict[str, float]:
    rng, tally = np.random.default_rng(seed), Tally()
    for first in range(0, len(pictures.scenes), 50):
        picks = np.arange(first, min(first + 50, len(pictures.scenes)))
        batch = make_batch(pictures, picks, rng, ROUNDS[-1].weights, second_turn=0.0)
        projected, _ = encode_tiles(model, normalize(pictures.tiles[batch.tile_ids], m.MEAN, m.STD))
        tally.add(answer_logits(model, batch, projected), batch)
    return tally.shares()


def run_stage_a(learner: Learner, pictures: Pictures, steps: int = 1000) -> None:
    """Vision, projector and word embeddings on the patch loss: 64 base tiles and 64 tiles with an object a step."""
    model = learner.model
    is_base = np.zeros(len(pictures.tiles), bool)
    is_base[pictures.starts[:-1]] = True
    filled = np.flatnonzero(~is_base & (pictures.coverage.max(1) > 0.3))

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        tile_ids = np.concatenate([rng.choice(pictures.starts[:-1], 64), rng.choice(filled, 64)])
        projected, first = encode_tiles(model, normalize(pictures.tiles[tile_ids], m.MEAN, m.STD))
        return tile_loss(learner, projected, first, pictures, tile_ids)

    parts = ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.embed_tokens.", "heads.")
    run_stage(
        learner, Stage("A", steps, 50, dict.fromkeys(parts, 2e-3), loss_of, partial(report_patches, model, pictures))
    )


@torch.no_grad()
def report_patches(model: LlavaNextForConditionalGeneration, pictures: Pictures) -> str:
    """Accuracy on the first tiles."""
    tile_ids = np.arange(500)
    projected, _ = encode_tiles(model, normalize(pictures.tiles[tile_ids], m.MEAN, m.STD))
    readers = word_readers(model.get_input_embeddings().weight, WORD_IDS)
    return measure_patches(readers, projected, pick_labels(pictures, tile_ids))


@dataclass(frozen=True)
class Round:
    """A piece of the training on answers; the cosine would end at `horizon`. Each starts from a new peak rate."""

    name: str
    steps: int
    horizon: int
    rate: float
    vision_rate: float
    weights: dict[str, float]
    places: bool = True


# The skills come one after another, each out of a plateau: looks and counts in B, places and left or right in C,
# the yes/no relations last. C and D go up to a high rate again, since a low one does not leave a plateau.
ROUNDS = (
    Round("B", 1800, 2400, 2e-3, 8e-4, WEIGHTS, places=False),
    Round("C", 600, 1000, 1.6e-3, 4e-4, WEIGHTS | {"either": 5.0, "left_of": 4.0, "above": 4.0}),
    Round("D", 800, 1000, 1.3e-3, 3e-4, WEIGHTS | {"either": 3.0, "left_of": 5.0, "above": 5.0}),
)


def run_round(learner: Learner, pictures: Pictures, held_out: Pictures, plan: Round) -> None:
    """Everything on answers; vision, projector and heads at a lower rate than the language model."""
    slow = ("model.vision_tower.", "model.multi_modal_projector.", "heads.")
    rates = dict.fromkeys(slow, plan.vision_rate) | {"model.": plan.rate, "lm_head.": plan.rate}
    loss_of = partial(picture_loss, learner, pictures, plan.weights, places=plan.places)
    report = partial(report_answers, learner, held_out)
    warmup = 100 if plan.name == "B" else 50
    run_stage(learner, Stage(plan.name, plan.steps, warmup, rates, loss_of, report, plan.horizon))


def picture_loss(
    learner: Learner, pictures: Pictures, weights: dict[str, float], rng: np.random.Generator, *, places: bool
) -> torch.Tensor:
    """Answers of BATCH_SIZE pictures, and 0.3 of the patch loss of their tiles."""
    picks = rng.choice(len(pictures.scenes), BATCH_SIZE, replace=False)
    batch = make_batch(pictures, picks, rng, weights)
    projected, first = encode_tiles(learner.model, normalize(pictures.tiles[batch.tile_ids], m.MEAN, m.STD))
    answers = answer_loss(answer_logits(learner.model, batch, projected), batch)
    return answers + 0.3 * tile_loss(learner, projected, first, pictures, batch.tile_ids, places=places)


def report_answers(learner: Learner, held_out: Pictures) -> str:
    return describe(measure(learner.model, held_out, seed=learner.seed), tuple(KINDS))
