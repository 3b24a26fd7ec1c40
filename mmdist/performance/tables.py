"""The tables of a report, ready to be shown: every cell a text, `-` where nothing was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mmdist.performance.results import SIZES, Result, differing, shorten_values

Point = dict[str, Any]
Column = tuple[str, Callable[[Point], str]]  # its heading, and what it shows of a point
NOTHING = "-"


@dataclass
class Table:
    title: str
    heads: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        cells = [self.heads, ["---"] * len(self.heads), *self.rows]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
        return "\n".join([f"## {self.title}", "", *lines, *(["", self.note] if self.note else [])])


def number(value: Any, digits: int = 3) -> str:
    """So many digits that count, never an exponent."""
    if value is None:
        return NOTHING
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:#.{digits}g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.{0 if share >= 0.0095 or not share else 1}f} %"


def highest(values: Iterable[float | None] | None) -> float | None:
    return max((value for value in values or () if value is not None), default=None)


def field(name: str) -> Callable[[Point], str]:
    return lambda point: number(point.get(name))


def with_spread(name: str) -> Callable[[Point], str]:
    """43.1 (41.0 – 44.8)"""

    def show(point: Point) -> str:
        low, high = (point.get("spread") or {}).get(name) or (None, None)
        return number(point.get(name)) + ("" if low == high else f" ({number(low)} – {number(high)})")

    return show


def latency(name: str) -> Callable[[Point], str]:
    """median / p99"""

    def show(point: Point) -> str:
        values = [point.get(f"{kind}_{name}_ms") for kind in ("median", "p99")]
        return NOTHING if values == [None, None] else " / ".join(map(number, values))

    return show


BATCH: Column = ("batch", field("batch_size"))
THROUGHPUT: Column = ("tokens/s (lowest – highest)", with_spread("output_throughput"))
RATES: list[Column] = [("requests/s", field("request_throughput")), ("pictures/s", field("pictures_per_s"))]
LATENCIES: list[Column] = [
    ("TTFT ms, median / p99", latency("ttft")),
    ("TPOT ms, median / p99", latency("tpot")),
    ("ITL ms, median / p99", latency("itl")),
    ("request ms, median", field("median_e2el_ms")),
]
SHARES: list[Column] = [
    ("peak GiB", lambda point: number(highest(point.get("peak_memory_gib")))),
    ("memory limit", lambda point: percent(point.get("share_of_memory_limit"))),
    ("matrix limit", lambda point: percent(point.get("share_of_matrix_limit"))),
]
COLLECTIVES: list[Column] = [
    BATCH,
    ("time ms, slowest rank", lambda point: number(highest((point.get("collectives") or {}).get("time_ms")))),
    ("share of the duration", lambda point: percent(collective_share(point))),
    ("MB moved", lambda point: number(megabytes((point.get("collectives") or {}).get("bytes")))),
    ("calls", lambda point: number((point.get("collectives") or {}).get("calls"))),
    ("peak memory GiB, each rank", lambda point: ", ".join(map(number, point.get("peak_memory_gib") or [None]))),
]
WORDS = (
    "TTFT: time to the first token. TPOT: time per output token after it. ITL: time between two tokens. "
    "Medians over requests; lowest and highest are of whole runs. Memory: of the rank that needs the most. "
    "Limits: shares of what all ranks together reached in the same run, reading memory (decode) and multiplying "
    "matrices (prefill)."
)
FIRST = "× first: throughput, times that of the first job with this batch."


def collective_share(point: Point) -> float | None:
    slowest = highest((point.get("collectives") or {}).get("time_ms"))
    return slowest / (1000 * point["duration"]) if slowest is not None and point["duration"] else None


def megabytes(count: float | None) -> float | None:
    return None if count is None else count / 1e6


def fill(title: str, columns: Sequence[Column], points: Iterable[Point], note: str = "") -> Table:
    """Columns in which no point has anything are left out."""
    rows = [[show(point) for _, show in columns] for point in points]
    kept = [i for i in range(len(columns)) if any(row[i] != NOTHING for row in rows)]
    return Table(title, [columns[i][0] for i in kept], [[row[i] for i in kept] for row in rows], note)


def job_tables(result: Result) -> list[Table]:
    """Of one job."""
    points = result.measured
    sizes, note = size_columns(points)
    figures = fill("Figures", [BATCH, *sizes, THROUGHPUT, *RATES, *LATENCIES, *SHARES], points, f"{note} {WORDS}")
    tables = [figures, phases_table(points)]
    tables.append(fill("Collectives and memory", COLLECTIVES, points))
    about = {**result.config, **(result.content.get("machine") or {}), **(result.content.get("limits") or {})}
    tables.append(Table("What was measured, and on what", ["", ""], [[name, plain(about[name])] for name in about]))
    return tables


def size_columns(points: Sequence[Point]) -> tuple[list[Column], str]:
    """Columns of what the requests were, and a sentence of what all had in common."""
    columns: list[Column] = []
    same = []
    for name, words in list(SIZES.items())[1:]:
        values = {point.get(name) for point in points}
        if len(values) > 1:
            columns.append((words, field(name)))
        elif values - {0, None}:
            same.append(f"{number(values.pop())} {words}")
    return columns, f"Each request: {', '.join(same)}." if same else ""


def phases_table(points: Sequence[Point]) -> Table:
    names = list(dict.fromkeys(name for point in points for name in point["phases_ms"] or {}))
    columns = [BATCH, *((f"{name} ms", phase(name)) for name in names)]
    columns.append(("all s", field("duration")))
    return fill("Time per phase", columns, points, "Of rank 0, of the whole batch.")


def phase(name: str) -> Callable[[Point], str]:
    def show(point: Point) -> str:
        value = (point.get("phases_ms") or {}).get(name)
        return NOTHING if value is None else f"{number(value)} ({percent(value / 1000 / point['duration'])})"

    return show


def sweep_tables(results: Sequence[Result]) -> list[Table]:
    """Of several: their points side by side, batch by batch, and what they differ in."""
    keys = differing([result.overrides for result in results], ())
    short = {key: shorten_values([result.overrides.get(key, NOTHING) for result in results]) for key in keys}
    rows = sorted(
        ({**point, "shown": {key: short[key][i] for key in keys}, "first": find_first(results, point["batch_size"])}
         for i, result in enumerate(results) for point in result.measured),
        key=lambda point: point["batch_size"],
    )  # fmt: skip
    sizes, note = size_columns(rows)
    jobs = [BATCH, *((key, override(key)) for key in keys)]
    columns = [*jobs, *sizes, THROUGHPUT, ("× first", times_first), *RATES, *LATENCIES, *SHARES]
    return [fill("Side by side", columns, rows, f"{note} {FIRST} {WORDS}"), jobs_table(results)]


def find_first(results: Sequence[Result], batch_size: int) -> Point:
    return next(point for result in results if (point := result.at(batch_size)))


def times_first(point: Point) -> str:
    return f"{point['request_throughput'] / point['first']['request_throughput']:.2f}"


def override(key: str) -> Callable[[Point], str]:
    return lambda point: point["shown"][key]


def jobs_table(results: Sequence[Result]) -> Table:
    """One row a job: how it ended, and every key of its config, machine and limits that is not the same in all."""
    about = [
        {**result.config, **(result.content.get("machine") or {}), **(result.content.get("limits") or {})}
        for result in results
    ]
    keys = differing([facts for facts in about if facts], but=("overrides", "date"))
    rows = [
        [result.folder, result.status, *(plain(facts.get(key)) for key in keys)]
        for result, facts in zip(results, about, strict=True)
    ]
    return Table("Jobs, and what differs between them", ["folder", "status", *keys], rows)


def plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or NOTHING
    return number(value, 4) if isinstance(value, float | int) and not isinstance(value, bool) else str(value or NOTHING)
