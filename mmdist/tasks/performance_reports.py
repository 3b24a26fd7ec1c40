"""What task=performance does with what it has measured: pages, comparisons, what need not be measured again, sweeps."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmdist.config import EXIT_FAILED, UserError
from mmdist.performance.compare import compare_results
from mmdist.performance.page import write_pages
from mmdist.performance.report import write_whole
from mmdist.performance.results import NAME, Result, join_jobs, read_results
from mmdist.performance.tables import sweep_tables
from mmdist.task_config import PerformanceConfig
from mmdist.tasks.job import SweepJob

# Where it is written, and what is done with it: no setting of what is measured.
NO_SETTINGS = ("model", "task", "output_dir", "resume", "compare", "max_regression")
log = logging.getLogger("mmdist.performance")


def changed_keys(config: PerformanceConfig) -> list[str]:
    """KEY=VALUE of what is not its default, the family's own keys left out."""
    given, defaults = asdict(config), asdict(PerformanceConfig())
    changed = []
    for name, value in given.items():
        if isinstance(value, dict) and name not in NO_SETTINGS:
            inner = defaults[name]
            changed += [f"{name}.{key}={own}" for key, own in value.items() if own != inner[key]]
        elif name not in NO_SETTINGS and value != defaults[name]:
            changed.append(f"{name}={value}")
    return changed


def read_compared(config: PerformanceConfig) -> list[Result]:
    """Of compare=; nothing without it."""
    return read_results(Path(config.compare)) if config.compare is not None else []


def finish(config: PerformanceConfig, folder: Path, results: Sequence[Result]) -> int:
    """The pages, and with compare= the ratios; the exit code."""
    write_pages(folder, results)
    if config.compare is None:
        return 0
    found = compare_results(results, Path(config.compare), read_compared(config), config.max_regression)
    print("\n".join(found.lines))
    for regression in found.regressions:
        log.warning("worse by more than max_regression=%g: %s", config.max_regression, regression)
    return EXIT_FAILED if found.regressions else 0


def read_kept(config: PerformanceConfig, own: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """With resume=true: points by their batch that output_dir= has, of `own` settings."""
    path = Path(str(config.output_dir)) / NAME
    if not config.resume or not path.exists():
        return {}
    (result,) = read_results(path)
    if result.config != own:
        raise UserError(
            f"resume=true: {path} was measured with other settings ({', '.join(differences(result.config, own))}); "
            "choose another output_dir=, or leave resume= out to measure all anew"
        )
    return {point["batch_size"]: point for point in result.measured}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [f"{name}: {old.get(name)} then, {new.get(name)} now" for name in new if old.get(name) != new[name]]


def is_finished(config: PerformanceConfig, folder: Path) -> bool:
    """True where a sweep's job was measured to its end, with the same settings as far as they are known here."""
    if not config.resume or not (folder / NAME).exists():
        return False
    (result,) = read_results(folder / NAME)
    sizes = ("auto", result.config["world_size"])
    same = settings(result.config["overrides"]) == settings(changed_keys(config))
    same = same and config.model.name == result.config["model"] and config.world_size in sizes
    return same and result.content.get("complete", False)


def settings(overrides: Sequence[str]) -> list[str]:
    """Without the world size, which the launcher adds where it is auto."""
    return [word for word in overrides if not word.startswith("world_size=")]


def begin_sweep(jobs: Sequence[SweepJob]) -> None:
    """Refuses compare= before anything is measured; what is measured anew is not taken for what was."""
    for config, folder in own_jobs(jobs):
        read_compared(config)
        if not config.resume:
            (folder / NAME).unlink(missing_ok=True)


def own_jobs(jobs: Sequence[SweepJob]) -> list[tuple[PerformanceConfig, Path]]:
    return [(job.config, job.folder) for job in jobs if isinstance(job.config, PerformanceConfig)]


def report_sweep(jobs: Sequence[SweepJob], folder: Path) -> int:
    """performance.json, performance.md, report.html and plots of all jobs in the sweep's folder; the exit code."""
    results = [read_job(job) for job in jobs]
    write_whole(folder / NAME, json.dumps(join_jobs(results), indent=1, allow_nan=False) + "\n")
    tables = [table.markdown() for table in sweep_tables(results) if table.rows]
    write_whole(folder / "performance.md", "\n\n".join([f"# Performance of {len(results)} jobs", *tables]) + "\n")
    log.info("joint report in %s", folder / "report.html")
    return finish(own_jobs(jobs)[0][0], folder, results)


def read_job(job: SweepJob) -> Result:
    """Of a job that failed, too, the points it has."""
    path = job.folder / NAME
    content = read_results(path)[0].content if path.exists() else {}
    status = "ok" if job.status in ("ok", "finished before") else job.status or "not started"
    return Result(job.changed, content, status, job.folder.name)
