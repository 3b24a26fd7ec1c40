"""What a calibrated folder scaled, found again: weights by columns, and by rows what makes their input.

Factors are powers of two (weights_tools.calibrate), so magnitudes tell them although the weights are rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mmdist.models.family import build_model, find_model, load_model_config
from mmdist.models.quantized import stored_weights
from mmdist.plan import shard_plan
from mmdist.quant_files import read_json
from mmdist.tp import TP
from weights_tools.calibrate import groups
from weights_tools.compare import Weights
from weights_tools.folder import QUANTIZATION


@dataclass
class Factors:
    """Of a tensor's rows and columns, by which the source was multiplied; empty: by nothing."""

    rows: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    columns: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def block(self, first: int, like: torch.Tensor) -> torch.Tensor:
        """Those of the rows from `first` on, (rows, columns) or what broadcasts to it."""
        rows = self.rows[first : first + len(like), None] if len(self.rows) else torch.ones(1, 1)
        return rows * self.columns if len(self.columns) else rows


def is_calibrated(folder: Path) -> bool:
    path = folder / QUANTIZATION
    return path.exists() and read_json(path).get("calibration_sha256") is not None


def find_factors(family: str, folder: Path, made: Weights, source: Weights) -> dict[str, Factors]:
    """Our name of a tensor -> what calibration multiplied it by."""
    kind = find_model(family)
    model = build_model(kind, load_model_config(kind, folder), TP())
    plan = shard_plan(model, TP())
    found: dict[str, Factors] = {}
    for group in groups(model):
        known = found.setdefault(group.producer, Factors())
        known.rows = torch.cat(list(row_factors(made, source, group.producer, known)))
        bias = group.producer.removesuffix("weight") + "bias"
        if bias in plan:
            found[bias] = Factors(rows=known.rows)
        for consumer in group.consumers:
            for name in stored_weights(plan, consumer):
                found.setdefault(name, Factors()).columns = 1 / known.rows
    return found


def row_factors(made: Weights, source: Weights, name: str, known: Factors) -> Iterator[torch.Tensor]:
    """(rows,) block by block, once the columns are as they were."""
    for a, b in zip(made.blocks(name), source.blocks(name), strict=True):
        now, before = (a.float() / known.block(0, a)).abs().sum(1), b.float().abs().sum(1)
        ratio = torch.where((now > 0) & (before > 0), now / before, 1)
        yield 2.0 ** ratio.log2().round()
