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
from weights_tools.calibrate import CLIPS
from weights_tools.calibrated import Factors, find_factors, is_calibrated
from weights_tools.compare import Comparison, Weights, compare, open_pair
from weights_tools.display import byte_bar, show_table
from weights_tools.source import find_family

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
    calibrated = is_calibrated(folder)
    factors = find_factors(find_family(folder), folder, made, source) if calibrated else {}
    errors: list[LayerError] = []
    problems = list(lost_names(made, source, against))
    common = sorted((name for name in made.names if name in source.names), key=natural)
    with byte_bar(sum(math.prod(made.shape(name)) for name in common), "comparing", unit=" values") as bar:
        for name in common:
            stored, shapes = made.names[name], (list(made.shape(name)), list(source.shape(name)))
            if shapes[0] != shapes[1]:
                problems.append(f"{folder}: {stored} is {shapes[0]}, {shapes[1]} in {against}")
            elif name in made.quantised:
                errors.append(find_error(made, source, name, factors.get(name, Factors())))
                words_of = too_far(made, name, errors[-1], calibrated=calibrated)
                problems += [f"{folder}: {stored} {words}" for words in words_of]
            else:
                found = compare(unscaled(made.blocks(name), source.blocks(name), factors.get(name, Factors())))
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


Pairs = Iterator[tuple[torch.Tensor, torch.Tensor]]


def unscaled(blocks: Iterator[torch.Tensor], source: Iterator[torch.Tensor], factors: Factors) -> Pairs:
    """Blocks of both, the first without what calibration multiplied it by."""
    first = 0
    for block, rows in zip(blocks, source, strict=True):
        yield block / factors.block(first, block) if block.is_floating_point() else block, rows
        first += len(block)


def find_error(made: Weights, source: Weights, name: str, factors: Factors) -> LayerError:
    steps: list[float] = []

    def numbers() -> Iterator[torch.Tensor]:
        first = 0
        for block, rows in zip(made.quantised_blocks(name), source.blocks(name), strict=True):
            dequantized = block.dequantize()
            steps.append(count_steps(block, dequantized - rows.float() * factors.block(first, rows)))
            yield dequantized
            first += len(rows)

    comparison = compare(unscaled(numbers(), source.blocks(name), factors))
    return LayerError(made.names[name].removesuffix(".weight"), comparison, max(steps))


def count_steps(block: Quantized, error: torch.Tensor) -> float:
    """The largest error (rows, columns) in steps of its own group."""
    largest = error.unflatten(1, (block.scale.shape[1], -1)).abs().amax(-1)
    return float((largest / block.scale.float()).max())


def too_far(made: Weights, name: str, error: LayerError, *, calibrated: bool) -> Iterator[str]:
    """Words on an error that rounding to the nearest integer, and of the scale as it is stored, does not explain; where
    it was calibrated, cutting off the largest magnitudes."""
    assert made.format is not None, "tensors are quantised in a format"
    scale = made.checkpoint.dtype(made.quantised[name]["weight_scale"])
    cut_off = 1 / min(CLIPS) - 1 if calibrated else 0
    limit = 0.5 + MAX_INT[made.format.scheme.bits] * (torch.finfo(scale).eps + cut_off) + ROUNDING
    if not error.max_steps <= limit:
        explained = "rounding and calibration explain" if calibrated else "rounding explains"
        yield f"is up to {error.max_steps:.3g} steps off, {explained} {limit:.3g}: made from other weights?"


def show_errors(errors: list[LayerError]) -> None:
    rows = [("layer", "max abs", "RMS", "cosine", "steps")]
    for error in errors:
        found = error.comparison
        numbers = (f"{found.max_abs:.3g}", f"{found.rms:.3g}", f"{found.cosine:.7f}", f"{error.max_steps:.3f}")
        rows.append((error.layer, *numbers))
    show_table(rows)
