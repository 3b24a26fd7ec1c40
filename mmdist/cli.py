"""The command line: become a rank if a launcher already made us one, else start the ranks; with -m job after job."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmdist.compose import (
    REFUSALS,
    SWEEP_FLAGS,
    compose_config,
    describe,
    quote_free_text,
    quote_text,
    register_schemas,
    to_config,
    unquote,
)
from mmdist.config import EXIT_INTERRUPTED, EXIT_USER_ERROR, FREE_TEXT_KEYS, UserError
from mmdist.invocation import PROGRAM, is_rank
from mmdist.launch import become_rank, leave, run_rank, start
from mmdist.shipped import CONF
from mmdist.sweep import run_sweep
from mmdist.tasks.job import SweepJob
from mmdist.usage import usage
from weights_tools.convert import make_demo


def program() -> NoReturn:
    """The console script."""
    leave(main())


def main(program: Sequence[str] = PROGRAM) -> int:
    """The exit code. program: what starts another process like this one, less its words."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(usage(CONF))
        return 0
    try:
        overrides = quote_free_text(arguments)
        return run_as_rank(overrides) if is_rank() else run_as_parent(overrides, program)
    except REFUSALS as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def run_as_rank(overrides: list[str]) -> NoReturn:
    """Under torchrun or our agent."""
    become_rank(lambda: run_rank(compose_config(overrides)))


def run_as_parent(overrides: list[str], program: Sequence[str]) -> int:
    """One job, or with -m one after another."""
    if SWEEP_FLAGS & set(overrides):
        return sweep(overrides, program)
    for words, composed, _ in compose(overrides):
        config = to_config(composed)
        if config.checkpoint is None and config.model.demo_checkpoint is not None:
            make_demo(config.model)
        return start(config, program, words)
    return 0  # Hydra was asked something and has answered


def compose(overrides: list[str]) -> list[tuple[list[str], DictConfig, Path]]:
    """Of each job the words of its command line, its config and the folder that Hydra has for them."""
    jobs: list[tuple[list[str], DictConfig, Path]] = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def collect(composed: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        jobs.append((list(hydra_config.overrides.task), composed, Path(hydra_config.runtime.output_dir)))

    register_schemas()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors reach us, who print them in one line
    sys.argv[1:] = overrides
    collect()
    return jobs


def sweep(overrides: list[str], program: Sequence[str]) -> int:
    """output_dir= is the sweep's folder, in which every job has one of its own."""
    swept = swept_keys(overrides)
    if "output_dir" in swept:
        raise UserError("output_dir= is the folder of the whole sweep, with a folder of each job in it: give one")
    folders = [word.partition("=")[2] for word in overrides if word.startswith("output_dir=")]
    try:
        composed = compose([*overrides, *(f"hydra.sweep.dir={folder}" for folder in folders[-1:])])
    except HydraException:  # some of which are OSErrors
        raise
    except OSError as error:
        raise UserError(
            f"{error.filename}: cannot write there ({error.strerror}); choose another output_dir="
        ) from error
    jobs = [make_job(words, config, swept) for words, config, _ in composed]
    return run_sweep(jobs, composed[0][2], program) if jobs else 0


def swept_keys(overrides: list[str]) -> list[str]:
    words = [word for word in overrides if "=" in word and not word.startswith("-")]
    return [word.key_or_group for word in OverridesParser.create().parse_overrides(words) if word.is_sweep_override()]


def make_job(words: list[str], composed: DictConfig, swept: list[str]) -> SweepJob:
    words = [retype(word, composed) for word in words]
    values = {word.partition("=")[0].lstrip("+"): word.partition("=")[2] for word in words}
    changed = {key: unquote(values[key]) for key in swept}
    try:
        return SweepJob(words, changed, to_config(composed))
    except (UserError, OmegaConfBaseException) as error:
        return SweepJob(words, changed, None, describe(error))


def retype(word: str, composed: DictConfig) -> str:
    """A word of Hydra's as a user would type it: Hydra puts backslashes into the free text of a sweep."""
    name = word.partition("=")[0]
    if name.lstrip("+") not in FREE_TEXT_KEYS:
        return word
    value = OmegaConf.select(composed, name.lstrip("+"))
    return f"{name}=null" if value is None else f"{name}={quote_text(str(value))}"
