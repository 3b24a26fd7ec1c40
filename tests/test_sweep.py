"""-m: a process a job, named folders, failures that stop no one else, and what is measured once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import GOLDEN

from mmdist import cli
from mmdist.compose import quote_free_text
from mmdist.sweep import name_folders, run_sweep
from mmdist.task_config import GenerateConfig, PerformanceConfig
from mmdist.tasks.job import SweepJob
from mmdist.tasks.performance_reports import changed_keys, is_finished

LAUNCH = str(Path(__file__).parents[1] / "launch.py")
# A job that does as its word says and leaves a file in its folder.
JOB = """
import os, sys
from pathlib import Path
words = dict(word.split("=", 1) for word in sys.argv[1:])
folder = Path(words["output_dir"]); folder.mkdir(parents=True)
(folder / "ran").write_text(str(sorted(words)))
print("so far so good", file=sys.stderr)
if words["do"] == "fail": print("error: no memory", file=sys.stderr)
if words["do"] == "die": os.kill(os.getpid(), 9)
sys.exit({"fail": 1, "stop": 130}.get(words["do"], 0))
"""


def jobs_that(*deeds: str) -> list[SweepJob]:
    words = ["task=generate", "output_dir=x", "compare=y"]
    return [
        SweepJob([*words, f"do={deed}"], {"do": deed}, GenerateConfig(task="generate", input="x")) for deed in deeds
    ]


def test_a_job_that_fails_stops_no_other(tmp_path: Path, capfd: Any) -> None:
    jobs = jobs_that("fail", "die", "work")
    jobs.append(SweepJob([], {"do": "0"}, None, "do=0: expected a deed"))
    assert run_sweep(jobs, tmp_path, [sys.executable, "-c", JOB]) == 2
    assert [job.status for job in jobs] == [
        "failed: no memory", "failed: killed by SIGKILL", "ok", "failed: do=0: expected a deed"
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["do=die", "do=fail", "do=work"]
    assert (tmp_path / "do=work" / "ran").read_text() == "['do', 'output_dir', 'task']"  # without compare=
    said = capfd.readouterr().err
    assert said.count("so far so good") == 3 and "error: no memory" in said and "1 of 4 jobs done, 3 failed" in said


def test_an_interrupt_ends_the_sweep(tmp_path: Path) -> None:
    jobs = jobs_that("work", "stop", "work")
    assert run_sweep(jobs, tmp_path, [sys.executable, "-c", JOB]) == 130
    assert [job.status for job in jobs] == ["ok", "failed: interrupted", ""]


def test_folders_say_what_the_sweep_changes() -> None:
    def names(*changed: dict[str, str]) -> list[str]:
        return name_folders([SweepJob([], each, None) for each in changed])

    assert names({"model": "llava", "world_size": "2"}, {}) == ["model=llava,world_size=2", "job"]
    assert names({"batch_sizes": "[1,2]", "prompt": "What is it?"}) == ["batch_sizes=-1,2-,prompt=What-is-it"]
    alike = names({"checkpoint": "/a/b"}, {"checkpoint": "/a-b"}, {"checkpoint": "x" * 300})
    assert len(set(alike)) == 3 and max(map(len, alike)) < 140 and all(name.startswith("checkpoint=") for name in alike)


def test_words_of_a_sweep_are_typed_again_as_a_user_would(monkeypatch: Any, tmp_path: Path) -> None:
    """Hydra puts backslashes into free text; the job must not see them."""
    monkeypatch.chdir(tmp_path)
    overrides = quote_free_text(["-m", "prompt=choice('Red, or blue?', 'b/c')", "max_new_tokens=3,4"])
    jobs = [cli.make_job(words, config, cli.swept_keys(overrides)) for words, config, _ in cli.compose(overrides)]
    assert [job.changed for job in jobs[::2]] == [
        {"prompt": "Red, or blue?", "max_new_tokens": "3"}, {"prompt": "b/c", "max_new_tokens": "3"}
    ]  # fmt: skip
    assert jobs[0].words == ["prompt='Red, or blue?'", "max_new_tokens=3"] and jobs[0].config.prompt == "Red, or blue?"


def test_only_a_whole_job_of_the_same_settings_is_finished(tmp_path: Path) -> None:
    config = PerformanceConfig(output_dir="x", resume=True, output_len=8)
    config.model.name = "llava"
    overrides = ["world_size=2", *changed_keys(config)]
    assert "output_len=8" in overrides and not any("resume" in word for word in overrides)
    content: dict[str, Any] = {"schema": 1, "points": [], "complete": True}
    content["config"] = {"model": "llava", "world_size": 2, "overrides": overrides}

    def finished(**changes: Any) -> bool:
        (tmp_path / "performance.json").write_text(json.dumps(content | changes))
        return is_finished(config, tmp_path)

    assert finished() and not finished(complete=False)
    assert not finished(config=content["config"] | {"overrides": ["output_len=9"]})
    assert not finished(config=content["config"] | {"model": "llava_next"})
    config.world_size = 4
    assert not finished()


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, LAUNCH, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=os.environ)


def test_a_sweep_of_performance(tmp_path: Path) -> None:
    """One size works, one cannot; a joint report; what was measured is not measured again, and compared with itself."""
    arguments = [
        "-m", "task=performance", f"checkpoint={GOLDEN / 'llava_next_mistral' / 'checkpoint'}", "world_size=1,3",
        "batch_sizes=[1,2]", "output_len=4", "input_len=8", "repeats=1", "warmup=0", "output_dir=sweep",
    ]  # fmt: skip
    first = run(*arguments)
    folder = tmp_path / "sweep"
    assert first.returncode == 2 and "legal sizes: 1, 2, 4, 8" in first.stderr, first.stderr
    assert sorted(path.name for path in folder.iterdir()) == [
        "multirun.yaml", "performance.json", "performance.md", "plots", "report.html", "world_size=1"
    ]  # fmt: skip
    joint = json.loads((folder / "performance.json").read_text())
    assert [job["status"][:20] for job in joint["jobs"]] == ["ok", "failed: world_size=3"]
    assert [(point["job"], point["batch_size"]) for point in joint["points"]] == [
        ("world_size=1", 1),
        ("world_size=1", 2),
    ]
    measured = (folder / "world_size=1" / "performance.json").stat().st_mtime_ns
    again = run(*arguments, "resume=true", "compare=sweep/performance.json")
    assert again.returncode == 2 and "x1.00" in again.stdout, again.stderr
    assert (folder / "world_size=1" / "performance.json").stat().st_mtime_ns == measured
    assert not (tmp_path / "multirun").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["task=performance", "resume=true"], "output_dir=FOLDER"),
        (["task=performance", "compare=/nowhere.json"], "/nowhere.json: no such file"),
        (["-m", "task=performance", "world_size=1,2", "compare=/nowhere.json"], "/nowhere.json: no such file"),
        (["-m", "world_size=1,2", "output_dir=choice(a,b)"], "output_dir= is the folder of the whole sweep"),
        (["-m", "world_size=1,2", "output_dir=/proc/nowhere"], "/proc/nowhere: cannot write there"),
        (["-m", "model=llava,nosuch"], "nosuch"),
    ],
)
def test_mistakes_before_anything_runs(arguments: list[str], words: str, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["launch.py", *arguments])
    assert cli.main() == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and words in lines[0]
