"""Who holds what: read off the model built on `meta`, before any weight is touched.

Layers state how their parameters are cut (`shards()`); `shard_plan` turns that into one entry per tensor of the
checkpoint. The loader, `weights_tools` and task=plan all start here, so there is no second table of names and cuts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from mmdist.tp import TP


@dataclass(frozen=True)
class Piece:
    """A run of rows (or columns) that is cut by itself, e.g. the k part of a fused qkv.

    size: rows in the checkpoint. name: the module name a checkpoint gives it when stored apart. copies: neighbouring
    ranks that hold the same part (fewer KV heads than ranks). padded: rows after padding with zeros (a vocabulary).
    whole: stored apart, but not cut.
    """

    size: int
    name: str | None = None
    copies: int = 1
    padded: int = 0
    whole: bool = False

    def local_size(self, tp: TP) -> int:
        """Rows one rank holds, padding included."""
        if self.whole:
            return self.size
        return (self.padded or self.size) // (tp.size // self.copies)

    def local_range(self, tp: TP) -> tuple[int, int]:
        """The rows of the checkpoint this rank holds, without padding."""
        if self.whole:
            return 0, self.size
        rows = self.local_size(tp)
        start = (tp.rank // self.copies) * rows
        return min(start, self.size), min(start + rows, self.size)


@dataclass(frozen=True)
class Shard:
    """How a parameter is cut: along `dim`, each piece by itself. packs: it may be stored in blocks (mmdist.blocks)."""

    dim: int
    pieces: tuple[Piece, ...]
    packs: bool = False


@runtime_checkable
class Sharded(Protocol):
    """A module that says how its own parameters are cut; those it does not name are whole on every rank."""

    def shards(self) -> dict[str, Shard]: ...


def on_rank_zero(module: nn.Module) -> bool:
    """True for a module (say a vision encoder) whose parameters live on rank 0 alone."""
    return getattr(module, "rank_zero_only", False)


@dataclass(frozen=True)
class Placement:
    """One tensor of the checkpoint: the parameter it fills and the part of it each rank holds.

    name: our name for the stored tensor. shape: its full shape. param: the parameter; offset: where its rows start
    there (along dim). pieces: empty when the tensor is not cut. packs: as in Shard.
    """

    name: str
    shape: tuple[int, ...]
    param: str
    dim: int | None = None
    pieces: tuple[Piece, ...] = ()
    offset: int = 0
    rank_zero_only: bool = False
    packs: bool = False

    @property
    def kind(self) -> str:
        if self.rank_zero_only:
            return "rank0"
        if self.dim is None or all(piece.whole for piece in self.pieces):
            return "replicated"
        return "copied" if any(piece.copies > 1 for piece in self.pieces) else "cut"

    def held_by(self, tp: TP) -> bool:
        return tp.rank == 0 or not self.rank_zero_only

    def ranges(self, tp: TP) -> list[tuple[int, int]]:
        """The rows along `dim` of the stored tensor that this rank holds, one range a piece."""
        ranges, start = [], 0
        for piece in self.pieces:
            first, last = piece.local_range(tp)
            ranges.append((start + first, start + last))
            start += piece.size
        return ranges

    def part_shape(self, tp: TP) -> tuple[int, ...]:
        """Shape of this rank's part of the stored tensor, without padding."""
        if self.dim is None:
            return self.shape
        rows = sum(last - first for first, last in self.ranges(tp))
        return (*self.shape[: self.dim], rows, *self.shape[self.dim + 1 :])


Plan = dict[str, Placement]


def shard_plan(model: nn.Module, tp: TP) -> Plan:
    """Stored tensor name -> Placement, for every parameter of a model built (on meta) for `tp`.

    The plan is the same for every rank of one size.
    """
    plan: Plan = {}
    seen: set[int] = set()
    for module_name, module, rank_zero_only in walk(model):
        shards = module.shards() if isinstance(module, Sharded) else {}
        for name, param in module.named_parameters(recurse=False):
            if id(param) in seen:  # tied weights are stored once
                continue
            seen.add(id(param))
            full_name = f"{module_name}.{name}" if module_name else name
            for placement in place(full_name, param, shards.get(name), rank_zero_only, tp):
                plan[placement.name] = placement
    return plan


def walk(model: nn.Module, prefix: str = "", inherited: bool = False) -> Iterator[tuple[str, nn.Module, bool]]:
    """(name, module, rank_zero_only) of the model and everything below it."""
    rank_zero_only = inherited or on_rank_zero(model)
    yield prefix, model, rank_zero_only
    for name, child in model.named_children():
        yield from walk(child, f"{prefix}.{name}" if prefix else name, rank_zero_only)


def place(full_name: str, param: torch.Tensor, shard: Shard | None, rank_zero_only: bool, tp: TP) -> list[Placement]:
    """The stored tensors that fill one parameter: one, or one a piece where pieces are stored apart."""
    if shard is None:
        return [Placement(full_name, tuple(param.shape), full_name, rank_zero_only=rank_zero_only)]
    before, after = tuple(param.shape[: shard.dim]), tuple(param.shape[shard.dim + 1 :])
    if shard.pieces[0].name is None:
        rows = sum(piece.size for piece in shard.pieces)
        shape = (*before, rows, *after)
        return [Placement(full_name, shape, full_name, shard.dim, shard.pieces, packs=shard.packs)]
    placements, offset = [], 0
    for piece in shard.pieces:
        name = stored_apart(full_name, piece)
        shape = (*before, piece.size, *after)
        placements.append(Placement(name, shape, full_name, shard.dim, (piece,), offset, packs=shard.packs))
        offset += piece.local_size(tp)
    return placements


def stored_apart(full_name: str, piece: Piece) -> str:
    """...self_attn.qkv_proj.weight -> ...self_attn.k_proj.weight"""
    module, _, leaf = full_name.rpartition(".")
    parent, _, _ = module.rpartition(".")
    return f"{parent}.{piece.name}.{leaf}"


def cut(full: torch.Tensor, placement: Placement, tp: TP) -> torch.Tensor:
    """This rank's part of a whole stored tensor, without padding; a view where one range suffices."""
    if placement.dim is None:
        return full
    parts = [full.narrow(placement.dim, first, last - first) for first, last in placement.ranges(tp)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, placement.dim)


@runtime_checkable
class Readied(Protocol):
    """A module whose parameters take another form once they are loaded, or that holds what is no parameter."""

    def bytes_once_ready(self) -> int: ...


def bytes_per_rank(model: nn.Module, tp: TP) -> tuple[int, int]:
    """(bytes of the parts every rank has, bytes of what rank 0 holds alone) on this rank, padding included.

    model: in the dtype it will run in.
    """
    numbers = {True: 0, False: 0}
    seen: set[int] = set()
    for _, module, rank_zero_only in walk(model):
        own = list(module.parameters(recurse=False))
        params = [param for param in own if id(param) not in seen]
        seen |= {id(param) for param in params}
        counts = params or not own  # a module whose parameters are another's, tied, does not
        ready = module.bytes_once_ready() if isinstance(module, Readied) and counts else sum(p.nbytes for p in params)
        numbers[rank_zero_only] += ready
    return numbers[False], numbers[True] if tp.rank == 0 else 0
