"""What is made of performance.json: pictures, pages, tables, comparisons, joint reports."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from performance_cases import make_content, make_point, make_sweep, stopped_point
from PIL import Image

from mmdist.config import UserError
from mmdist.performance import page
from mmdist.performance.compare import compare_results
from mmdist.performance.page import write_pages
from mmdist.performance.plots import DARK, LIGHT, draw_phases, draw_plots, draw_throughput
from mmdist.performance.results import Result, join_jobs, name_results, read_results
from mmdist.performance.tables import job_tables, number, sweep_tables

LONG = "/data/" + "a-very-long-folder-name-" * 8
CASES = {
    "one point": [Result({}, make_content([1]))],
    "ten points": [Result({}, make_content())],
    "a climb": [Result({}, make_content([1, 2, 3, 4, 8, 9, 10, 16, 64, 256]))],
    "no tokens": [Result({}, make_content([1, 4], output_len=1, model="vlmo"))],
    "twelve jobs": make_sweep(),
    "world sizes": make_sweep(["llava"], [1, 2, 4, 8], ["none"]),
    "long names": [Result({"checkpoint": LONG + end}, make_content([1, 2]), folder=end) for end in "ab"],
    "no common batch": [Result({"quant": str(i)}, make_content([i]), folder=str(i)) for i in (1, 2)],
    "one failed": [*make_sweep(["llava"], [1], ["none"]), Result({"model": "x"}, {}, "failed: no memory", "x")],
    "all failed": [Result({"model": name}, {}, "failed: no memory", name) for name in "ab"],
}


class Page(HTMLParser):
    """What a browser would fetch, and the text of the cells."""

    def __init__(self, text: str):
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [str(value) for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.mark.parametrize("case", CASES)
def test_a_page_is_whole_and_needs_nothing_else(case: str, tmp_path: Path) -> None:
    results = CASES[case]
    write_pages(tmp_path, results)
    html = (tmp_path / "report.html").read_text()
    parsed = Page(html)
    assert all(source.startswith("data:image/png;base64,") for source in parsed.sources)
    assert "@import" not in html and "url(" not in html and "<script" not in html
    plots = [path.stem for path in (tmp_path / "plots").iterdir() if check_margins(path) is None]
    assert len(parsed.sources) == 2 * len(plots) and not list(tmp_path.glob("**/*.partial"))
    expected = {"throughput", "ttft", "tpot", "phases"} - ({"tpot"} if case == "no tokens" else set())
    expected |= {"scaling"} if case in ("twelve jobs", "world sizes") else set()
    assert set(plots) == (expected if case != "all failed" else set())
    if case.endswith("failed"):
        assert "failed: no memory" in html


def check_margins(path: Path) -> None:
    """Ink in an outermost row or column would be a label that left the picture."""
    image = Image.open(path).convert("L")
    right, bottom = image.width - 2, image.height - 2
    assert image.width == 1120 and image.height < 4000
    for box in ((0, 0, 1120, 2), (0, bottom, 1120, bottom + 2), (0, 0, 2, bottom), (right, 0, right + 2, bottom)):
        assert image.crop(box).getextrema()[0] > 200, f"{path}: something at {box}"


def texts_of(figure: Any) -> list[Any]:
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    (left, right), (low, high) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
    ticks = [label for label in axes.get_xticklabels() if left <= label.get_position()[0] <= right]
    ticks += [label for label in axes.get_yticklabels() if low <= label.get_position()[1] <= high]
    texts = [*axes.texts, *ticks, axes.xaxis.label, axes.yaxis.label, axes.title, axes._left_title]
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    return [text for text in texts if text.get_text() and text.get_visible()]


@pytest.mark.parametrize("case", [name for name in CASES if name != "all failed"])
def test_texts_do_not_overlap(case: str) -> None:
    for draw in (draw_throughput, draw_phases):
        figure = draw(CASES[case], DARK)
        assert figure is not None
        boxes = [(text.get_text(), text.get_window_extent()) for text in texts_of(figure)]
        width = figure.bbox.width
        for i, (one, box) in enumerate(boxes):
            assert box.x0 >= 0 and box.x1 <= width, f"{one} leaves the picture"
            for other, another in boxes[:i]:
                over = (
                    min(box.x1, another.x1) - max(box.x0, another.x0),
                    min(box.y1, another.y1) - max(box.y0, another.y0),
                )
                assert min(over) <= 1, f"{one!r} over {other!r}"


def test_missing_figures_are_left_out(tmp_path: Path) -> None:
    content = make_content([1, 2])
    for point in content["points"]:
        point |= {"median_ttft_ms": None, "p99_ttft_ms": None, "phases_ms": None, "collectives": None,
                  "peak_memory_gib": [None, None], "spread": None, "pictures_per_s": None}  # fmt: skip
    content["points"].append(stopped_point(3, "no memory"))
    result = Result({}, content)
    assert set(draw_plots([result], LIGHT)) == {"throughput", "tpot"}
    figures, *_ = job_tables(result)
    assert not {"pictures/s", "peak GiB"} & set(figures.heads) and len(figures.rows) == 2
    write_pages(tmp_path, [result])
    assert "Batch 3: stopped: no memory" in (tmp_path / "report.html").read_text()


def test_what_names_hold_is_text(tmp_path: Path) -> None:
    write_pages(tmp_path, [Result({}, make_content([1], checkpoint="/x/<script>alert(1)</script>"))])
    assert "<script" not in (tmp_path / "report.html").read_text()


def test_without_matplotlib_all_else_is_written(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr(page, "HAS_MATPLOTLIB", False)
    with caplog.at_level(logging.WARNING, "mmdist.performance"):
        write_pages(tmp_path, CASES["ten points"])
    assert caplog.messages == [page.NO_PLOTS] and "pip install" in page.NO_PLOTS
    html = (tmp_path / "report.html").read_text()
    assert page.NO_PLOTS in unescape(html) and "219" in html and not (tmp_path / "plots").exists()


def test_matplotlib_is_loaded_for_a_report_alone() -> None:
    code = "import sys, launch, mmdist.tasks.performance; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_numbers_are_read_at_a_glance() -> None:
    shown = {0.01234: "0.0123", 2.0: "2.00", 43.07: "43.1", 219.4: "219", 12345.6: "12,346", 7: "7", None: "-"}
    assert {value: number(value) for value in shown} == shown


def test_names_tell_jobs_apart() -> None:
    jobs = [Result({"model": "llava", "engine.block_size": size, "checkpoint": path}, {})
            for size, path in (("8", "/a/x"), ("16", "/b/y"), ("16", "/b/x"))]  # fmt: skip
    assert name_results(jobs) == [
        "block_size=8 checkpoint=/a/x", "block_size=16 checkpoint=/b/y", "block_size=16 checkpoint=/b/x"
    ]  # fmt: skip
    assert name_results(jobs[:2]) == ["block_size=8 checkpoint=x", "block_size=16 checkpoint=y"]


def test_joined_jobs_come_apart_again(tmp_path: Path) -> None:
    results = [*make_sweep(sizes=[1, 2]), Result({"model": "x"}, {}, "failed: no memory", "model=x")]
    path = tmp_path / "performance.json"
    path.write_text(json.dumps(join_jobs(results)))
    again = read_results(tmp_path)
    assert [(r.overrides, r.status, r.folder) for r in again] == [(r.overrides, r.status, r.folder) for r in results]
    assert [point["batch_size"] for point in again[0].measured] == [1, 2, 4, 8]
    assert json.loads(path.read_text())["points"][0]["quant"] == "none"
    side, jobs = sweep_tables(results)
    assert side.heads[:4] == ["batch", "model", "world_size", "quant"] and len(side.rows) == 8 * 4
    assert side.rows[0][side.heads.index("× first")] == "1.00"
    assert jobs.rows[-1][:2] == ["model=x", "failed: no memory"] and "world_size" in jobs.heads
    assert "cpu" not in jobs.heads  # it is the same in all
    assert side.markdown().count("\n|") == 8 * 4 + 2


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"schema": 2, "points": []}', '{"schema": 1}'])
def test_what_is_no_performance_json_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(text)
    with pytest.raises(UserError, match=r"old\.json: not a performance\.json"):
        read_results(tmp_path / "old.json")
    with pytest.raises(UserError, match="no such file"):
        read_results(tmp_path / "none.json")


def compare(new: Any, old: Any, limit: float = 0.1) -> Any:
    return compare_results(new, Path("old.json"), old, limit)


def test_ratios_and_what_is_worse() -> None:
    old, new = make_content([1, 2, 3]), make_content([1, 2, 4], kernels="plain")
    for name, factor in (("output_throughput", 0.8), ("median_ttft_ms", 1.25), ("median_tpot_ms", 1.05)):
        new["points"][1][name] = factor * old["points"][1][name]
    found = compare([Result({}, new)], [Result({}, old)])
    assert [re.sub(r"\S+ -> \S+ ", "", text) for text in found.regressions] == [
        "batch 2: throughput/s x0.80, 20% worse", "batch 2: TTFT ms x1.25, 25% worse"
    ]  # fmt: skip
    assert any(line.startswith("batch 1 ") and line.count("x1.00") == 4 for line in found.lines)
    assert "differs: kernels: avx512_bf16 -> plain" in found.lines
    assert any(line.startswith("not measured now: batch 3, input tokens 320") for line in found.lines)
    assert any(line.startswith("not measured then: batch 4") for line in found.lines)
    assert not compare([Result({}, new)], [Result({}, old)], 0.3).regressions


def test_a_batch_that_no_longer_fits_is_worse() -> None:
    old, new = make_content([1, 2]), make_content([1])
    new["points"].append(stopped_point(2, "memory for the KV cache holds 1 request"))
    assert compare([Result({}, new)], [Result({}, old)]).regressions == [
        "batch 2: stopped: memory for the KV cache holds 1 request"
    ]


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(UserError, match=r"compare=old.json: no point in it.*batch 1.*now \(batch 2"):
        compare([Result({}, make_content([2]))], [Result({}, make_content([1]))])
    with pytest.raises(UserError, match="no point in it"):
        compare([Result({}, make_content([1], output_len=8))], [Result({}, make_content([1]))])


def test_sweeps_are_compared_job_by_job() -> None:
    old, new = make_sweep(), make_sweep()[::-1]
    assert len(compare(new, old).lines) == 2 + 12 * 4
    new[0].content["points"] = [make_point(1, speed=0.1)]
    (first, *_) = compare(new, old).regressions
    assert first.startswith("model=llava_next world_size=4 quant=w8a16 batch 1: throughput/s")
    alone = Result({}, old[5].content)
    assert len(compare([alone], old).lines) == 2 + 4
