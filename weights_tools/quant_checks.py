"""A quantised folder beside the plain one it was made from: how far each weight is off, and that the rest is equal."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mmdist.quant import MAX_INT, Quantized
from weights_tools.compare import Comparison, Weights, compare, open_pair
from weights_tools.display import byte_bar, show_table

ROUNDING = 1e-3  # of a step: float32 arithmetic on the way


@dataclass
class LayerError:
    """One quantised weight. max_steps: its largest error, in steps between integers; half a step is rounding alone."""

    layer: str
    comparison: Comparison
    max_steps: float

    def facts(self) -> dict[str, Any]:
        return {"layer": self.layer, **asdict(self.comparison), "max_steps": self.max_steps}


def check_quantised(folder: Path, against: Path) -> tuple[list[LayerError], list[str]]:
    """(errors of the quantised weights, problems in words)"""
    made, source = open_pair(folder, against)
    errors: list[LayerError] = []
    problems = list(lost_names(made, source, against))
    common = sorted((name for name in made.names if name in source.names), key=natural)
    with byte_bar(sum(math.prod(made.shape(name)) for name in common), "comparing", unit=" values") as bar:
        for name in common:
            stored, shapes = made.names[name], (list(made.shape(name)), list(source.shape(name)))
            if shapes[0] != shapes[1]:
                problems.append(f"{folder}: {stored} is {shapes[0]}, {shapes[1]} in {against}")
            elif name in made.quantised:
                errors.append(find_error(made, source, name))
                problems += [f"{folder}: {stored} {words}" for words in too_far(made, name, errors[-1])]
            else:
                found = compare(zip(made.blocks(name), source.blocks(name), strict=True))
                if not found.is_equal:
                    words = f"{found.num_values - found.num_equal} of {found.num_values} values"
                    problems.append(f"{folder}: {stored} is not quantised, but {words} are not those in {against}")
            bar.update(math.prod(shapes[0]))
    return errors, problems


def lost_names(made: Weights, source: Weights, against: Path) -> Iterator[str]:
    for name in sorted(source.names.keys() - made.names.keys()):
        yield f"{made.checkpoint.folder}: {source.names[name]} is missing, {against} has it"
    for name in sorted(made.names.keys() - source.names.keys()):
        yield f"{made.checkpoint.folder}: {made.names[name]} is not in {against}"


def natural(name: str) -> list[str | int]:
    """Layer 10 after layer 9."""
    return [int(word) if word.isdigit() else word for word in re.split(r"(\d+)", name)]


def find_error(made: Weights, source: Weights, name: str) -> LayerError:
    steps: list[float] = []

    def pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for block, rows in zip(made.quantised_blocks(name), source.blocks(name), strict=True):
            numbers = block.dequantize()
            steps.append(count_steps(block, numbers - rows.float()))
            yield numbers, rows

    comparison = compare(pairs())
    return LayerError(made.names[name].removesuffix(".weight"), comparison, max(steps))


def count_steps(block: Quantized, error: torch.Tensor) -> float:
    """The largest error (rows, columns) in steps of its own group."""
    largest = error.unflatten(1, (block.scale.shape[1], -1)).abs().amax(-1)
    return float((largest / block.scale.float()).max())


def too_far(made: Weights, name: str, error: LayerError) -> Iterator[str]:
    """Words on an error that rounding to the nearest integer, and of the scale as it is stored, does not explain."""
    assert made.format is not None, "tensors are quantised in a format"
    scale = made.checkpoint.dtype(made.quantised[name]["weight_scale"])
    limit = 0.5 + MAX_INT[made.format.scheme.bits] * torch.finfo(scale).eps + ROUNDING
    if not error.max_steps <= limit:
        yield f"is up to {error.max_steps:.3g} steps off, rounding explains {limit:.3g}: other weights, or calibrated"


def show_errors(errors: list[LayerError]) -> None:
    rows = [("layer", "max abs", "RMS", "cosine", "steps")]
    for error in errors:
        found = error.comparison
        numbers = (f"{found.max_abs:.3g}", f"{found.rms:.3g}", f"{found.cosine:.7f}", f"{error.max_steps:.3f}")
        rows.append((error.layer, *numbers))
    show_table(rows)
