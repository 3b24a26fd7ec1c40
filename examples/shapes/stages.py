"""The two training stages and their losses.

Stage A teaches the vision tower and the projector what a patch shows, in the language of the word embeddings. Stage B
trains everything on answers and keeps the patch loss as a small helper. Colours come within a hundred steps; shapes
need the occupancy loss on the first layer, without which whatever asks for a shape stays at chance for very long.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlavaNextForConditionalGeneration

import model_llava_next as m
from loop import Learner, Stage, run_stage
from questions import KINDS
from rows import NEWLINE, WORD_IDS, Batch, Pictures, make_batch
from world import COLORS, SHAPES, SIZES

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
LOOKS = (COLORS, SHAPES, SIZES)
LOOK_WEIGHTS = (1.0, 2.0, 1.0)
ENDS = (("left", "right"), ("top", "bottom"))
ENDS_SLOPE = 8.0  # logits from one side of the picture to the other


class PatchHeads(nn.Module):
    """Training-only readers of the features: object here, middle here, place of the middle, cells of the patch."""

    def __init__(self, hidden_size: int = 128):
        super().__init__()
        self.place = nn.Linear(hidden_size, 4)
        self.cells = nn.Linear(hidden_size, 49)


def normalize(tiles: np.ndarray) -> torch.Tensor:
    """(tiles, 3, 56, 56) uint8 -> float32 as the image processor does it."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (m.MEAN, m.STD))
    return (torch.from_numpy(tiles).float() / 255 - mean) / std


