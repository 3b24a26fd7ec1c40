"""Turn a family's original checkpoint files into one plain folder: config.json, safetensors, tokenizer files.

Written to DST.partial and renamed when whole; run the same command again after a kill and it goes on where it stopped.
config.json comes last, so nothing half-written is taken for a model; conversion.json has the hash of every tensor.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from mmdist.config import ModelConfig, UserError
from mmdist.models.family import build_model, find_model
from mmdist.plan import Plan, shard_plan
from mmdist.rank_file import DTYPES, sha256
from mmdist.shipped import SHIPPED, demo_folder
from mmdist.tp import TP
from mmdist.weights import INDEX, SINGLE
from weights_tools.display import size_words
from weights_tools.folder import CONVERSION, absolute, check_target
from weights_tools.job import Files, FolderJob, add_job_arguments
from weights_tools.layouts import find_layout, list_layouts
from weights_tools.layouts.source import Converted, Deferred, Source, Stored, few
from weights_tools.part_file import Layout

FILE_BYTES = 4 << 30  # a larger model is written as several files, each at most this (or one tensor) long
WORDS = {dtype: word for word, dtype in DTYPES.items()}
CONFIG = "config.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=f"one of {', '.join(list_layouts())}")
    parser.add_argument("--src", metavar="DIR", required=True, help="the folder of original files")
    parser.add_argument("--dst", metavar="DIR", required=True, help="the folder to write")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", type=setting, nargs="+", action="extend", default=[], dest="settings",
        help="what the files do not tell, e.g. num_heads=8; a wrong key is answered with the family's own",
    )  # fmt: skip
    add_job_arguments(parser, ConvertJob.verb)


def setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise argparse.ArgumentTypeError(f"{text} is not KEY=VALUE")
    return key, value


def run(args: argparse.Namespace) -> int:
    layout = find_layout(args.model)
    settings = check_settings(args.model, args.settings, layout.SETTINGS)
    src, dst = absolute(args.src), absolute(args.dst)
    if not src.is_dir():
        raise UserError(f"{src}: no such folder; give the folder of {args.model}'s original files as --src")
    check_target(dst, args.force, ConvertJob.verb)
    job = read_folder(args.model, Source(src, settings))
    if args.dry_run:
        job.check(dst, force=args.force)
    else:
        job.write(dst, force=args.force, jobs=args.jobs)
    if job.ignored:
        where = "" if args.dry_run else f" (all are in {dst / CONVERSION})"
        print(f"{len(job.ignored)} entries known to be unused: {few(job.ignored)}{where}")
    for file, size in job.file_sizes().items():
        print(f"{dst / file}: {size_words(size)}")
    words = "; nothing was written" if args.dry_run else ""
    print(f"{dst}: {args.model}, {len(job.plan)} tensors, {size_words(sum(job.sizes.values()))}{words}")
    return 0


def read_folder(model: str, source: Source) -> ConvertJob:
    return ConvertJob(model, source, find_layout(model).read(source))


def make_demo(model: ModelConfig) -> Path:
    """The family's shipped checkpoint; one with an original layout is converted when it is first asked for."""
    folder = demo_folder(model)
    if model.demo_source is not None and not folder.exists():
        source = SHIPPED / model.demo_source
        print(f"{folder}: made from the original files in {source}", file=sys.stderr)
        read_folder(model.name, Source(source, {})).write(folder, force=False)
    return folder


def check_settings(model: str, given: list[tuple[str, str]], legal: dict[str, str]) -> dict[str, str]:
    settings: dict[str, str] = {}
    for key, value in given:
        if key not in legal:
            words = "; ".join(f"{name}: {line}" for name, line in legal.items()) or "none"
            raise UserError(f"--set {key}={value}: {model} has no such key; it has {words}")
        if key in settings:
            raise UserError(f"--set {key}: given twice, as {settings[key]} and as {value}; give it once")
        settings[key] = value
    return settings


