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
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmdist.config import EXIT_INTERRUPTED, EXIT_USER_ERROR, FREE_TEXT_KEYS, REPOSITORY, Config, UserError
from mmdist.launch import become_rank, is_rank, leave, run_rank, start
from mmdist.task_config import TASKS
from mmdist.usage import all_keys, usage
from weights_tools.convert import convert_demo

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
    """One job, or with -m one after another, each with its own ranks."""
    codes = []

    @hydra.main(version_base="1.3", config_path=CONF, config_name="config")
    def job(composed: DictConfig) -> None:
        command = [sys.executable, __file__, *HydraConfig.get().overrides.task]
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            composed.output_dir = HydraConfig.get().runtime.output_dir
            command.append(f"output_dir={composed.output_dir}")
        try:
            config = to_config(composed)
            make_demo(config)
            codes.append(start(config, command))
        except (UserError, OmegaConfBaseException) as error:
            codes.append(user_error(error))

    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors reach us, who print them in one line
    sys.argv[1:] = overrides
    job()
    return max(codes, default=0)


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
    text = str(error) if isinstance(error, UserError) else explain(error)
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return EXIT_USER_ERROR


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
    """Quote the values of free-text keys, so that Hydra's grammar does not take prompts and paths apart.

    Left alone: null, a value that is one quoted string already, and with -m a sweep written as choice(...).
    """
    sweep = bool({"-m", "--multirun"} & set(arguments))
    return [quote(argument, sweep) for argument in arguments]


def quote(argument: str, sweep: bool) -> str:
    name, equals, value = argument.partition("=")
    quoted = re.fullmatch(r"""'(\\.|[^'\\])*'|"(\\.|[^"\\])*\"""", value, re.DOTALL)
    if name.lstrip("+") not in FREE_TEXT_KEYS or not equals or quoted or value == "null":
        return argument
    if sweep and re.fullmatch(r"choice\(.*\)", value, re.DOTALL):
        return argument
    value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # not OmegaConf's interpolation either
    return f"{name}={QuotedString(value, Quote.single).with_quotes()}"


if __name__ == "__main__":
    leave(main())
