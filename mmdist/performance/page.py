"""report.html and plots/*.png beside a performance.json: one file that needs no network, light and dark."""

from __future__ import annotations

import base64
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2

from mmdist.performance.report import write_whole
from mmdist.performance.results import Result
from mmdist.performance.tables import Table, highest, job_tables, number, percent, sweep_tables

HAS_MATPLOTLIB = find_spec("matplotlib") is not None  # the extra `plots`; loaded when a report is written
NO_PLOTS = "no plots: matplotlib is not installed; pip install -e '.[plots]', then run it again with resume=true"
TEMPLATE = Path(__file__).with_name("report.html.j2")
log = logging.getLogger("mmdist.performance")


@dataclass
class Tile:
    name: str
    value: str
    note: str


@dataclass
class Plot:
    """Data URIs of a PNG in both themes."""

    name: str
    light: str
    dark: str


def write_pages(folder: Path, results: Sequence[Result]) -> None:
    """Of one job, or of a sweep's. Without matplotlib the page has tables alone."""
    plots = write_plots(folder, results)
    write_whole(folder / "report.html", render(results, plots))


def write_plots(folder: Path, results: Sequence[Result]) -> list[Plot]:
    """The light ones are files of their own, too."""
    if not HAS_MATPLOTLIB:
        log.warning(NO_PLOTS)
        return []
    module = import_module("mmdist.performance.plots")
    light, dark = (module.draw_plots(results, theme) for theme in (module.LIGHT, module.DARK))
    (folder / "plots").mkdir(exist_ok=True)
    for name, png in light.items():
        write_whole(folder / "plots" / f"{name}.png", png)
    return [Plot(name, data_uri(png), data_uri(dark[name])) for name, png in light.items()]


def data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def render(results: Sequence[Result], plots: Sequence[Plot]) -> str:
    alone = len(results) == 1 and not results[0].overrides
    tables = job_tables(results[0]) if alone else sweep_tables(results)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(TEMPLATE.read_text()).render(
        title=find_title(results[0]) if alone else f"Performance of {len(results)} jobs",
        subtitle=find_subtitle(results),
        failures=find_failures(results),
        tiles=find_tiles(results[0]) if alone else [],
        plots=plots,
        no_plots=NO_PLOTS if not HAS_MATPLOTLIB else "Nothing was measured that could be drawn.",
        tables=[{**vars(table), "kind": kind_of(table)} for table in tables if table.rows],
    )


def kind_of(table: Table) -> str:
    """How the page sets it: numbers to the right, words to the left."""
    return "facts" if not any(table.heads) else "words" if table.heads[0] == "folder" else ""


def find_title(result: Result) -> str:
    config = result.config
    ranks = f"{config['world_size']} rank{'' if config['world_size'] == 1 else 's'}"
    quant = "" if config["quant"] == "none" else f", {config['quant']} weights"
    return f"{config['model']} on {ranks}, {config['dtype']}{quant}"


def find_subtitle(results: Sequence[Result]) -> str:
    """The machine of the first that has one; others' are told in the table of what differs."""
    machine: dict[str, Any] = next((m for result in results if (m := result.content.get("machine"))), {})
    where = ", ".join(machine.get("accelerators") or []) or machine.get("cpu") or "unknown machine"
    size = f"{machine.get('cores')} cores, {number(machine.get('memory_gib'))} GiB"
    return f"{where}, {size}; mmdist {machine.get('mmdist')}, {machine.get('date')}"


def find_failures(results: Sequence[Result]) -> list[str]:
    lines = [f"{result.folder}: {result.status}" for result in results if result.status != "ok"]
    for result in results:
        where = f"{result.folder}, batch" if result.folder else "Batch"
        lines += [f"{where} {p['batch_size']}: {p['status']}" for p in result.points if p["status"] != "ok"]
    return lines


def find_tiles(result: Result) -> list[Tile]:
    """What one looks for first."""
    points = result.measured
    if not points:
        return []
    rate, unit = ("request_throughput", "requests/s")
    if points[0]["median_tpot_ms"] is not None:
        rate, unit = ("output_throughput", "tokens/s")
    best, first = max(points, key=lambda point: point[rate] or 0.0), points[0]
    memory = highest(gib for point in points for gib in point["peak_memory_gib"] or [])
    at_first = f"median, batch {first['batch_size']}"
    tiles = [
        Tile("Highest throughput", f"{number(best[rate])} {unit}", f"batch {best['batch_size']}"),
        Tile("Time to first token", f"{number(first['median_ttft_ms'])} ms", at_first),
        Tile("Time per output token", f"{number(first['median_tpot_ms'])} ms", at_first),
        Tile("Peak memory of a rank", f"{number(memory)} GiB", "over all batches"),
        Tile("Of the memory limit", percent(first["share_of_memory_limit"]), f"decode, batch {first['batch_size']}"),
    ]
    return [tile for tile in tiles if not tile.value.startswith("-")]
