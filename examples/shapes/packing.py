"""Many questions in one row: a picture followed by as many questions as fit.

A question sees the picture and itself only, and its positions go on from the picture's, so each is answered as if it
stood alone in the prompt.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from questions import TRAINING_KINDS, Question
from world import Scene

IGNORED = -100  # target where nothing is learned
PREFIX, PADDING = 0, -1  # segments; questions count from 1

# Kind of the segment's (first) question, its token ids, and the same ids with IGNORED outside the answers.
Segment = tuple[str, list[int], list[int]]


@dataclass
class Rows:
    """B rows of L tokens."""

    ids: torch.Tensor  # (B, L)
    segments: torch.Tensor  # (B, L) 0 picture, 1.. questions, -1 padding
    positions: torch.Tensor  # (B, L)
    targets: torch.Tensor  # (B, L) the next token where it belongs to an answer, else IGNORED
    weights: torch.Tensor  # (B, L) float32, of the targets: every answer weighs one, whatever its length
    kinds: list[list[str]]  # per row, kind of segment 1..

    @property
    def asked(self) -> torch.Tensor:
        return self.targets != IGNORED


def pack_rows(
    prefixes: Sequence[Sequence[int]], draw_segment: Callable[[int], Segment], *, length: int, pad: int
) -> Rows:
    """Row i is prefixes[i] (placeholders of the picture in it) and draw_segment(i) until one no longer fits."""
    shape = (len(prefixes), length)
    ids, segments = np.full(shape, pad), np.full(shape, PADDING)
    positions, targets = np.zeros(shape, np.int64), np.full(shape, IGNORED)
    kinds: list[list[str]] = []
    for row, prefix in enumerate(prefixes):
        start = end = len(prefix)
        ids[row, :end], segments[row, :end], positions[row, :end] = prefix, PREFIX, np.arange(end)
        kinds.append([])
        kind, new_ids, labels = draw_segment(row)
        while end + len(new_ids) <= length:
            span = slice(end, end + len(new_ids))
            kinds[-1].append(kind)
            ids[row, span], segments[row, span] = new_ids, len(kinds[-1])
            positions[row, span] = start + np.arange(len(new_ids))
            targets[row, end : end + len(new_ids) - 1] = labels[1:]
            end += len(new_ids)
            kind, new_ids, labels = draw_segment(row)
    tensors = (torch.from_numpy(a) for a in (ids, segments, positions, targets, find_weights(targets)))
    return Rows(*tensors, kinds)


def find_weights(targets: np.ndarray) -> np.ndarray:
    """(B, L) float32: one over the length of the answer (a run of targets) that each target belongs to, 0 elsewhere."""
    weights = np.zeros(targets.shape, np.float32)
    for row, answered in enumerate(targets != IGNORED):
        edges = np.flatnonzero(np.diff(answered.astype(np.int8), prepend=0, append=0))
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            weights[row, begin:end] = 1 / (end - begin)
    return weights


def segment_mask(segments: torch.Tensor) -> torch.Tensor:
    """(B, L) -> (B, 1, L, L) bool: True where a query (third dim) sees a key."""
    same = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == PREFIX)
    return (same & torch.ones(same.shape[1:], dtype=torch.bool).tril())[:, None]


def insert_features(embeds: torch.Tensor, places: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """embeds (B, L, hidden) with features (B, tokens, hidden) where `places` (B, L) is True, in order."""
    return embeds.masked_scatter(places[..., None], features)


def sample_question(scene: Scene, rng: np.random.Generator, weights: dict[str, float]) -> Question:
    """A question of a kind drawn by `weights` that the scene has a clear answer to."""
    names, probabilities = list(weights), np.array(list(weights.values()))
    while True:
        kind = names[int(rng.choice(len(names), p=probabilities / probabilities.sum()))]
        question = TRAINING_KINDS[kind](scene, rng)
        if question is not None:
            return question


def draw_turns(
    ask: Callable[[], Question],
    encode: Callable[[Question], tuple[list[int], list[int]]],
    between: list[int],
    rng: np.random.Generator,
    second_turn: float,
) -> Segment:
    """One turn, or two with probability `second_turn`; `encode` gives the ids and labels of a turn, `between` joins."""
    question = ask()
    ids, labels = encode(question)
    if rng.random() < second_turn:
        more_ids, more_labels = encode(ask())
        ids, labels = [*ids, *between, *more_ids], [*labels, *[IGNORED] * len(between), *more_labels]
    return question.kind, ids, labels


def answer_loss(logits: torch.Tensor, rows: Rows) -> torch.Tensor:
    """logits (answers' tokens, vocabulary), those at rows.asked in row order."""
    # A plain mean over tokens is mostly lists and captions, and the kinds of one word wait for them.
    shares = rows.weights[rows.asked]
    return (F.cross_entropy(logits, rows.targets[rows.asked], reduction="none") * shares).sum() / shares.sum()


class Tally:
    """Part of answers that are right in every token, per kind; equals greedy decoding as long as all are right."""

    def __init__(self) -> None:
        self.hits: dict[str, list[bool]] = defaultdict(list)

    def add(self, logits: torch.Tensor, rows: Rows) -> None:
        right = torch.ones(rows.targets.shape, dtype=torch.bool)
        right[rows.asked] = logits.argmax(-1) == rows.targets[rows.asked]
        for row, kinds in enumerate(rows.kinds):
            for i, kind in enumerate(kinds):
                self.hits[kind].append(bool(right[row][rows.segments[row] == i + 1].all()))

    def shares(self) -> dict[str, float]:
        return {kind: sum(found) / len(found) for kind, found in sorted(self.hits.items())}


def describe(shares: dict[str, float], counted: Sequence[str]) -> str:
    """One line for the log; the mean is over the kinds of `counted`."""
    mean = np.mean([value for kind, value in shares.items() if kind in counted])
    return f"held out: mean {mean:.3f} " + " ".join(f"{kind} {value:.2f}" for kind, value in shares.items())