def encode_tiles(model: LlavaNextForConditionalGeneration, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(tiles, 3, 56, 56) -> projected features and first-layer features, both (tiles, 16, hidden)."""
    tower = model.model.vision_tower
    x = tower.pre_layrnorm(tower.embeddings(tiles))
    first = None
    for layer in tower.encoder.layers[:-1]:  # vision_feature_layer is -2: the last layer is never used
        x = layer(x, None)
        first = x if first is None else first
    return model.model.multi_modal_projector(x[:, 1:]), first[:, 1:]


def patch_loss(
    learner: Learner,
    projected: torch.Tensor,
    first: torch.Tensor,
    pictures: Pictures,
    tile_ids: np.ndarray,
    *,
    places: bool = False,
) -> torch.Tensor:
    """What do the patches show? Looks are read with the words' own embeddings, which ties picture to text."""
    names = ("owner", "coverage", "occupancy", "looks", "centers")
    owner, coverage, occupancy, looks, centers = (torch.from_numpy(getattr(pictures, n)[tile_ids]) for n in names)
    seen = coverage > 0.15
    embeddings = learner.model.get_input_embeddings().weight
    loss = projected.new_zeros(())
    for i, (words, weight) in enumerate(zip(LOOKS, LOOK_WEIGHTS, strict=True)):
        rows = embeddings[[WORD_IDS[word] for word in words]]
        loss = loss + weight * F.cross_entropy(projected[seen] @ rows.T, looks[..., i][seen].long())
    place = learner.heads.place(projected)
    cell = torch.stack([torch.arange(16) % m.SIDE, torch.arange(16) // m.SIDE], -1)
    here = ((centers * m.SIDE).floor() == cell).all(-1) & (owner > 0)
    loss = loss + F.binary_cross_entropy_with_logits(place[..., 0], (coverage > 0.3).float())
    loss = loss + 2 * F.binary_cross_entropy_with_logits(place[..., 1], here.float())
    loss = loss + 4 * F.smooth_l1_loss(place[..., 2:][seen], centers[seen], beta=0.1)
    if places:
        base = seen & torch.from_numpy(np.isin(tile_ids, pictures.starts))[:, None]
        loss = loss + 2 * place_loss(embeddings, projected[base], centers[base])
    return loss + 3 * F.binary_cross_entropy_with_logits(learner.heads.cells(first), occupancy.float())


def place_loss(embeddings: torch.Tensor, features: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """How far left, and how far up, is the patch's object in the base tile, read with the words' own embeddings?

    Without it the features hold places faintly: yes/no relations were still at chance after 1800 steps of stage B.
    """
    loss = features.new_zeros(())
    for axis, (low, high) in enumerate(ENDS):
        direction = embeddings[WORD_IDS[low]] - embeddings[WORD_IDS[high]]
        target = torch.sigmoid(ENDS_SLOPE * (0.5 - centers[:, axis]))
        loss = loss + F.binary_cross_entropy_with_logits(features @ direction, target)
    return loss


def answer_logits(
    model: LlavaNextForConditionalGeneration, batch: Batch, projected: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (answers' tokens, vocabulary) and their targets, over the whole batch in row order."""
    features = torch.cat([projected.flatten(0, 1), model.model.image_newline[None]])
    rows = torch.where(batch.patches == NEWLINE, len(features) - 1, batch.patches)
    embeds = model.get_input_embeddings()(batch.ids)
    embeds = torch.where((batch.ids == m.IMAGE)[..., None], features[rows], embeds)
    seg = batch.segments
    same = (seg[:, :, None] == seg[:, None, :]) | (seg[:, None, :] == 0)
    mask = (same & torch.ones(same.shape[1:], dtype=torch.bool).tril())[:, None]
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    asked = batch.targets != -100
    return model.lm_head(hidden[asked]), batch.targets[asked]


@torch.no_grad()
def measure(model: LlavaNextForConditionalGeneration, pictures: Pictures, seed: int) -> dict[str, float]:
    """Part of answers that are right in every token, per kind; equals greedy decoding as long as all are right."""
    rng, hits = np.random.default_rng(seed), defaultdict(list)
    for first in range(0, len(pictures.scenes), 50):
        picks = np.arange(first, min(first + 50, len(pictures.scenes)))
        batch = make_batch(pictures, picks, rng, ROUNDS[-1].weights, second_turn=0.0)
        projected, _ = encode_tiles(model, normalize(pictures.tiles[batch.tile_ids]))
        logits, targets = answer_logits(model, batch, projected)
        right = torch.ones(batch.targets.shape, dtype=torch.bool)
        right[batch.targets != -100] = logits.argmax(-1) == targets
        for row, kinds in enumerate(batch.kinds):
            for i, kind in enumerate(kinds):
                hits[kind].append(bool(right[row][batch.segments[row] == i + 1].all()))
    return {kind: sum(found) / len(found) for kind, found in sorted(hits.items())}


def run_stage_a(learner: Learner, pictures: Pictures, steps: int = 1000) -> None:
    """Vision, projector and word embeddings on the patch loss: 64 base tiles and 64 tiles with an object a step."""
    model = learner.model
    is_base = np.zeros(len(pictures.tiles), bool)
    is_base[pictures.starts[:-1]] = True
    filled = np.flatnonzero(~is_base & (pictures.coverage.max(1) > 0.3))

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        tile_ids = np.concatenate([rng.choice(pictures.starts[:-1], 64), rng.choice(filled, 64)])
        projected, first = encode_tiles(model, normalize(pictures.tiles[tile_ids]))
        return patch_loss(learner, projected, first, pictures, tile_ids)

    parts = ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.embed_tokens.", "heads.")
    run_stage(
        learner, Stage("A", steps, 50, dict.fromkeys(parts, 2e-3), loss_of, partial(measure_patches, model, pictures))
    )


@torch.no_grad()
def measure_patches(model: LlavaNextForConditionalGeneration, pictures: Pictures) -> str:
    """Accuracy of colour, shape and size on well covered patches of the first tiles."""
    projected, _ = encode_tiles(model, normalize(pictures.tiles[:500]))
    seen = torch.from_numpy(pictures.coverage[:500] > 0.3)
    looks = torch.from_numpy(pictures.looks[:500]).long()[seen]
    found = []
    for i, words in enumerate(LOOKS):
        rows = model.get_input_embeddings().weight[[WORD_IDS[word] for word in words]]
        found.append(((projected[seen] @ rows.T).argmax(-1) == looks[:, i]).float().mean().item())
    return "patches: color {:.3f} shape {:.3f} size {:.3f}".format(*found)


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
    loss_of = partial(answer_loss, learner, pictures, plan.weights, places=plan.places)
    report = partial(report_answers, learner, held_out)
    warmup = 100 if plan.name == "B" else 50
    run_stage(learner, Stage(plan.name, plan.steps, warmup, rates, loss_of, report, plan.horizon))


def answer_loss(
    learner: Learner, pictures: Pictures, weights: dict[str, float], rng: np.random.Generator, *, places: bool
) -> torch.Tensor:
    """Answers of BATCH_SIZE pictures, and 0.3 of the patch loss of their tiles."""
    picks = rng.choice(len(pictures.scenes), BATCH_SIZE, replace=False)
    batch = make_batch(pictures, picks, rng, weights)
    projected, first = encode_tiles(learner.model, normalize(pictures.tiles[batch.tile_ids]))
    logits, targets = answer_logits(learner.model, batch, projected)
    # A plain mean over tokens is mostly lists and captions, and the kinds of one word wait for them.
    shares = batch.weights[batch.targets != -100]
    answers = (F.cross_entropy(logits, targets, reduction="none") * shares).sum() / shares.sum()
    patches = patch_loss(learner, projected, first, pictures, batch.tile_ids, places=places)
    return answers + 0.3 * patches


def report_answers(learner: Learner, held_out: Pictures) -> str:
    found = measure(learner.model, held_out, seed=learner.seed)
    mean = np.mean([value for kind, value in found.items() if kind in KINDS])
    return f"held out: mean {mean:.3f} " + " ".join(f"{kind} {value:.2f}" for kind, value in found.items())
