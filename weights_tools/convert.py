"""Turn a family's original checkpoint files into one plain folder: config.json, safetensors, tokenizer files.

Written to DST.partial and renamed when whole; config.json comes last, so nothing half-written is taken for a model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from mmdist.config import UserError
from mmdist.models.family import build_model, find_model
from mmdist.plan import Plan, shard_plan
from mmdist.rank_file import DTYPES
from mmdist.tp import TP
from mmdist.weights import INDEX, SINGLE
from weights_tools.display import byte_bar, size_words
from weights_tools.folder import CONVERSION, absolute, check_space, check_target, claim, publish, sync_all
from weights_tools.layouts import find_layout, list_layouts
from weights_tools.layouts.source import Converted, Deferred, Source, Stored, few
from weights_tools.part_file import Layout, PartFile, build_header

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
    parser.add_argument("--force", action="store_true", help="replace DST when it is a folder made by convert")
    parser.add_argument("--dry-run", action="store_true", help="check everything and write nothing")


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
    check_target(dst, args.force, "convert")
    job = read_folder(args.model, Source(src, settings))
    if not args.dry_run:
        job.write(dst, force=args.force)
    if job.ignored:
        where = "" if args.dry_run else f" (all are in {dst / CONVERSION})"
        print(f"{len(job.ignored)} entries known to be unused: {few(job.ignored)}{where}")
    for file, size in job.file_sizes().items():
        print(f"{dst / file}: {size_words(size)}")
    words = "; nothing was written" if args.dry_run else ""
    print(f"{dst}: {args.model}, {len(job.plan)} tensors, {size_words(job.num_bytes)}{words}")
    return 0


def read_folder(model: str, source: Source) -> ConvertJob:
    return ConvertJob(model, source, find_layout(model).read(source))


def convert_demo(model: str, src: Path, dst: Path) -> None:
    """The plain folder of a family's shipped files, made where it is not there yet."""
    if not dst.exists():
        print(f"{dst}: made from the original files in {src}", file=sys.stderr)
        read_folder(model, Source(src, {})).write(dst, force=False)


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


class ConvertJob:
    """What a layout made of a source, checked against the model before anything is written.

    files: name of each safetensors file -> the tensors in it.
    """

    def __init__(self, model: str, source: Source, converted: Converted):
        self.model, self.source, self.converted = model, source, converted
        self.tensors = converted.tensors
        self.ignored = [*converted.ignored, *source.ignored]
        self.plan = build_plan(model, source.folder, converted.config)
        check_tensors(self.plan, self.tensors, model, source.folder)
        self.files = group_files(self.tensors)

    @property
    def num_bytes(self) -> int:
        return sum(map(num_bytes, self.tensors.values()))

    def layout(self, file: str) -> Layout:
        stored = {name: self.tensors[name] for name in self.files[file]}
        return [(name, WORDS[tensor.dtype], tuple(tensor.shape)) for name, tensor in stored.items()]

    def file_sizes(self) -> dict[str, int]:
        """File name -> bytes."""
        return {file: build_header(self.layout(file))[2] for file in self.files}

    def write(self, dst: Path, *, force: bool) -> None:
        partial = dst.with_name(f"{dst.name}.partial")
        check_space(partial, self.file_sizes())
        with claim(partial, "convert", self._record()):
            with byte_bar(self.num_bytes, "converting") as bar:
                for file in self.files:
                    for size in self._write_file(partial / file):
                        bar.update(size)
            self._write_other_files(partial)
            sync_all([*partial.iterdir(), partial])
            publish(partial, dst, force, "convert")

    def _record(self) -> dict[str, Any]:
        """Where the folder comes from, and what was left out."""
        source = self.source
        return {
            "model": self.model,
            "source": str(source.folder),
            "settings": source.settings,
            "ignored": self.ignored,
        }

    def _write_file(self, path: Path) -> Iterator[int]:
        """Bytes of each tensor as it is written."""
        file = PartFile(path, self.layout(path.name))
        try:
            for name in self.files[path.name]:
                stored = self.tensors[name]
                file.write(name, stored.make() if isinstance(stored, Deferred) else stored)
                yield num_bytes(stored)
        finally:
            file.close()

    def _write_other_files(self, folder: Path) -> None:
        for name, content in self.converted.files.items():
            if isinstance(content, Path):
                shutil.copyfile(content, folder / name)
            else:
                (folder / name).write_text(content)
        if len(self.files) > 1:
            (folder / INDEX).write_text(index_text(self.files, self.num_bytes))
        (folder / CONFIG).write_text(json.dumps(self.converted.config, indent=1) + "\n")


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


def index_text(files: Mapping[str, list[str]], total_size: int) -> str:
    """The index of several files. files: name -> the tensors in it."""
    weight_map = {name: file for file, names in files.items() for name in names}
    return json.dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map}, indent=1) + "\n"


def num_bytes(tensor: Stored) -> int:
    return tensor.shape.numel() * tensor.dtype.itemsize