class ConvertJob(FolderJob):
    """What a layout made of a source, checked against the model before anything is written.

    file_of: tensor -> the safetensors file it is written to.
    """

    verb = "convert"

    def __init__(self, model: str, source: Source, converted: Converted):
        copied = [content for content in converted.files.values() if isinstance(content, Path)]
        super().__init__(model, source.folder, [*source.paths, *copied])
        self.source, self.converted, self.tensors = source, converted, converted.tensors
        self.ignored = [*converted.ignored, *source.ignored]
        self.plan = build_plan(model, source.folder, converted.config)
        check_tensors(self.plan, self.tensors, model, source.folder)
        files = group_files(self.tensors)
        self.file_of = {name: file for file, names in files.items() for name in names}
        self.layouts = {file: [self._describe(name) for name in names] for file, names in files.items()}
        self.sizes = {name: num_bytes(tensor) for name, tensor in self.tensors.items()}

    def _describe(self, name: str) -> tuple[str, str, tuple[int, ...]]:
        tensor = self.tensors[name]
        return name, WORDS[tensor.dtype], tuple(tensor.shape)

    def settings(self) -> dict[str, Any]:
        return {"format_version": 1, **self.source.settings}

    def write_tensor(self, name: str, files: Files) -> dict[str, Any]:
        stored = self.tensors[name]
        tensor = stored.make() if isinstance(stored, Deferred) else stored
        files[self.file_of[name]].write(name, tensor)
        return {"name": name, "sha256": sha256(tensor)}

    def write_rest(self, folder: Path, entries: list[dict[str, Any]]) -> None:
        for name, content in self.converted.files.items():
            if isinstance(content, Path):
                shutil.copyfile(content, folder / name)
            else:
                (folder / name).write_text(content)
        if len(self.layouts) > 1:
            (folder / INDEX).write_text(index_text(self.layouts, sum(self.sizes.values())))
        (folder / CONVERSION).write_text(json.dumps(self._record(entries), indent=1) + "\n")
        (folder / CONFIG).write_text(json.dumps(self.converted.config, indent=1) + "\n")

    def _record(self, entries: list[dict[str, Any]]) -> dict[str, Any]:
        """Where the folder comes from, what was left out, and the proof for every tensor."""
        source = self.source
        return {
            "model": self.model,
            "source": str(source.folder),
            "settings": source.settings,
            "ignored": self.ignored,
            "sha256": {entry["name"]: entry["sha256"] for entry in entries},
        }


def build_plan(model: str, src: Path, config: dict[str, Any]) -> Plan:
    """The plan of the model that will be read from the folder."""
    family = find_model(model)
    try:
        parsed = family.config_class.from_dict(json.loads(json.dumps(config)))
    except StrictDataclassError as error:
        raise UserError(f"{src}: makes no {model} config: {' '.join(str(error).split())}") from error
    return shard_plan(build_model(family, parsed, TP(), torch.float32), TP())


def check_tensors(plan: Plan, tensors: Mapping[str, Stored], model: str, src: Path) -> None:
    """Refuse missing, unexpected and misshapen tensors."""
    problems = []
    if missing := plan.keys() - tensors.keys():
        problems.append(f"{len(missing)} missing ({few(missing)})")
    if unexpected := tensors.keys() - plan.keys():
        problems.append(f"{len(unexpected)} unexpected ({few(unexpected)})")
    if loose := {name for name, value in tensors.items() if not isinstance(value, torch.Tensor | Deferred)}:
        problems.append(f"{len(loose)} that are no tensors ({few(loose)})")
    wrong = [
        f"{name} is {list(tensors[name].shape)}, expected {list(plan[name].shape)}"
        for name in (plan.keys() & tensors.keys()) - loose
        if tuple(tensors[name].shape) != plan[name].shape
    ]
    if wrong:
        problems.append(f"{len(wrong)} of another shape ({few(wrong)})")
    if problems:
        raise UserError(f"{src}: not the tensors of one {model}: {'; '.join(problems)}")
    for name, tensor in tensors.items():
        if tensor.dtype not in WORDS:
            raise UserError(f"{src}: {name} is {tensor.dtype}; mmdist reads {', '.join(map(str, WORDS))}")


def group_files(tensors: Mapping[str, Stored]) -> dict[str, list[str]]:
    """Names of the safetensors files, as Hugging Face has them -> the tensors in each, in their order."""
    groups: list[list[str]] = []
    room = 0
    for name, tensor in tensors.items():
        if num_bytes(tensor) > room or not groups:
            groups.append([])
            room = FILE_BYTES
        groups[-1].append(name)
        room -= num_bytes(tensor)
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": names for n, names in enumerate(groups, 1)}


def index_text(layouts: Mapping[str, Layout], total_size: int) -> str:
    """The index of several files."""
    weight_map = {name: file for file, layout in layouts.items() for name, *_ in layout}
    return json.dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map}, indent=1) + "\n"


def num_bytes(tensor: Stored) -> int:
    return tensor.shape.numel() * tensor.dtype.itemsize
