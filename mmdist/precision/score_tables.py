"""What answers are worth by a measure of their own: VQA's accuracy, a CLIP judge, recall; of one side or of both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from mmdist.config import UserError
from mmdist.precision import vqa
from mmdist.precision.answers import Answers, text_of
from mmdist.precision.judge import Judge, count_cut, fair_budget
from mmdist.precision.recall import recall

SHOWN_ITEMS = 10  # in the report for people; precision.json has all


@dataclass
class Figure:
    """values: by side. format: of a table's cell. held: ours may not be lower than the reference's by more than the
    threshold."""

    name: str
    words: str
    values: Mapping[str, float]
    format: str = "{:.4f}"
    held: bool = False


@dataclass
class ScoreTable:
    """items: of each question or picture (item says which), its score by side."""

    name: str
    title: str
    item: str
    figures: list[Figure]
    items: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """By how much the worst of ours is lower than the reference's; 0 where there is no reference or none is."""
        pairs = [figure.values for figure in self.figures if figure.held]
        return max(0.0, *(values["reference"] - values["ours"] for values in pairs if "reference" in values), 0.0)

    def to_json(self) -> dict[str, Any]:
        figures = {figure.name: dict(figure.values) for figure in self.figures}
        return {"title": self.title, "figures": figures, "notes": self.notes, "items": self.items}

    def markdown(self) -> str:
        sides = list(self.figures[0].values)
        lines = [f"## {self.title}", "", *(f"note: {note}\n" for note in self.notes)]
        lines += [f"| | {' | '.join(sides)} |", "|---" + "|---:" * len(sides) + "|"]
        for figure in self.figures:
            cells = (figure.format.format(figure.values[side]) for side in sides)
            lines.append(f"| {figure.words} | {' | '.join(cells)} |")
        return "\n".join([*lines, *self._worst_items()])

    def _worst_items(self) -> list[str]:
        """Those on which the sides differ most; of one side alone the lowest, if they are below 1."""
        sides = list(self.figures[0].values)
        if len(sides) > 1:
            badness = {name: max(values.values()) - min(values.values()) for name, values in self.items.items()}
        else:
            badness = {name: 1 - values[sides[0]] for name, values in self.items.items()}
        worst = sorted((name for name, value in badness.items() if value > 0), key=lambda name: -badness[name])
        if not worst:
            return []
        heading = f"{self.item}s on which the sides differ most" if len(sides) > 1 else f"{self.item}s of lowest score"
        lines = ["", f"| {heading} | {' | '.join(sides)} |", "|---" + "|---:" * len(sides) + "|"]
        for name in worst[:SHOWN_ITEMS]:
            lines.append(f"| {name} | {' | '.join(f'{self.items[name][side]:.4f}' for side in sides)} |")
        return [
            *lines,
            *([f"\n... and {len(worst) - SHOWN_ITEMS} more in precision.json"] * (len(worst) > SHOWN_ITEMS)),
        ]


def vqa_scores(questions: list[vqa.Question], sides: dict[str, Answers]) -> ScoreTable:
    """Answers by question id; failed ones are wrong."""
    closed_set = all("label" in line for side in sides.values() for line in side.lines.values() if "error" not in line)
    found = {
        name: vqa.score(questions, {key: text_or_nothing(line) for key, line in side.lines.items()}, closed_set)
        for name, side in sides.items()
    }
    how = "as VLMo counts it" if closed_set else "exact once normalised"
    figures = [
        Figure("accuracy", f"accuracy, {how}", {n: s.accuracy for n, s in found.items()}, held=True),
        Figure("soft_score", "soft VQA score", {n: s.soft_score for n, s in found.items()}, held=True),
        Figure("questions", "questions", {n: s.num_questions for n, s in found.items()}, "{:.0f}"),
    ]
    items = {q.id: {n: float(s.right[q.id]) for n, s in found.items()} for q in questions}
    return ScoreTable("vqa", "Questions answered", "question", figures + cost_figures(sides), items)


def text_or_nothing(line: dict[str, Any]) -> str:
    return "" if "error" in line else text_of(line)


def cost_figures(sides: dict[str, Answers]) -> list[Figure]:
    """Of the sides that were timed, which saved ones need not be."""
    timings = {n: [x["timing"] for x in s.lines.values() if "timing" in x] for n, s in sides.items()}
    if not all(timings.values()):
        return []
    cost = {n: vqa.cost_ms(t["seconds"] for t in timing) for n, timing in timings.items()}
    rate = {n: len(timing) / max(t["since_start_s"] for t in timing) for n, timing in timings.items()}
    rows = [Figure("questions_per_s", "questions/s, reading included", rate, "{:.2f}")]
    for key in ("mean", "median", "p99", "max"):
        rows.append(
            Figure(f"{key}_cost_ms", f"cost of a question, ms: {key}", {n: c[key] for n, c in cost.items()}, "{:.2f}")
        )
    return rows


def clip_scores(
    judge: Judge, pictures: Iterable[tuple[str, Image.Image]], sides: dict[str, Answers], known_budget: bool
) -> ScoreTable:
    """pictures: (id, picture). known_budget: the sides were allowed equally many tokens."""
    texts = {name: {key: text_of(line) for key, line in side.lines.items()} for name, side in sides.items()}
    listed = [list(by_id.values()) for by_id in texts.values()]
    budget = judge.max_tokens if known_budget else fair_budget(judge, listed)
    names: list[str] = []

    def pairs() -> Iterable[tuple[Image.Image, list[str]]]:
        for name, image in pictures:
            names.append(name)
            yield image, [by_id[name] for by_id in texts.values()]

    rows = list(judge.score(pairs(), budget))
    if not rows:
        raise UserError("no picture to judge")
    items = {name: dict(zip(texts, row, strict=True)) for name, row in zip(names, rows, strict=True)}
    means = dict(zip(texts, np.mean(rows, axis=0).tolist(), strict=True))
    cut = {name: count_cut(judge, side, budget) for name, side in zip(texts, listed, strict=True)}
    why = (
        "what the judge reads"
        if known_budget
        else "the longest of the side that writes least: how many each was allowed is not known"
    )
    figures = [
        Figure("mean_cosine", "mean cosine of picture and caption", means, held=True),
        Figure("captions", "captions", {name: len(rows) for name in texts}, "{:.0f}"),
        Figure("captions_cut", "captions cut", cut, "{:.0f}"),
    ]
    return ScoreTable(
        "clip",
        "CLIP score",
        "picture",
        figures,
        items,
        [f"captions of both sides are cut after {budget} tokens, {why}"],
    )


def recall_scores(logits: dict[str, np.ndarray], image_of_text: list[int]) -> ScoreTable:
    """logits: (images, texts) by side."""
    found = {name: recall(scores, image_of_text) for name, scores in logits.items()}
    figures = [
        Figure(
            f"recall_{kind}_at_{k}", f"{kind} found, recall@{k}", {n: f[kind][k] for n, f in found.items()}, held=True
        )
        for kind in ("texts", "images")
        for k in next(iter(found.values()))[kind]
    ]
    return ScoreTable("recall", "Retrieval", "picture", figures)
