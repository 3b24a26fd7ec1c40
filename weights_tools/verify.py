"""Check a checkpoint or split folder: hashes and values; --against: its source; --deep: a prompt through both.

Against the folder it was split from, the parts are cut again; against the plain one it was quantised from, a table of
errors says how far each weight is off. Exit code 0: all is well; 1: problems, one line each on stdout.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmdist.config import DTYPES, UserError
from mmdist.manifest import MANIFEST
from mmdist.quant_files import find_format, read_json
from mmdist.rank_file import sha256
from mmdist.weights import find_files, find_index, open_safetensors
from weights_tools.deep import PICTURE, PROMPT, Question, compare_answers, show_answers
from weights_tools.display import byte_bar
from weights_tools.folder import CONVERSION, EXPORT, QUANTIZATION, absolute
from weights_tools.offsets import NOT_PORTABLE, find_offsets
from weights_tools.quant_checks import LayerError, check_quantised, show_errors
from weights_tools.source import find_family, load_plan, open_source
from weights_tools.split_checks import check_split
from weights_tools.values import bad_values
from weights_tools.whole import open_whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a folder made by split or quantize, or any checkpoint")
    parser.add_argument("--against", metavar="SRC", help="the checkpoint that DIR was split or quantised from")
    parser.add_argument("--deep", action="store_true", help="ask DIR and SRC the same and compare their logits")
    parser.add_argument("--prompt", metavar="TEXT", help=f"what --deep asks; default: {PROMPT}")
    parser.add_argument("--image", metavar="FILE", help="about which picture; default: one that is shipped")
    parser.add_argument("--dtype", choices=DTYPES, help="that --deep computes in; default: float32")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def run(args: argparse.Namespace) -> int:
    folder = absolute(args.folder)
    against = None if args.against is None else absolute(args.against)
    for asked in (folder, against):
        if asked is not None and not asked.is_dir():
            raise UserError(f"{asked}: no such folder; give one made by weights_tools split, or a checkpoint")
    question = read_question(args)
    report = check(folder, against, deep=question is not None)
    if question is not None and against is not None and report.is_sound:
        report.answers = compare_answers(folder, against, question)
    if report.is_sound:
        report.warnings = list(warn_of_offsets(folder))
    if args.json:
        print(json.dumps(report.facts(), indent=1))
    else:
        report.show()
    return 1 if report.problems else 0


def read_question(args: argparse.Namespace) -> Question | None:
    """What --deep asks; None without it."""
    if not args.deep:
        for name in ("prompt", "image", "dtype"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name}: says what --deep asks; add --deep")
        return None
    if args.against is None:
        raise UserError("--deep: asks two checkpoints the same; give the other one as --against SRC")
    image = PICTURE if args.image is None else absolute(args.image)
    if not image.is_file():
        raise UserError(f"--image {image}: no such picture")
    return Question(args.prompt or PROMPT, image, args.dtype or "float32")


@dataclass
class Report:
    """problems: one line each. errors: of the quantised weights. is_sound: the folder itself is as it should be,
    whatever it is compared with. answers: what --deep found. warnings: what works here and may not elsewhere."""

    folder: Path
    problems: list[str]
    errors: list[LayerError]
    is_sound: bool
    answers: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        layers = [error.facts() for error in self.errors]
        return {
            "folder": str(self.folder),
            "problems": self.problems,
            "warnings": self.warnings,
            "layers": layers,
            "deep": self.answers,
        }

    def show(self) -> None:
        if self.errors:
            show_errors(self.errors)
        if self.answers is not None:
            show_answers(self.answers)
        for line in [*(f"warning: {words}" for words in self.warnings), *self.problems]:
            print(line)
        print(f"{self.folder}: {f'{len(self.problems)} problems' if self.problems else 'all is well'}")


def check(folder: Path, against: Path | None, *, deep: bool) -> Report:
    is_split = (folder / MANIFEST).exists()
    if against is not None and find_format(against) is None and find_format(folder) is not None:
        damage = list(check_split(folder, None) if is_split else check_source(folder))
        errors, problems = ([], damage) if damage else check_quantised(folder, against)
        return Report(folder, problems, errors, not damage)
    if not (is_split or against is None or deep):
        raise UserError(
            f"{folder}: neither split nor quantised, as --against is for; weights_tools diff compares any two"
        )
    problems = list(check_split(folder, against) if is_split else check_source(folder))
    return Report(folder, problems, [], not problems)


def warn_of_offsets(folder: Path) -> Iterator[str]:
    if find_format(folder) is not None and (names := find_offsets(open_whole(folder)[1])):
        yield (
            f"{folder}: {len(names)} offsets are not zero (first: {names[0]}); such a folder is not portable: "
            f"{NOT_PORTABLE}; weights_tools quantize makes one without offsets from the plain checkpoint"
        )


def check_source(folder: Path) -> Iterator[str]:
    """Problems of a folder of whole tensors."""
    files, (record, hashes) = find_files(folder), recorded_hashes(folder)
    names: dict[str, list[str]] = {}
    with byte_bar(sum(path.stat().st_size for path in files if path.exists()), "verifying") as bar:
        for path in files:
            try:
                with open_safetensors(path) as file:
                    names[path.name] = list(file.keys())
            except UserError as error:
                yield str(error)
                continue
            for name in names[path.name]:
                with open_safetensors(path) as file:
                    tensor = file.get_tensor(name)
                yield from (f"{path}: {name} {words}" for words in bad_values(tensor))
                if name in hashes and sha256(tensor) != hashes[name]:
                    yield f"{path}: {name} is damaged: its sha256 is not the one in {record}"
                bar.update(tensor.nbytes)
                del tensor
    if len(names) == len(files):
        yield from check_index(folder, names)
        networks = recorded_networks(folder)
        yield from check_plan(folder) if networks is None else check_networks(folder, networks)


def recorded_hashes(folder: Path) -> tuple[str, dict[str, str]]:
    """(file that has them, stored name -> sha256), where quantize, export or convert made the folder."""
    if (folder / QUANTIZATION).exists():
        entries = read_json(folder / QUANTIZATION)["tensors"]
        return QUANTIZATION, {name: found for entry in entries for name, found in entry["stored"].items()}
    for record in (EXPORT, CONVERSION):
        if (folder / record).exists():
            return record, read_json(folder / record).get("sha256", {})  # older conversions have none
    return "", {}


def recorded_networks(folder: Path) -> dict[str, str] | None:
    """ONNX file -> sha256, where the tensors are those of such files."""
    record = folder / EXPORT
    return read_json(record).get("networks") if record.exists() else None


def check_networks(folder: Path, networks: dict[str, str]) -> Iterator[str]:
    for name, known in networks.items():
        if not (folder / name).exists():
            yield f"{folder / name} is missing"
        elif hashlib.sha256((folder / name).read_bytes()).hexdigest() != known:
            yield f"{folder / name} is damaged: its sha256 is not the one in {EXPORT}"


def check_index(folder: Path, names: dict[str, list[str]]) -> Iterator[str]:
    """The index and the files name each other. names: file -> tensors in it."""
    path = find_index(folder)
    if not path.exists():
        return
    listed = {(name, file) for name, file in json.loads(path.read_text())["weight_map"].items()}
    there = {(name, file) for file, inside in names.items() for name in inside}
    yield from (f"{path}: {name} is listed in {file} but is not there" for name, file in sorted(listed - there))
    yield from (f"{path}: {name} is in {file} but is not listed" for name, file in sorted(there - listed))


def check_plan(folder: Path) -> Iterator[str]:
    """The tensors are those of the model that config.json describes."""
    try:
        family = find_family(folder)
        open_source(family, folder).check(load_plan(family, folder, 1)[1], family)
    except UserError as error:
        yield str(error)
