"""The figures of a comparison: logit errors, agreement of tokens, the first divergence of each request, layers.

Both sides decode greedily what they think best, so their contexts are equal up to the first token that differs; logits
are compared up to that position, itself included.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from mmdist.engine.record import Record
from mmdist.precision.answers import Answers, Distribution, distribution, has_tokens, text_of, tokens_of

NEAR_TIE_NATS = 0.125
NEAR_TIE_RANK = 2
TEXTS = "texts only"  # a side is a file of other programs, without tokens
HEAD = "head"  # as a stage, what makes the logits of the first token
FIRST = ("vision.", "embeddings.")  # stages before all others, though a request without pictures has none


@dataclass
class Errors:
    """Differences of numbers, gathered: kind says of which (logits, log probabilities, or nothing to compare)."""

    kind: str = "tokens only"
    count: int = 0
    largest: float = 0.0
    sum_squares: float = 0.0
    kls: list[float] = field(default_factory=list)

    @property
    def rms(self) -> float:
        return (self.sum_squares / max(1, self.count)) ** 0.5

    def add(self, kind: str, difference: torch.Tensor, kl: float | None) -> None:
        self.kind = kind
        self.count += difference.numel()
        difference = difference.nan_to_num(torch.inf)  # a NaN is the largest error there is
        self.largest = max(self.largest, float(difference.abs().max()))
        self.sum_squares += float(difference.square().sum())
        self.kls += [] if kl is None else [kl]

    def join(self, other: Errors) -> None:
        if other.count:
            self.kind = other.kind
        self.count += other.count
        self.largest = max(self.largest, other.largest)
        self.sum_squares += other.sum_squares
        self.kls += other.kls


@dataclass
class Divergence:
    """Where two answers part. gap: nats by which a side prefers its own token, the larger of both sides'; rank: of
    the other's token, the worse of both; None where a side does not say. reference, ours: the likeliest tokens."""

    position: int
    near_tie: bool
    gap: float | None
    rank: int | None
    tokens: tuple[int | None, int | None]
    reference: list[dict[str, Any]]
    ours: list[dict[str, Any]]


@dataclass
class Compared:
    """One request. counted: tokens that the agreement is a share of; after a near tie there are none to count."""

    id: str
    reference_text: str
    text: str
    agreed: int
    counted: int
    errors: Errors
    divergence: Divergence | None


def compare_request(name: str, reference: Answers, ours: Answers) -> Compared:
    lines = reference.lines[name], ours.lines[name]
    if not all(map(has_tokens, lines)):
        return Compared(name, text_of(lines[0]), text_of(lines[1]), 0, 0, Errors(TEXTS), None)
    records = reference.record(name), ours.record(name)
    theirs, own = map(tokens_of, lines)
    agreed = count_equal(theirs, own)
    errors = Errors()
    for position in range(min(agreed + 1, len(theirs), len(own))):
        pair = [distribution(line, record, position) for line, record in zip(lines, records, strict=True)]
        if pair[0] is not None and pair[1] is not None:
            add_position(errors, pair[0], pair[1])
    divergence = None
    if theirs != own:
        divergence = find_divergence(agreed, theirs, own, lines, records)
    counted = agreed if divergence is None or divergence.near_tie else max(len(theirs), len(own))
    return Compared(name, text_of(lines[0]), text_of(lines[1]), agreed, counted, errors, divergence)


