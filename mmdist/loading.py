"""Fill a model that is built on meta with a rank's part of a checkpoint, one parameter at a time."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import nn
from tqdm import tqdm

from mmdist.kernels.kernels import Kernels
from mmdist.plan import Placement, Plan
from mmdist.tp import TP
from mmdist.weights import Checkpoint

Owner = tuple[nn.Module, str]  # a module, and the name under which it has a parameter


@runtime_checkable
class FinishesLoading(Protocol):
    """A module with something left to do once the weights are there: values no checkpoint stores, packing."""

    def after_load(self, kernels: Kernels) -> None: ...


@runtime_checkable
class TakesBlocks(Protocol):
    """A module whose weight may stay where it lies in a file, packed (mmdist.blocks)."""

    def take_blocks(self, blocks: torch.Tensor, kernels: Kernels) -> bool:
        """Use blocks, of the weight's shape, instead of a parameter; False where that cannot be."""


def load_weights(model: nn.Module, checkpoint: Checkpoint, plan: Plan, tp: TP, kernels: Kernels) -> int:
    """Fill a model built on meta with this rank's part of the checkpoint; returns the bytes read.

    Parameters that live on rank 0 alone stay on meta elsewhere and take no memory. A module finishes (packs, say) as
    soon as its own weights are there, so that no more than one of them is ever held twice.
    """
    shapes, modules, owners = dict(model.named_parameters()), dict(model.named_modules()), find_owners(model)
    groups: dict[str, list[Placement]] = {}
    for placement in sorted(
        (p for p in plan.values() if p.held_by(tp)), key=lambda p: (checkpoint.files[p.name], p.name)
    ):
        groups.setdefault(placement.param, []).append(placement)
    missing = Counter(map(module_of, groups))
    bytes_read = 0
    for name, placements in with_progress(groups, show=tp.rank == 0):
        placements.sort(key=lambda placement: placement.offset)
        bytes_read += load_param(shapes.pop(name), owners[name], placements, checkpoint, tp, kernels)
        missing[module_of(name)] -= 1
        if not missing[module_of(name)]:
            finish(modules.pop(module_of(name)), kernels)
    for module in modules.values():
        finish(module, kernels)
    checkpoint.all_read()
    return bytes_read


def load_param(
    meta: torch.Tensor,
    owners: list[Owner],
    placements: list[Placement],
    checkpoint: Checkpoint,
    tp: TP,
    kernels: Kernels,
) -> int:
    """Give this rank's parameter to its owners; returns the stored bytes of its parts."""
    (first, _), *others = owners
    blocks = checkpoint.blocks(placements, tp) if isinstance(first, TakesBlocks) and not others else None
    if blocks is not None and isinstance(first, TakesBlocks) and first.take_blocks(blocks, kernels):
        return blocks.nbytes
    parts = [checkpoint.read(placement, tp) for placement in placements]
    param = checkpoint.joined(placements, parts)
    if param is None or (param.shape, param.dtype, param.device) != (meta.shape, meta.dtype, kernels.device):
        padded = any(piece.padded for placement in placements for piece in placement.pieces)
        param = (torch.zeros_like if padded else torch.empty_like)(meta, device=kernels.device)
        for placement, part in zip(placements, parts, strict=True):
            fill(param, placement, part)
    for module, leaf in owners:
        setattr(module, leaf, nn.Parameter(param, requires_grad=False))
    return sum(part.nbytes for part in parts)


def find_owners(model: nn.Module) -> dict[str, list[Owner]]:
    """Parameter -> the modules that have it, and under what name; more than one where weights are tied."""
    owners: dict[int, list[Owner]] = {}
    for module in model.modules():
        for leaf, param in module.named_parameters(recurse=False):
            owners.setdefault(id(param), []).append((module, leaf))
    return {name: owners[id(param)] for name, param in model.named_parameters()}


def module_of(param: str) -> str:
    return param.rpartition(".")[0]


def finish(module: nn.Module, kernels: Kernels) -> None:
    if isinstance(module, FinishesLoading):
        module.after_load(kernels)


def fill(param: torch.Tensor, placement: Placement, part: torch.Tensor) -> None:
    """Copy a part to its place in a parameter; padding behind it stays zero."""
    if placement.dim is not None:
        param = param.narrow(placement.dim, placement.offset, part.shape[placement.dim])
    param.copy_(part)


def with_progress(groups: dict[str, list[Placement]], show: bool) -> Iterator[tuple[str, list[Placement]]]:
    hidden = not (show and sys.stderr.isatty())
    return iter(tqdm(groups.items(), desc="loading weights", unit="tensor", disable=hidden))
