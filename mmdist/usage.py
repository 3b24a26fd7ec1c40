"""What --help prints: groups, every key with its line, examples; read off config.py and conf/."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from mmdist.config import SAMPLING_KEYS, Config, SamplingParams
from mmdist.invocation import program_name
from mmdist.task_config import TASKS

EXAMPLES = """\
Examples
  {command}
  {command} checkpoint=DIR image=FILE prompt="What is in the picture?" world_size=8
  {command} checkpoint=DIR                                  a conversation in the terminal
  {command} task=generate input=requests.jsonl output=answers.jsonl checkpoint=DIR
  {command} task=generate input=FOLDER prompt="Describe the picture." output=answers.jsonl
  {command} task=plan checkpoint=DIR world_size=4 format=json
  {command} task=doctor                                     what this machine has, and what is in the way
  {command} -m task=generate input=requests.jsonl world_size=1,2
  {command} -m task=performance model=llava,llava_next world_size=1,2 output_dir=sweep
  {command} task=performance checkpoint=DIR compare=old/performance.json
  torchrun --nproc-per-node 2 {entry} checkpoint=DIR image=FILE prompt=TEXT
Values of prompt=, image=, input= and other paths are taken as they stand; quote them for the shell only."""


def usage(conf: Path) -> str:
    common = {f.name for f in fields(Config)}
    sections = [f"{program_name()} [KEY=VALUE ...]   (a group is chosen the same way: task=plan)", groups(conf)]
    sections.append(section("Keys of every task", [f for f in fields(Config) if not is_group(f)]))
    sections += [
        section(f"Keys of the group {f.name}", fields(default_of(f)), f"{f.name}.")
        for f in fields(Config)
        if is_group(f)
    ]
    sections.append(section("Sampling keys (tasks chat and generate; also in a request)", fields(SamplingParams)))
    for name, schema in TASKS.items():
        own = [f for f in fields(schema) if f.name not in common and f.name not in SAMPLING_KEYS]
        sections.append(section(f"Keys of task={name}", [f for f in own if not is_group(f)]))
        for f in filter(is_group, own):
            sections.append(section(f"Keys of its group {f.name}", fields(default_of(f)), f"{f.name}."))
    examples = EXAMPLES.format(command=program_name(), entry="-m mmdist" if program_name() == "mmdist" else "launch.py")
    return "\n\n".join([*sections, examples])


def all_keys() -> list[str]:
    """Every key a user can type, groups' keys with their prefix."""
    own = {f.name for schema in TASKS.values() for f in fields(schema) if not is_group(f)}
    groups = {f.name: f for schema in TASKS.values() for f in fields(schema) if is_group(f)}
    return sorted(own) + [f"{name}.{k.name}" for name, f in groups.items() for k in fields(default_of(f))]


def groups(conf: Path) -> str:
    rows = []
    for folder in sorted(path for path in conf.iterdir() if path.is_dir()):
        rows.append(f"  {folder.name:10} {', '.join(sorted(path.stem for path in folder.glob('*.yaml')))}")
    return "\n".join(["Groups", *rows])


def is_group(field: Field) -> bool:
    return is_dataclass(default_of(field))


def default_of(field: Field) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def section(title: str, keys: Iterable[Field], prefix: str = "") -> str:
    return "\n".join([title, *(line(key, prefix) for key in keys)])


def line(key: Field, prefix: str) -> str:
    default = default_of(key)
    shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
    return f"  {prefix + key.name + '=' + shown:38} {key.metadata['help']}"
