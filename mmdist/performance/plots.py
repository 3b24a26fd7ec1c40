"""The pictures of a report. Each is one panel, narrow enough to be read on a phone, with its legend beneath it."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
from PIL import Image

from mmdist.performance.results import Result, common_batch_sizes, generates, name_results, scaling_groups, shorten

WIDTH, HEIGHT, DPI = 5.6, 3.3, 200  # inches; 1120 pixels, twice what a page gives it
LEGEND_ROW, BAR_ROW = 0.2, 0.42  # inches
LONGEST_LABEL = 78  # characters that fit the width
LINE_STYLES = ("-", "--", ":", "-.")
MARKERS = "osD^vPX*"
LINE_LOOK: dict[str, Any] = {"markersize": 4, "linewidth": 1.6, "elinewidth": 1, "capsize": 2}
PHASES = ("preprocess", "vision", "broadcast", "prefill", "decode", "sample", "detokenise", "other")


@dataclass(frozen=True)
class Theme:
    """Colours; those of lines and phases are told apart with any kind of colour vision (after Okabe and Ito)."""

    background: str
    ink: str
    faint: str
    lines: tuple[str, ...]
    phases: tuple[str, ...]


LIGHT = Theme(
    "#ffffff", "#1f2328", "#d0d4da",
    ("#0072b2", "#d55e00", "#009e73", "#b8579a", "#c98a00", "#3fa0d8"),
    ("#8c6bb1", "#009e73", "#cc79a7", "#0072b2", "#e69f00", "#d55e00", "#56b4e9", "#9aa0a6"),
)  # fmt: skip
DARK = Theme(
    "#16191d", "#e6e8eb", "#3a4048",
    ("#4aa8e0", "#f08a45", "#2cc295", "#e08cc0", "#e8b33f", "#9db2ff"),
    ("#a58bd0", "#2cb58c", "#e08cc0", "#3d95d6", "#e8ad35", "#f08a45", "#84cbf5", "#7d848c"),
)  # fmt: skip


@dataclass
class Line:
    """One line over x. spread: lowest and highest at each x."""

    label: str
    x: list[float]
    y: list[float]
    spread: list[tuple[float, float]] = field(default_factory=list)
    style: str = ""

    def error_bars(self) -> list[list[float]] | None:
        """matplotlib's: how far below and above."""
        ends = list(zip(self.y, self.spread, strict=True)) if self.spread else []
        return [[y - low for y, (low, _) in ends], [high - y for y, (_, high) in ends]] if ends else None


@dataclass
class Bar:
    label: str
    phases_ms: dict[str, float | None]


def draw_plots(results: Sequence[Result], theme: Theme) -> dict[str, bytes]:
    """PNGs by name, in the order of a report; of what was not measured there is none."""
    figures = {name: draw(results, theme) for name, draw in PLOTS.items()}
    return {name: to_png(figure) for name, figure in figures.items() if figure is not None}


def to_png(figure: Figure) -> bytes:
    """In 128 colours, which halves it and is not seen."""
    figure.savefig(drawn := io.BytesIO(), format="png", dpi=DPI)
    image = Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    image.save(small := io.BytesIO(), "png", optimize=True)
    return small.getvalue()


def draw_throughput(results: Sequence[Result], theme: Theme) -> Figure | None:
    tokens = generates(results)
    lines = lines_over_batch(results, "output_throughput" if tokens else "request_throughput")
    return draw_over_batch(
        lines, theme, "Throughput of the batch", "tokens per second" if tokens else "requests per second"
    )


def draw_ttft(results: Sequence[Result], theme: Theme) -> Figure | None:
    lines = lines_over_batch(results, "median_ttft_ms")
    word = "token" if generates(results) else "answer"
    return draw_over_batch(with_p99(results, lines, "p99_ttft_ms"), theme, f"Time to the first {word}", "milliseconds")


def draw_tpot(results: Sequence[Result], theme: Theme) -> Figure | None:
    lines = lines_over_batch(results, "median_tpot_ms")
    return draw_over_batch(
        with_p99(results, lines, "p99_tpot_ms"), theme, "Time per output token after the first", "milliseconds"
    )


