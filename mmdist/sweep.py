"""A sweep (-m): one job after another, each a process of its own, so that none can take the others along.

What a job says goes through to the terminal; its last error is kept for the report.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pty
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from mmdist.config import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER_ERROR
from mmdist.launch import end_with_us, load_task
from mmdist.log import init_log
from mmdist.tasks.job import SweepJob

LONGEST_NAME = 120  # characters of a folder; file systems take 255 bytes
OURS = ("output_dir", "compare")  # what is said of the sweep is not passed on to its jobs
log = logging.getLogger("mmdist.sweep")


def run_sweep(jobs: Sequence[SweepJob], folder: Path, program: Sequence[str]) -> int:
    """The worst exit code; the report of the tasks that write one. program: what starts a job, less its words."""
    init_log()
    codes = []
    for job, name in zip(jobs, name_folders(jobs), strict=True):
        job.folder = folder / name
    reporting = reporting_tasks(jobs)
    for task in reporting:
        task.begin_sweep(jobs)
    for number, job in enumerate(jobs, 1):
        log.info("job %d of %d: %s", number, len(jobs), job.folder)
        codes.append(run_one(job, program))
        if codes[-1] == EXIT_INTERRUPTED:
            break
    failed = [job for job in jobs if job.status.startswith("failed")]
    for job in failed:
        log.warning("%s %s", job.folder, job.status)
    log.info("%d of %d jobs done, %d failed, in %s", len(jobs) - len(failed), len(jobs), len(failed), folder)
    codes += [task.report_sweep(jobs, folder) for task in reporting]
    return max(codes, default=0)


def run_one(job: SweepJob, program: Sequence[str]) -> int:
    if job.config is None:
        print(f"error: {job.problem}", file=sys.stderr)
        job.status = f"failed: {job.problem}"
        return EXIT_USER_ERROR
    task = load_task(job.config.task)
    if hasattr(task, "is_finished") and task.is_finished(job.config, job.folder):
        job.status = "finished before"
        return 0
    words = [word for word in job.words if word.partition("=")[0] not in OURS]
    code, error = run_job([*program, *words, f"output_dir={job.folder}"])
    job.status = "ok" if code == 0 else f"failed: {error or describe_end(code)}"
    return EXIT_INTERRUPTED if code == -signal.SIGINT else code if code >= 0 else EXIT_FAILED


def describe_end(code: int) -> str:
    if code in (EXIT_INTERRUPTED, -signal.SIGINT):
        return "interrupted"
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def run_job(command: Sequence[str]) -> tuple[int, str]:
    """The exit code (below 0: the signal that ended it), and the last error it has printed."""
    reader, writer = pty.openpty() if sys.stderr.isatty() else os.pipe()  # it shows its progress where we could
    with leave_interrupts_to_the_job(), subprocess.Popen(command, stderr=writer, preexec_fn=end_with_us()) as job:
        os.close(writer)
        error = pass_on(reader)
        os.close(reader)
        return job.wait(), error


def pass_on(reader: int) -> str:
    """What comes, to our own stderr, until it is closed at the other end; the last line that is an error."""
    error, rest = "", b""
    with suppress(OSError):  # a terminal's end is closed with an error
        while chunk := os.read(reader, 1 << 16):
            os.write(sys.stderr.fileno(), chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            errors = [line for line in lines if line.startswith(b"error: ")]
            error = errors[-1].decode(errors="replace") if errors else error
    return error.removeprefix("error: ").strip()


@contextmanager
def leave_interrupts_to_the_job() -> Iterator[None]:
    """It hears Ctrl-C as we do. A handler, as a signal that is ignored would be ignored by the job, too."""
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def name_folders(jobs: Sequence[SweepJob]) -> list[str]:
    """model=llava,world_size=2: what the sweep changes, without what a folder's name should not have."""
    full = [",".join(f"{key}={value}" for key, value in job.changed.items()) or "job" for job in jobs]
    short = [re.sub(r"[^\w.,=+-]+", "-", name)[:LONGEST_NAME].strip("-") for name in full]
    count = Counter(short)
    return [
        name
        if count[name] == 1 and len(whole) <= LONGEST_NAME
        else f"{name}-{hashlib.sha1(whole.encode()).hexdigest()[:8]}"
        for name, whole in zip(short, full, strict=True)
    ]


def reporting_tasks(jobs: Sequence[SweepJob]) -> list[ModuleType]:
    """Those with something to say of a sweep as a whole: they have is_finished, begin_sweep and report_sweep."""
    tasks = [load_task(name) for name in dict.fromkeys(job.config.task for job in jobs if job.config is not None)]
    return [task for task in tasks if hasattr(task, "report_sweep")]
