"""Compare two checkpoints tensor by tensor: plain, quantised (dequantised for it) or split folders.

Exit code 0: equal; 1: different.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmdist.config import UserError
from weights_tools.compare import Comparison, Weights, compare, open_pair
from weights_tools.display import byte_bar, show_table
from weights_tools.folder import absolute


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="A", help="a checkpoint, or a folder made by split")
    parser.add_argument("second", metavar="B", help="another")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def run(args: argparse.Namespace) -> int:
    folders = [absolute(args.first), absolute(args.second)]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give a checkpoint, or a folder made by weights_tools split")
    facts = describe(*folders)
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        show(facts)
    return 0 if facts["equal"] else 1


@dataclass
class Row:
    """One tensor that both have. comparison: None where the shapes differ."""

    name: str
    dtypes: list[str]
    shapes: list[list[int]]
    comparison: Comparison | None

    @property
    def is_equal(self) -> bool:
        same = self.dtypes[0] == self.dtypes[1] and self.comparison is not None
        return same and self.comparison is not None and self.comparison.is_equal

    def facts(self) -> dict[str, Any]:
        numbers = {} if self.comparison is None else {k: finite(v) for k, v in asdict(self.comparison).items()}
        return {"name": self.name, "equal": self.is_equal, "dtypes": self.dtypes, "shapes": self.shapes, **numbers}


def finite(number: float) -> float | str:
    """JSON has no infinities and no NaN."""
    return number if math.isfinite(number) else str(number)


def describe(first: Path, second: Path) -> dict[str, Any]:
    a, b = open_pair(first, second)
    common = [name for name in a.names if name in b.names]
    only = [[x.names[name] for name in x.names if name not in y.names] for x, y in ((a, b), (b, a))]
    rows = []
    with byte_bar(sum(math.prod(a.shape(name)) for name in common), "comparing", unit=" values") as bar:
        for name in common:
            rows.append(compare_tensor(a, b, name))
            bar.update(math.prod(a.shape(name)))
    return {
        "a": str(first),
        "b": str(second),
        "equal": not any(only) and all(row.is_equal for row in rows),
        "num_common": len(rows),
        "num_different": sum(not row.is_equal for row in rows),
        "only_in_a": only[0],
        "only_in_b": only[1],
        "tensors": [row.facts() for row in rows],
    }


def compare_tensor(a: Weights, b: Weights, name: str) -> Row:
    shapes = [a.shape(name), b.shape(name)]
    same = shapes[0] == shapes[1]
    comparison = compare(zip(a.blocks(name), b.blocks(name), strict=True)) if same else None
    return Row(a.names[name], [a.dtype(name), b.dtype(name)], [list(shape) for shape in shapes], comparison)


def show(facts: dict[str, Any]) -> None:
    different = [row for row in facts["tensors"] if not row["equal"]]
    if different:
        show_table([("tensor", "dtype", "shape", "max abs", "RMS", "cosine", "equal"), *map(cells, different)])
    for key in ("a", "b"):
        for name in facts[f"only_in_{key}"]:
            print(f"only in {facts[key]}: {name}")
    num_only = len(facts["only_in_a"]) + len(facts["only_in_b"])
    words = f"{facts['num_different']} of {facts['num_common']} common tensors differ, {num_only} are in one alone"
    print("equal" if facts["equal"] else words, end=f": {facts['a']} and {facts['b']}\n")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    dtype, shape = (" / ".join(dict.fromkeys(map(str, row[key]))) for key in ("dtypes", "shapes"))
    if "max_abs" not in row:
        return (row["name"], dtype, shape, "-", "-", "-", "-")
    numbers = (f"{float(row['max_abs']):.3g}", f"{float(row['rms']):.3g}", f"{float(row['cosine']):.7f}")
    return (row["name"], dtype, shape, *numbers, f"{row['num_equal']} of {row['num_values']}")