def lines_over_batch(results: Sequence[Result], name: str) -> list[Line]:
    """Of each result one; a single one needs no label."""
    lines = []
    labels = name_results(results) if len(results) > 1 else ["median (bar: lowest and highest run)"]
    for label, result in zip(labels, results, strict=True):
        points = [point for point in result.measured if point.get(name) is not None]
        spreads = [(point.get("spread") or {}).get(name) or [point[name]] * 2 for point in points]
        sizes, values = [point["batch_size"] for point in points], [point[name] for point in points]
        lines += [Line(label, sizes, values, [(low, high) for low, high in spreads])] if points else []
    return lines


def with_p99(results: Sequence[Result], lines: list[Line], name: str) -> list[Line]:
    """Beside the median of a single result."""
    if len(results) > 1 or not lines:
        return lines
    p99 = [
        Line("99th percentile of the requests", line.x, line.y, style="--") for line in lines_over_batch(results, name)
    ]
    return [*lines, *p99]


def draw_over_batch(lines: list[Line], theme: Theme, title: str, unit: str) -> Figure | None:
    if not lines:
        return None
    labelled = len(lines) > 1 or any(low < high for low, high in lines[0].spread)
    figure, axes = begin(theme, title, rows=len(lines) if labelled else 0)
    axes.set_xlabel("batch (requests at once)")
    axes.set_ylabel(unit)
    plot_lines(axes, lines, theme)
    show_sizes(axes, sorted({size for line in lines for size in line.x}))
    return add_legend(figure, axes, theme) if labelled else figure


def plot_lines(axes: Axes, lines: Sequence[Line], theme: Theme) -> None:
    """Colours in turn; when they are used up, with another stroke and marker."""
    for number, line in enumerate(lines):
        again = number // len(theme.lines)
        axes.errorbar(
            line.x,
            line.y,
            yerr=line.error_bars(),
            label=shorten(line.label, LONGEST_LABEL),
            color=theme.lines[number % len(theme.lines)],
            linestyle=line.style or LINE_STYLES[again % len(LINE_STYLES)],
            marker=MARKERS[number % len(MARKERS)],
            **LINE_LOOK,
        )
    axes.set_ylim(0, 1.08 * max(high for line in lines for high in [*line.y, *(high for _, high in line.spread)]))