def count_equal(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def add_position(errors: Errors, reference: Distribution, ours: Distribution) -> None:
    if reference.ids is None and ours.ids is None:
        assert reference.logits is not None and ours.logits is not None
        check_width(reference.logits, ours.logits)
        errors.add("logits", ours.logits - reference.logits, kl(reference.values, ours.values))
        return
    shared = shared_ids(reference, ours)
    places = [[side.find(token_id) for token_id in shared] for side in (reference, ours)]
    if reference.logprobs is not None and ours.logprobs is not None:
        p, q = reference.logprobs[places[0]], ours.logprobs[places[1]]
        errors.add("log probabilities", q - p, kl(p, q))
    elif reference.logits is not None and ours.logits is not None:
        errors.add("logits of the best answers", ours.logits[places[1]] - reference.logits[places[0]], None)


def check_width(reference: torch.Tensor, ours: torch.Tensor) -> None:
    assert len(reference) == len(ours), f"{len(ours)} logits, the reference has {len(reference)}"


def shared_ids(reference: Distribution, ours: Distribution) -> list[int]:
    known = [set(side.ids.tolist()) for side in (reference, ours) if side.ids is not None]
    return sorted(set.intersection(*known))


def kl(reference: torch.Tensor, ours: torch.Tensor) -> float:
    """KL(reference || ours) of log probabilities, in nats; over some of the tokens alone, at most that.

    sum p (q/p - 1 - log(q/p)): where both sum to one this is sum p log(p/q), and no term is negative or takes small
    differences of large numbers.
    """
    d = ours - reference
    return float((reference.exp() * (d.expm1() - d)).sum().nan_to_num(torch.inf))


def find_divergence(
    position: int,
    theirs: list[int],
    own: list[int],
    lines: tuple[dict[str, Any], dict[str, Any]],
    records: tuple[Record | None, Record | None],
) -> Divergence:
    a, b = (tokens[position] if position < len(tokens) else None for tokens in (theirs, own))
    if a is None or b is None:  # one side stopped where the other went on
        return Divergence(position, False, None, None, (a, b), [], [])
    left, right = (distribution(line, record, position) for line, record in zip(lines, records, strict=True))
    tops = [side.top() if side is not None else [] for side in (left, right)]
    judged = judge(left, a, b), judge(right, b, a)
    if judged[0] is None or judged[1] is None:
        return Divergence(position, False, None, None, (a, b), *tops)
    gap, rank = max(judged[0][0], judged[1][0]), max(judged[0][1], judged[1][1])
    return Divergence(position, gap <= NEAR_TIE_NATS and rank <= NEAR_TIE_RANK, gap, rank, (a, b), *tops)


def judge(side: Distribution | None, own: int, other: int) -> tuple[float, int] | None:
    """(by how many nats a side prefers its own token to the other's, the rank of the other's); None: not known."""
    if side is None or (place := side.find(own)) is None or (others := side.find(other)) is None:
        return None
    values = side.values
    return float(values[place] - values[others]), 1 + int((values > values[others]).sum())


@dataclass
class LayerError:
    """error: RMS of the difference over the RMS of the reference, over all requests."""

    name: str
    error: float


def compare_layers(names: Iterable[str], reference: Answers, ours: Answers) -> list[LayerError]:
    """Stages that both sides recorded in the same shape, in the order of the computation; the head's logits last."""
    sums: dict[str, list[float]] = {}
    for name in names:
        records = reference.record(name), ours.record(name)
        if records[0] is None or records[1] is None:
            continue
        for stage, theirs, own in shared_stages(records[0], records[1]):
            total = sums.setdefault(stage, [0.0, 0.0])
            total[0] += float((own.double() - theirs.double()).square().sum())
            total[1] += float(theirs.double().square().sum())
    ordered = sorted(sums, key=lambda stage: (stage == HEAD, not stage.startswith(FIRST)))  # stable
    return [LayerError(stage, relative_error(*sums[stage])) for stage in ordered]


def relative_error(difference: float, reference: float) -> float:
    """Of sums of squares; a NaN is no small error."""
    error = (difference / reference if reference else difference) ** 0.5
    return error if error == error else float("inf")


def shared_stages(reference: Record, ours: Record) -> Iterable[tuple[str, torch.Tensor, torch.Tensor]]:
    theirs = reference.layers
    for stage, rows in ours.layers.items():
        if stage in theirs and theirs[stage].shape == rows.shape:
            yield stage, theirs[stage], rows
    if reference.logits is not None and ours.logits is not None:
        yield HEAD, reference.logits[:1], ours.logits[:1]


def find_drift(layers: list[LayerError], limit: float) -> str | None:
    """The first layer whose error is above the limit."""
    return next((layer.name for layer in layers if not layer.error <= limit), None)
