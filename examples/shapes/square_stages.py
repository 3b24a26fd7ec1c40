"""The two stages of training for a model that sees one square tile a picture.

A `Trainee` says what differs between families: how tiles become features, how packed rows become logits, and how a
question becomes token ids. Stage A teaches the vision tower what a patch shows, the later ones answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from loop import Learner, Stage, run_stage
from packing import Rows, Segment, Tally, answer_loss, describe, draw_turns, pack_rows, sample_question
from patches import measure_patches, normalize, patch_loss, pick_labels, place_loss
from questions import Question
from squares import Squares


@dataclass(frozen=True)
class Trainee:
    """`learner` and the functions that read its model.

    encode_tiles: normalized tiles (B, 3, tile, tile) -> features (B, P, hidden) and first-layer features (B, P, width)
    find_logits: rows and the features of their pictures -> logits (answers' tokens, vocabulary), those at rows.asked
    find_readers: -> (14, hidden) rows that read the looks off the features (patches.word_readers, or a training head)
    find_directions: -> (2, hidden) rows for patches.place_loss
    encode: token ids of one turn, and the same with packing.IGNORED outside the answer
    """

    learner: Learner
    mean: list[float]
    std: list[float]
    encode_tiles: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    find_logits: Callable[[Rows, torch.Tensor], torch.Tensor]
    find_readers: Callable[[], torch.Tensor]
    find_directions: Callable[[], torch.Tensor]
    encode: Callable[[Question], tuple[list[int], list[int]]]
    prefix: list[int]  # the prompt up to the question, with placeholders of the picture
    between: list[int]  # what opens a second turn
    pad: int
    row_length: int  # tokens


@dataclass(frozen=True)
class Round:
    """A piece of the training on answers; the cosine would end at `horizon`. `rates` as for loop.Stage."""

    name: str
    steps: int
    horizon: int
    rates: dict[str, float]
    weights: dict[str, float]  # of the kinds
    warmup: int = 50
    batch_size: int = 32
    patch_share: float = 0.3  # of the patch loss


def make_rows(
    trainee: Trainee, squares: Squares, picks: np.ndarray, rng: np.random.Generator, weights: dict[str, float],
    second_turn: float = 0.15,
) -> Rows:  # fmt: skip
    def draw_segment(row: int) -> Segment:
        ask = partial(sample_question, squares.scenes[picks[row]], rng, weights)
        return draw_turns(ask, trainee.encode, trainee.between, rng, second_turn)

    return pack_rows([trainee.prefix] * len(picks), draw_segment, length=trainee.row_length, pad=trainee.pad)


def look(trainee: Trainee, squares: Squares, picks: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return trainee.encode_tiles(normalize(squares.tiles[picks], trainee.mean, trainee.std))


def tile_loss(
    trainee: Trainee, squares: Squares, picks: np.ndarray, features: torch.Tensor, first: torch.Tensor
) -> torch.Tensor:
    """The patch loss, places included: every tile shows the whole picture."""
    labels = pick_labels(squares, picks)
    looks = patch_loss(trainee.learner.heads, trainee.find_readers(), features, first, labels)
    return looks + 2 * place_loss(trainee.find_directions(), features, labels)


def run_patch_stage(
    trainee: Trainee, squares: Squares, steps: int, rates: dict[str, float], *, batch_size: int = 64
) -> None:
    """Stage A: what `rates` names learns on the patch loss alone."""

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        picks = rng.choice(len(squares), batch_size, replace=False)
        return tile_loss(trainee, squares, picks, *look(trainee, squares, picks))

    run_stage(trainee.learner, Stage("A", steps, 50, rates, loss_of, partial(report_patches, trainee, squares)))


@torch.no_grad()
def report_patches(trainee: Trainee, squares: Squares) -> str:
    picks = np.arange(min(300, len(squares)))
    return measure_patches(trainee.find_readers(), look(trainee, squares, picks)[0], pick_labels(squares, picks))


def run_answer_stage(trainee: Trainee, squares: Squares, held_out: Squares, plan: Round) -> None:
    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        picks = rng.choice(len(squares), plan.batch_size, replace=False)
        rows = make_rows(trainee, squares, picks, rng, plan.weights)
        features, first = look(trainee, squares, picks)
        loss = answer_loss(trainee.find_logits(rows, features), rows)
        return loss + plan.patch_share * tile_loss(trainee, squares, picks, features, first)

    report = partial(report_answers, trainee, held_out, plan.weights)
    run_stage(trainee.learner, Stage(plan.name, plan.steps, plan.warmup, plan.rates, loss_of, report, plan.horizon))


@torch.no_grad()
def report_answers(trainee: Trainee, held_out: Squares, weights: dict[str, float]) -> str:
    """Teacher-forced exact answers; the mean is over all kinds but the helpers of training."""
    rng, tally = np.random.default_rng(trainee.learner.seed), Tally()
    for begin in range(0, len(held_out), 50):
        picks = np.arange(begin, min(begin + 50, len(held_out)))
        rows = make_rows(trainee, held_out, picks, rng, weights, second_turn=0.0)
        tally.add(trainee.find_logits(rows, look(trainee, held_out, picks)[0]), rows)
    return describe(tally.shares(), [kind for kind in weights if kind not in ("where", "either")])