def show_sizes(axes: Axes, sizes: Sequence[float]) -> None:
    """A tick at each size that was measured and has room; far apart, each doubling takes the same."""
    far = sizes[-1] > 12
    if far:
        axes.set_xscale("log", base=2)
    places = [math.log2(size) if far else size for size in sizes]
    room, shown = (places[-1] - places[0]) / 16, [0]
    shown += [i for i in range(1, len(sizes)) if places[i] - places[i - 1] >= room or math.log2(sizes[i]).is_integer()]
    axes.xaxis.set_major_locator(FixedLocator([sizes[i] for i in shown]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    if len(sizes) == 1:
        axes.set_xlim(sizes[0] / 2, sizes[0] * 1.5)


def draw_phases(results: Sequence[Result], theme: Theme) -> Figure | None:
    """Stacked bars: of a single result one for each batch, of several one for each result at the same batch."""
    shown = [result for result in results if result.measured and all(p["phases_ms"] for p in result.measured)]
    if not shown:
        return None
    if len(results) == 1:
        bars = [Bar(f"batch {point['batch_size']}", point["phases_ms"]) for point in shown[0].measured]
        return draw_bars(bars, theme, "Time per phase of the whole batch")
    batch_size = max(common_batch_sizes(shown), default=None)
    bars = []
    for label, result in zip(name_results(shown), shown, strict=True):
        point = result.measured[-1] if batch_size is None else result.at(batch_size)
        assert point is not None, "it is one of the common batch sizes"
        bars.append(Bar(label if batch_size else f"{label}, batch {point['batch_size']}", point["phases_ms"]))
    return draw_bars(bars, theme, "Time per phase" + (f" of a batch of {batch_size}" if batch_size else ""))


def draw_bars(bars: Sequence[Bar], theme: Theme, title: str) -> Figure | None:
    """Lying, each under its own name, so that long names have room; the total at the end."""
    names = [name for name in PHASES if any(bar.phases_ms.get(name) for bar in bars)]
    if not names:
        return None
    totals = [sum(bar.phases_ms.get(name) or 0.0 for name in names) for bar in bars]
    unit, scale = ("s", 1000.0) if max(totals) >= 10_000 else ("ms", 1.0)
    figure, axes = begin(theme, title, rows=-(-len(names) // 4), height=1.1 + BAR_ROW * len(bars))
    left = [0.0] * len(bars)
    for name in names:
        widths = [(bar.phases_ms.get(name) or 0.0) / scale for bar in bars]
        color = theme.phases[PHASES.index(name)]
        axes.barh(range(len(bars)), widths, left=left, height=0.42, label=name, color=color, edgecolor=theme.background)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    name_bars(axes, [bar.label for bar in bars], left, unit, theme)
    axes.set_ylim(len(bars) - 0.6, -0.75)
    axes.set_xlim(0, 1.15 * max(left))
    axes.set_yticks([])
    axes.grid(False, axis="y")
    axes.set_xlabel("seconds" if unit == "s" else "milliseconds")
    return add_legend(figure, axes, theme, columns=4)


def name_bars(axes: Axes, names: Iterable[str], ends: Sequence[float], unit: str, theme: Theme) -> None:
    """The name above a bar and its length behind it, on ground of their own so that no grid line strikes them out."""
    style: dict[str, Any] = {"size": 8, "color": theme.ink, "textcoords": "offset points"}
    ground: dict[str, Any] = {"facecolor": theme.background, "edgecolor": "none", "pad": 0.6}
    for place, (name, end) in enumerate(zip(names, ends, strict=True)):
        axes.annotate(shorten(name, LONGEST_LABEL), (0, place - 0.24), xytext=(1, 2), bbox=ground, **style)
        length = f"{end:.{0 if end >= 100 else 1}f} {unit}"
        axes.annotate(length, (end, place), xytext=(4, 0), va="center", bbox=ground, **style)


def draw_scaling(results: Sequence[Result], theme: Theme) -> Figure | None:
    """Throughput over world size, against what the ranks together would reach if each did as well as in the first."""
    lines = scaling_lines(results, "output_throughput" if generates(results) else "request_throughput")
    if not lines:
        return None
    sizes = sorted({size for line in lines for size in line.x})
    figure, axes = begin(theme, "Throughput over world size", rows=len(lines) + 1)
    plot_lines(axes, lines, theme)
    axes.plot(sizes, sizes, linestyle=(0, (1, 2)), label="ideal", color=theme.ink, linewidth=1, alpha=0.6)
    axes.set_ylim(top=1.08 * sizes[-1])
    show_sizes(axes, sizes)
    axes.set_xlabel("world size (ranks)")
    axes.set_ylabel("speed-up (a line's first point: ideal)")
    return add_legend(figure, axes, theme)


def scaling_lines(results: Sequence[Result], name: str) -> list[Line]:
    """Of each setting that was measured at several world sizes, at its smallest and its largest batch."""
    lines = []
    groups = scaling_groups(results)
    for label, by_size in groups.items():
        batches = common_batch_sizes(list(by_size.values()))
        for batch_size in dict.fromkeys([*batches[:1], *batches[-1:]]):
            values = {size: point[name] for size, result in by_size.items() if (point := result.at(batch_size))}
            if len(values) > 1 and all(values.values()):
                smallest = min(values)
                words = f"{label}, batch {batch_size}".removeprefix(", ")
                lines.append(
                    Line(words, list(values), [smallest * value / values[smallest] for value in values.values()])
                )
    return lines


def begin(theme: Theme, title: str, *, rows: int, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure of one panel, with room for a legend of so many rows."""
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 9, "axes.edgecolor": theme.faint}):
        figure = Figure(
            (WIDTH, height + rows * LEGEND_ROW),
            facecolor=theme.background,
            layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06),
        )
        axes = figure.add_subplot(facecolor=theme.background)
    axes.set_title(title, loc="left", size=10.5, weight="bold", color=theme.ink)
    axes.tick_params(colors=theme.ink, length=0)
    axes.xaxis.label.set_color(theme.ink)
    axes.yaxis.label.set_color(theme.ink)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color=theme.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def add_legend(figure: Figure, axes: Axes, theme: Theme, columns: int = 1) -> Figure:
    handles, labels = axes.get_legend_handles_labels()
    look: dict[str, Any] = {"frameon": False, "fontsize": 8, "labelcolor": theme.ink, "labelspacing": 0.35}
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, **look)
    return figure


PLOTS: dict[str, Callable[[Sequence[Result], Theme], Figure | None]] = {
    "throughput": draw_throughput,
    "ttft": draw_ttft,
    "tpot": draw_tpot,
    "phases": draw_phases,
    "scaling": draw_scaling,
}
