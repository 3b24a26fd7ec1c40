"""Check a split folder or a checkpoint: every hash and value; with --against, that the parts are cut from that source.

Exit code 0: all is well; 1: problems, one line each on stdout.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from mmdist.config import UserError
from mmdist.manifest import MANIFEST
from mmdist.quant_files import read_json
from mmdist.weights import find_files, find_index, open_safetensors, sha256
from weights_tools.display import byte_bar
from weights_tools.folder import QUANTIZATION, absolute
from weights_tools.source import find_family, load_plan, open_source
from weights_tools.split_checks import check_split
from weights_tools.values import bad_values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a folder made by split, or a checkpoint")
    parser.add_argument("--against", metavar="SRC", help="the checkpoint that DIR was split from")


def run(args: argparse.Namespace) -> int:
    folder = absolute(args.folder)
    against = None if args.against is None else absolute(args.against)
    for asked in (folder, against):
        if asked is not None and not asked.is_dir():
            raise UserError(f"{asked}: no such folder; give one made by weights_tools split, or a checkpoint")
    is_split = (folder / MANIFEST).exists()
    if against is not None and not is_split:
        raise UserError(f"{folder}: no {MANIFEST} in it; --against is for folders made by weights_tools split")
    num_problems = 0
    for problem in check_split(folder, against) if is_split else check_source(folder):
        tqdm.write(problem)
        num_problems += 1
    print(f"{folder}: {f'{num_problems} problems' if num_problems else 'all is well'}")
    return 1 if num_problems else 0


def check_source(folder: Path) -> Iterator[str]:
    """Problems of a folder of whole tensors."""
    files, hashes = find_files(folder), quantised_hashes(folder)
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
                    yield f"{path}: {name} is damaged: its sha256 is not the one in {QUANTIZATION}"
                bar.update(tensor.nbytes)
                del tensor
    if len(names) == len(files):
        yield from check_index(folder, names)
        yield from check_plan(folder)


def quantised_hashes(folder: Path) -> dict[str, str]:
    """Stored name -> sha256, where quantize made the folder."""
    path = folder / QUANTIZATION
    if not path.exists():
        return {}
    return {name: found for entry in read_json(path)["tensors"] for name, found in entry["stored"].items()}


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
