"""Two checkpoints as numbers, quantised weights dequantised: block by block, so that no tensor is held twice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from mmdist.config import UserError
from mmdist.manifest import MANIFEST, load_manifest
from mmdist.quant import Quantized
from mmdist.quant_files import find_format
from mmdist.weights import Checkpoint
from weights_tools.source import find_family
from weights_tools.whole import JoinedCheckpoint, open_whole

BLOCK = 1 << 18  # numbers compared in one go: what is made of them stays in the processor's cache


class Weights:
    """A folder's tensors as numbers. names: the name to compare by -> the name in the folder.

    quantised: of these, each with the names of the tensors it is stored as, by their last word.
    """

    def __init__(self, folder: Path, *, by_family: bool):
        self.checkpoint = open_whole(folder)[1] if by_family else open_as_stored(folder)
        self.format = find_format(folder) if (folder / "config.json").exists() else None
        self.quantised = dict(self._find_quantised())
        parts = {name for leaves in self.quantised.values() for name in leaves.values()}
        stored = self.checkpoint.names
        self.names = {name: stored[name] for name in stored if name not in parts}
        for name, leaves in self.quantised.items():
            self.names[name] = f"{stored[next(iter(leaves.values()))].rpartition('.')[0]}.weight"

    def _find_quantised(self) -> Iterator[tuple[str, dict[str, str]]]:
        if self.format is None:
            return
        for name in self.checkpoint.names:
            module, _, leaf = name.rpartition(".")
            if leaf == "weight_scale":
                yield f"{module}.weight", {leaf: f"{module}.{leaf}" for leaf in self.format.names}

    def dtype(self, name: str) -> str:
        """safetensors' word, or the scheme's (w8a16)."""
        if name not in self.quantised:
            return self.checkpoint.dtypes[name]
        assert self.format is not None, "tensors are quantised in a format"
        return self.format.scheme.name

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.quantised:
            return self.checkpoint.shapes[name]
        assert self.format is not None, "tensors are quantised in a format"
        return self.format.weight_shape({leaf: self.checkpoint.shapes[n] for leaf, n in self.quantised[name].items()})

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor's rows, (rows, numbers of a row) at a time; the same rows for every tensor of one shape."""
        if name in self.quantised:
            yield from (block.dequantize() for block in self.quantised_blocks(name))
            return
        full = self.checkpoint.read_whole(name)
        rows = full.flatten(1) if full.dim() > 1 else full.reshape(-1, 1)
        yield from rows.split(rows_of(rows.shape[1]))

    def quantised_blocks(self, name: str) -> Iterator[Quantized]:
        assert self.format is not None, "tensors are quantised in a format"
        stored = {leaf: self.checkpoint.read_whole(part) for leaf, part in self.quantised[name].items()}
        rows, columns = self.shape(name)
        for first in range(0, rows, rows_of(columns)):
            last = min(rows, first + rows_of(columns))
            # Where two rows share a byte, a tensor has half as many.
            yield self.format.read(
                {leaf: x[first * len(x) // rows : last * len(x) // rows] for leaf, x in stored.items()}
            )


def rows_of(columns: int) -> int:
    """An even number."""
    return 2 * max(1, BLOCK // max(1, 2 * columns))


def open_as_stored(folder: Path) -> Checkpoint:
    return JoinedCheckpoint(folder, {}) if (folder / MANIFEST).exists() else Checkpoint(folder, {})


def open_pair(first: Path, second: Path) -> tuple[Weights, Weights]:
    """Names are compared as their family has them where both folders are of one; else as they are stored."""
    family = known_family(first)
    by_family = family is not None and family == known_family(second)
    return Weights(first, by_family=by_family), Weights(second, by_family=by_family)


def known_family(folder: Path) -> str | None:
    if (folder / MANIFEST).exists():
        return load_manifest(folder).model
    try:
        return find_family(folder)
    except UserError:  # no config.json, or another kind of model: its tensors can be compared all the same
        return None


@dataclass
class Comparison:
    """Of the numbers of two tensors. rms: of their differences; cosine: of the angle between them."""

    max_abs: float
    rms: float
    cosine: float
    num_equal: int
    num_values: int

    @property
    def is_equal(self) -> bool:
        return self.num_equal == self.num_values


def compare(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Comparison:
    """Blocks of two tensors of one shape -> how far they are apart; NaN equals NaN, infinity its like."""
    largest, squares, dot, first_norm, second_norm = 0.0, 0.0, 0.0, 0.0, 0.0
    num_equal = num_values = 0
    for block, other in pairs:
        num_values += block.numel()
        a, b = block.flatten(), other.flatten()
        if not a.numel() or (a.dtype == b.dtype and torch.equal(a, b)):
            num_equal, a = num_equal + a.numel(), a.double()
            norm = sum_products(a, a)
            dot, first_norm, second_norm = dot + norm, first_norm + norm, second_norm + norm
            continue
        equal = (a == b) | ((a != a) & (b != b))
        num_equal += int(equal.sum())
        a, b = a.double(), b.double()
        difference = (a - b).masked_fill_(equal, 0)
        largest = worse(largest, float(difference.abs().max()))
        squares += sum_products(difference, difference)
        dot += sum_products(a, b)
        first_norm, second_norm = first_norm + sum_products(a, a), second_norm + sum_products(b, b)
    norms = math.sqrt(first_norm) * math.sqrt(second_norm)
    cosine = 1.0 if num_equal == num_values else dot / norms if norms else 0.0
    return Comparison(largest, math.sqrt(squares / max(1, num_values)), cosine, num_equal, num_values)


def sum_products(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.dot(a, b))


def worse(a: float, b: float) -> float:
    """The larger; NaN is larger than all."""
    return a if math.isnan(a) else b if math.isnan(b) else max(a, b)
