"""From a command line's words to a checked Config: Hydra's part of the work, which ends here and in mmdist.cli."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmdist.config import FREE_TEXT_KEYS, MAP_KEYS, Config, UserError
from mmdist.invocation import program_name
from mmdist.shipped import CONF
from mmdist.task_config import TASKS
from mmdist.usage import all_keys

SWEEP_FLAGS = {"-m", "--multirun"}
REFUSALS = (UserError, HydraException, OmegaConfBaseException)  # of what a user asked; `describe` words them


def register_schemas() -> None:
    """Each task's keys, so that Hydra refuses unknown names and wrong types."""
    for name, schema in TASKS.items():
        ConfigStore.instance().store(group="schema", name=name, node=schema, package="_global_")


def compose_config(overrides: Sequence[str]) -> Config:
    """The config of one job, without what hydra.main does besides (an output folder); overrides as quoted."""
    register_schemas()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return to_config(hydra.compose("config", list(overrides)))


def to_config(composed: DictConfig) -> Config:
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    return config


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
        return f"{unknown[1]}: this task has no such key; {hint}{program_name()} --help lists them"
    cause = str(error.__cause__).partition("full_key")[0] if error.__cause__ else ""
    return f"{text} {cause}; {program_name()} --help lists keys, groups and their values"


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


def unquote(value: str) -> str:
    quoted = re.fullmatch(r"""(['"])(.*)\1""", value, re.DOTALL)
    return re.sub(r"\\(['\\])", r"\1", quoted[2]) if quoted else value
