"""Compose the config; become a rank if a launcher already made us one, else start the ranks.

python launch.py --help
"""

from __future__ import annotations

import os
import re
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmdist.config import EXIT_INTERRUPTED, EXIT_USER_ERROR, FREE_TEXT_KEYS, MAP_KEYS, REPOSITORY, Config, UserError
from mmdist.launch import become_rank, is_rank, leave, run_rank, start
from mmdist.sweep import run_sweep
from mmdist.task_config import TASKS
from mmdist.tasks.job import SweepJob
from mmdist.usage import all_keys, usage
from weights_tools.convert import convert_demo

SWEEP_FLAGS = {"-m", "--multirun"}
CONF = str(Path(__file__).parent / "conf")


def main() -> int:
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(usage(Path(CONF)))
        return 0
    try:
        register_schemas()
        overrides = quote_free_text(arguments)
        return run_as_rank(overrides) if is_rank() else run_as_parent(overrides)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        return user_error(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def register_schemas() -> None:
    """Each task's keys, so that Hydra refuses unknown names and wrong types."""
    for name, schema in TASKS.items():
        ConfigStore.instance().store(group="schema", name=name, node=schema, package="_global_")


def run_as_rank(overrides: list[str]) -> NoReturn:
    """Under torchrun or our agent. Composes without hydra.main, which would make an output folder on every rank."""

    def run() -> int:
        with hydra.initialize_config_dir(CONF, version_base="1.3"):
            config = to_config(hydra.compose("config", overrides))
        return run_rank(config)

    become_rank(run)


def run_as_parent(overrides: list[str]) -> int:
    """One job, or with -m one after another."""
    if SWEEP_FLAGS & set(overrides):
        return sweep(overrides)
    for words, composed, _ in compose(overrides):
        config = to_config(composed)
        make_demo(config)
        return start(config, [sys.executable, __file__, *words])
    return 0  # Hydra was asked something and has answered


def compose(overrides: list[str]) -> list[tuple[list[str], DictConfig, Path]]:
    """Of each job the words of its command line, its config and the folder that Hydra has for them."""
    jobs: list[tuple[list[str], DictConfig, Path]] = []

    @hydra.main(version_base="1.3", config_path=CONF, config_name="config")
    def collect(composed: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        jobs.append((list(hydra_config.overrides.task), composed, Path(hydra_config.runtime.output_dir)))

    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors reach us, who print them in one line
    sys.argv[1:] = overrides
    collect()
    return jobs


def sweep(overrides: list[str]) -> int:
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
    return run_sweep(jobs, composed[0][2], [sys.executable, __file__]) if jobs else 0


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


def unquote(value: str) -> str:
    quoted = re.fullmatch(r"""(['"])(.*)\1""", value, re.DOTALL)
    return re.sub(r"\\(['\\])", r"\1", quoted[2]) if quoted else value


def make_demo(config: Config) -> None:
    """The shipped checkpoint of a family with an original layout is converted when it is first asked for."""
    model = config.model
    if config.checkpoint is None and model.demo_source is not None and model.demo_checkpoint is not None:
        convert_demo(model.name, REPOSITORY / model.demo_source, REPOSITORY / model.demo_checkpoint)


def to_config(composed: DictConfig) -> Config:
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    return config


def user_error(error: Exception) -> int:
    print(f"error: {describe(error)}", file=sys.stderr)
    return EXIT_USER_ERROR


def describe(error: Exception) -> str:
    """In one line."""
    return " ".join((str(error) if isinstance(error, UserError) else explain(error)).split())


def explain(error: Exception) -> str:
    """What Hydra or OmegaConf refused, in our words: the key or value, and what is legal."""
    text = str(error).partition("Config search path:")[0]
    unknown = re.match(r"Could not override '(.*)'", text) or re.match(r"Key '(.*)' is not in struct", text)
    if unknown:
        close = get_close_matches(unknown[1], all_keys(), n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"{unknown[1]}: this task has no such key; {hint}python launch.py --help lists them"
    cause = str(error.__cause__).partition("full_key")[0] if error.__cause__ else ""
    return f"{text} {cause}; python launch.py --help lists keys, groups and their values"


def quote_free_text(arguments: list[str]) -> list[str]:
    """Quote the values of free-text keys, so that Hydra's grammar does not take prompts and paths apart; mark maps.

    Left alone: null, a value that is one quoted string already, and with -m a sweep written as choice(...).
    """
    sweep = bool(SWEEP_FLAGS & set(arguments))
    return [quote(argument, sweep) for argument in arguments]


def quote(argument: str, sweep: bool) -> str:
    name, equals, value = argument.partition("=")
    if name in MAP_KEYS:
        return f"++{argument}"  # Hydra takes a map's new keys only so
    quoted = re.fullmatch(r"""'(\\.|[^'\\])*'|"(\\.|[^"\\])*\"""", value, re.DOTALL)
    if name.lstrip("+") not in FREE_TEXT_KEYS or not equals or quoted or value == "null":
        return argument
    if sweep and re.fullmatch(r"choice\(.*\)", value, re.DOTALL):
        return argument
    return f"{name}={quote_text(value)}"


def quote_text(value: str) -> str:
    value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # not OmegaConf's interpolation either
    return QuotedString(value, Quote.single).with_quotes()


if __name__ == "__main__":
    leave(main())
