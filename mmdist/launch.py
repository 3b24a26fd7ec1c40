"""Start the ranks and be one: torch's elastic agent and environment, first failure stops all.

A rank is a process with torchrun's environment (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), whether
torchrun started it or `start` did.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from mmdist.agent import run_agent
from mmdist.ascend import check_dtype
from mmdist.backend import Backend, check_visible, find_device, init_backend, planned_device, threads_per_rank
from mmdist.config import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER_ERROR, Config, UserError
from mmdist.engine.load import AnyEngine, asked_world_size, find_checkpoint, load_engine, split_world_size
from mmdist.invocation import program_name
from mmdist.log import init_log
from mmdist.models.family import check_world_size, find_model, legal_world_sizes, load_model_config
from mmdist.tasks.job import make_output_dir
from mmdist.tp import TP, init_tp

log = logging.getLogger("mmdist.launch")
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def load_task(name: str) -> ModuleType:
    return import_module(f"mmdist.tasks.{name}")


def start(config: Config, program: Sequence[str], words: Sequence[str]) -> int:
    """Run a job from a process that is no rank; returns the exit code. program and words: the command of one rank."""
    init_log()
    task = load_task(config.task)
    task.check(config)
    if not task.ON_RANKS:
        return task.run(config, JobRunner(program, words)) if starts_jobs(task) else task.run(config)
    size = find_world_size(config)
    if size == 1 and not config.launcher.max_restarts:
        return run_rank(config)
    threads = threads_per_rank(config.hardware, size)
    command = [*program, *words, f"world_size={size}"]
    return run_agent(command, size, config.launcher, threads, ends_itself=getattr(task, "ENDS_ITSELF", False))


def starts_jobs(task: ModuleType) -> bool:
    return getattr(task, "STARTS_JOBS", False)


class JobRunner:
    """Runs jobs from a job that has no ranks itself: its own words on the command line, some of them replaced."""

    def __init__(self, program: Sequence[str], words: Sequence[str]):
        self.program, self.words = program, words

    def __call__(self, legal: type[Config], **replaced: object) -> int:
        """The exit code. legal: the job's own config, whose keys are kept; a value of None leaves a key out."""
        names = {f.name for f in fields(legal)}
        kept = [word for word in self.words if key_of(word) in names - replaced.keys()]
        added = [f"{name}={value}" for name, value in replaced.items() if value is not None]
        with subprocess.Popen([*self.program, *kept, *added], preexec_fn=end_with_us()) as job:
            return job.wait()


def end_with_us() -> Callable[[], int] | None:
    """What a child process runs first, so that it is asked to end when this one is gone, even by kill -9."""
    if sys.platform != "linux":
        return None
    return partial(
        ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGTERM
    )  # found before a fork, as little is safe after


def key_of(word: str) -> str:
    """The key or group that KEY=VALUE, or GROUP.KEY=VALUE, is about."""
    return word.partition("=")[0].partition(".")[0].lstrip("+~")


def find_world_size(config: Config) -> int:
    """world_size=, refused where the model or the machine cannot have it."""
    if config.dtype != "auto" and planned_device(config.hardware) == "npu":
        check_dtype(config.dtype, config.hardware)
    folder, device = find_checkpoint(config), find_device(config.hardware)
    size = split_world_size(folder)
    if size is None or config.world_size not in ("auto", size):
        family = find_model(config.model.name)
        model_config = load_model_config(family, folder)
        size = asked_world_size(config, legal_world_sizes(family, model_config), device)
        check_world_size(family, model_config, size)
    check_visible(config.hardware, device, size)
    return size


def run_rank(config: Config) -> int:
    """The whole program of one rank; returns its exit code."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    init_log(rank, size)
    task = load_task(config.task)
    if not task.ON_RANKS:
        raise UserError(
            f"task={config.task} is no job of ranks: {program_name()} task={config.task} ..., without torchrun"
        )
    task.check(config)
    if config.world_size not in ("auto", size):
        raise UserError(f"world_size={config.world_size}, but torchrun started {size} ranks; leave world_size= out")
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    backend = init_backend(config.hardware, local_rank=local_rank, local_size=local_size)
    tp = init_tp(
        backend.collectives,
        config.hardware.kernels,
        rank=rank,
        size=size,
        local_size=local_size,
        timeout_s=config.launcher.timeout_s,
    )
    over = f", collectives over {tp.group.name}" if tp.group is not None else ""
    log.info("world_size=%d on %s%s", size, backend.device.type, over)
    if rank == 0 and (config.output_dir or getattr(task, "NEEDS_FOLDER", True)):
        make_output_dir(config)
    engine = open_engine(task, config, tp, backend)
    code = lead(task, config, engine) if rank == 0 else follow(task, config, engine)
    if size > 1:
        dist.barrier()  # no rank takes its connections away while another still reads from them
    return code


def lead(task: ModuleType, config: Config, engine: AnyEngine) -> int:
    """Rank 0's part: the task; a user's mistake sends the other ranks home before it is reported."""
    try:
        code = task.run(config, engine)
    except UserError:
        engine.stop()
        raise
    engine.stop()
    return code


def open_engine(task: ModuleType, config: Config, tp: TP, backend: Backend) -> AnyEngine:
    """The task's own where it has one (to measure, it takes hold of what the engine is made of)."""
    return task.open_engine(config, tp, backend) if hasattr(task, "open_engine") else load_engine(config, tp, backend)


def follow(task: ModuleType, config: Config, engine: AnyEngine) -> int:
    """The other ranks' part: their task's own where it has one, which ends as the engine's does, with stop()."""
    return task.follow(config, engine) if hasattr(task, "follow") else engine.follow()


def become_rank(run: Callable[[], int]) -> NoReturn:
    """Run a rank's program and end the process."""
    leave(guard_rank(run))  # torch's and gloo's threads may abort a process that unwinds its statics (seen: SIGABRT)


def leave(code: int) -> NoReturn:
    """End the process at once: Python's own way out takes a second to undo torch's and transformers' imports."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def guard_rank(run: Callable[[], int]) -> int:
    """The rank's exit code; whatever ends it early is left where the agent (ours or torchrun) looks for it."""
    rank = int(os.environ["RANK"])
    die_with_parent()
    if rank > 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides what Ctrl-C means
    try:
        return run()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except UserError as error:
        record(error)
        if "MMDIST_AGENT" not in os.environ:  # our agent shows it, torchrun would bury it
            print(f"error: {error}" if rank == 0 else f"error: rank {rank}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Exception as error:
        record(error)
        if "MMDIST_AGENT" not in os.environ:
            traceback.print_exc()
        return EXIT_FAILED


def record(error: Exception) -> None:
    """Leave the error where the agent looks; one that is stopping all ranks meanwhile would find half a file."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    get_error_handler().record_exception(error)


def die_with_parent() -> None:
    """Ask Linux to end this process when the agent is gone, even by kill -9."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
