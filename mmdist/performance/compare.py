"""compare=OLD.json: what became faster or slower, point by point, and what else is not as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmdist.config import UserError
from mmdist.performance.results import SIZES, Result, differing, name_results, point_key
from mmdist.performance.tables import Point, highest, number, plain


@dataclass(frozen=True)
class Figure:
    field: str
    heading: str
    higher_is_better: bool = False

    def of(self, point: Point) -> float | None:
        value = point.get(self.field)
        return highest(value) if isinstance(value, list) else value

    def worse_by(self, old: float, new: float) -> float:
        """Share of the throughput that is lost, or by which a time or a size has grown."""
        return 1 - new / old if self.higher_is_better else new / old - 1


FIGURES = (
    Figure("output_throughput", "throughput/s", higher_is_better=True),
    Figure("median_ttft_ms", "TTFT ms"),
    Figure("median_tpot_ms", "TPOT ms"),
    Figure("peak_memory_gib", "peak GiB"),
)


@dataclass
class Pair:
    """The same job then and now."""

    label: str
    old: Result
    new: Result


@dataclass
class Comparison:
    """lines: of the table and of what differs; regressions: what is worse by more than is allowed."""

    lines: list[str]
    regressions: list[str]


def compare_results(new: Sequence[Result], path: Path, old: Sequence[Result], max_regression: float) -> Comparison:
    """UserError where no point of `old`, read from `path`, was measured again."""
    pairs = pair_up(new, old)
    again = [(pair, key, then, now) for pair in pairs for key, then, now in matches(pair)]
    if not any(now["duration"] for *_, now in again):
        raise UserError(f"compare={path}: no point in it was measured now; {describe_points(old, new)}")
    rows, regressions = [["", *(figure.heading for figure in FIGURES)]], []
    for pair, key, then, now in again:
        name = f"{pair.label} batch {key[0]}".strip()
        if now["duration"] is None:
            regressions.append(f"{name}: {now['status']}")
            continue
        cells = [compare_figure(figure, then, now) for figure in FIGURES]
        rows.append([name, *(text for text, _ in cells)])
        regressions += [
            f"{name}: {figure.heading} {text}, {share:.0%} worse"
            for figure, (text, share) in zip(FIGURES, cells, strict=True)
            if share > max_regression
        ]
    lines = [f"compared with {path}, then -> now:", *align(rows)]
    return Comparison([*lines, *(line for pair in pairs for line in differences(pair))], regressions)


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Names to the left, all else to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["   ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def compare_figure(figure: Figure, old: Point, new: Point) -> tuple[str, float]:
    """("43.1 -> 45.2 x1.05", by how much it is worse)."""
    then, now = figure.of(old), figure.of(new)
    if not then or not now:
        return "-", 0.0
    return f"{number(then)} -> {number(now)} x{now / then:.2f}", figure.worse_by(then, now)


def pair_up(new: Sequence[Result], old: Sequence[Result]) -> list[Pair]:
    """A job alone with a job alone, whatever their settings; those of a sweep by what the sweep changes."""
    if len(new) == len(old) == 1:
        return [Pair("", old[0], new[0])]
    pairs = []
    for label, result in zip(name_results(new), new, strict=True):
        same = [other for other in old if is_same_job(result, other)]
        pairs += [Pair(label, same[0], result)] if len(same) == 1 else []
    return pairs


def is_same_job(new: Result, old: Result) -> bool:
    """By the sweep's keys where both have them, else by all settings."""
    if new.overrides and old.overrides:
        return new.overrides == old.overrides
    names = ("model", "world_size", "quant", "dtype", "overrides")
    return bool(new.config) and all(new.config[name] == old.config.get(name) for name in names)


def matches(pair: Pair) -> list[tuple[tuple, Point, Point]]:
    """(key, then, now) of the points that were measured then and are there now."""
    now = {point_key(point): point for point in pair.new.points}
    return [(key, then, now[key]) for then in pair.old.measured if (key := point_key(then)) in now]


def differences(pair: Pair) -> list[str]:
    """Of config and machine; and the points that have no counterpart."""
    about = [{**result.config, **(result.content.get("machine") or {})} for result in (pair.old, pair.new)]
    changed = differing(about, but=("date",))
    lines = [f"differs: {name}: {plain(about[0].get(name))} -> {plain(about[1].get(name))}" for name in changed]
    old, new = ([point_key(point) for point in result.measured] for result in (pair.old, pair.new))
    lines += [f"not measured now: {describe_key(key)}" for key in old if key not in new]
    lines += [f"not measured then: {describe_key(key)}" for key in new if key not in old]
    return [f"{pair.label} {line}".strip() for line in lines]


def describe_key(key: tuple) -> str:
    return ", ".join(f"{words} {value}" for words, value in zip(SIZES.values(), key, strict=True) if value)


def describe_points(old: Sequence[Result], new: Sequence[Result]) -> str:
    then, now = (
        "; ".join(
            dict.fromkeys(
                describe_key(point_key(point)) for result in results for point in result.measured
            )
        )
        for results in (old, new)
    )  # fmt: skip
    return f"then ({then or 'nothing'}), now ({now or 'nothing'})"
