"""The whole tensors of any folder, one at a time: as they are stored, or put together from a split folder's parts."""

from __future__ import annotations

from pathlib import Path

import torch

from mmdist.blocks import from_stored
from mmdist.config import UserError
from mmdist.manifest import MANIFEST, Part, TensorEntry, load_manifest, part_file
from mmdist.models.family import find_model
from mmdist.quant import WeightFormat
from mmdist.rank_file import DTYPES, sha256
from mmdist.weights import Checkpoint, Renames, open_safetensors, rename
from weights_tools.convert import WORDS
from weights_tools.source import find_family, open_source
from weights_tools.split_checks import tiling_gaps


class JoinedCheckpoint(Checkpoint):
    """A split folder as the folder it was cut from: every part is checked against its hash, and so is the whole."""

    def __init__(self, folder: Path, renames: Renames):
        self.folder, self.manifest = folder, load_manifest(folder)
        self.entries = {rename(entry.name, renames): entry for entry in self.manifest.tensors}
        self.files = {name: folder / entry.source_file for name, entry in self.entries.items()}
        self.names = {name: entry.name for name, entry in self.entries.items()}
        self.shapes = {name: tuple(entry.shape) for name, entry in self.entries.items()}
        self.dtypes = {name: entry.dtype for name, entry in self.entries.items()}
        self.ignored = []
        self.left_out = frozenset()
        self.made: dict[str, torch.Tensor] = {}
        for entry in self.manifest.tensors:
            for words in tiling_gaps(entry, self.manifest.world_size):
                raise UserError(f"{folder / MANIFEST}: {entry.name} {words}; split again")
        for rank in range(self.manifest.world_size):
            if not self.part_path(rank).exists():
                raise UserError(f"{self.part_path(rank)}: missing; copy it there, or split again")

    def part_paths(self) -> list[Path]:
        return [self.part_path(rank) for rank in range(self.manifest.world_size)]

    def part_path(self, rank: int) -> Path:
        return self.folder / part_file(rank, self.manifest.world_size)

    def restore(self, format: WeightFormat | None) -> None:
        """Add the tensors that follow from others and so were not split; other readers of the folder want them."""
        if format is not None:
            for name in list(self.names):
                self._restore(name, format.following(name, self.shapes[name]))

    def _restore(self, beside: str, tensors: dict[str, torch.Tensor]) -> None:
        for leaf, tensor in tensors.items():
            name = f"{beside.rpartition('.')[0]}.{leaf}"
            self.made[name], self.files[name] = tensor, self.files[beside]
            self.names[name] = f"{self.names[beside].rpartition('.')[0]}.{leaf}"
            self.shapes[name], self.dtypes[name] = tuple(tensor.shape), WORDS[tensor.dtype]

    def source_sha256(self, name: str) -> str:
        return self.entries[name].source_sha256 if name in self.entries else super().source_sha256(name)

    def read_whole(self, name: str) -> torch.Tensor:
        if name in self.made:
            return self.made[name]
        entry = self.entries[name]
        if entry.dim is None:
            for part in entry.parts:  # copies: each is checked, the last one is taken
                full = self._read_part(entry, part)
        else:
            full = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
            for part in entry.parts:
                put(full, entry.dim, part.ranges, self._read_part(entry, part))
        if sha256(full) != entry.source_sha256:
            raise UserError(f"{self.folder}: {entry.name} put together is not what was split: another sha256")
        return full

    def _read_part(self, entry: TensorEntry, part: Part) -> torch.Tensor:
        path = self.part_path(part.rank)
        with open_safetensors(path) as file:
            if entry.name not in file.keys():  # noqa: SIM118 - it is no dict
                raise UserError(f"{path}: {entry.name} is missing; copy the file again, or split again")
            tensor = file.get_tensor(entry.name)
        if list(tensor.shape) != part.shape or tensor.dtype != DTYPES[entry.dtype] or sha256(tensor) != part.sha256:
            raise UserError(f"{path}: {entry.name} is damaged, not what the manifest says; copy it or split again")
        return from_stored(tensor, part.order)


def put(full: torch.Tensor, dim: int, ranges: list[list[int]], part: torch.Tensor) -> None:
    """Lay the rows of a part where they came from; copies of a part come to lie on each other."""
    start = 0
    for first, last in ranges:
        full.narrow(dim, first, last - first).copy_(part.narrow(dim, start, last - first))
        start += last - first


def open_whole(folder: Path) -> tuple[str, Checkpoint]:
    """(family, the folder's whole tensors by our names)"""
    if (folder / MANIFEST).exists():
        family = load_manifest(folder).model
        return family, JoinedCheckpoint(folder, find_model(family).renames)
    family = find_family(folder)
    return family, open_source(family, folder)
