"""Read a checkpoint's safetensors by plan: only this rank's slices, one tensor at a time.

A checkpoint is a Hugging Face folder (single file, or shards with an index) or a folder written by
`weights_tools split`. Names are brought to ours by the family's rename table; missing or unused names are refused.
"""

from __future__ import annotations

import fnmatch
import json
import logging
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mmdist.blocks import from_stored
from mmdist.checked import CheckedFile
from mmdist.config import UserError
from mmdist.manifest import MANIFEST, PART_FILES, Part, TensorEntry, load_manifest, part_file
from mmdist.plan import Placement, Plan
from mmdist.rank_file import DTYPES, RankFile, sha256
from mmdist.tp import TP

log = logging.getLogger("mmdist.load")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
QUANT_STEM = (
    "quant_model_weight"  # msmodelslim's quant_model_weight_w8a16.safetensors, quant_model_weights-00001-of-...
)
# Prefixes as a checkpoint has them -> ours. The longest that fits is taken.
Renames = dict[str, str]


def rename(stored: str, renames: Renames) -> str:
    """language_model.model.norm.weight -> decoder.norm.weight"""
    for prefix in sorted(renames, key=len, reverse=True):
        if stored.startswith(prefix):
            return renames[prefix] + stored[len(prefix) :]
    return stored


def open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: missing, although the checkpoint's index or manifest names it; copy it again"
        ) from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated or not a safetensors file ({error}); copy it again") from error


class Checkpoint:
    """A folder of whole tensors. `names`: our name -> the name in its file."""

    def __init__(self, folder: Path, renames: Renames, ignored: Sequence[str] = ()):
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.names: dict[str, str] = {}
        self.ignored: list[str] = []
        self.left_out: frozenset[str] = frozenset()
        for path in find_files(folder):
            self._read_header(path, renames, ignored)

    def _read_header(self, path: Path, renames: Renames, ignored: Sequence[str]) -> None:
        with open_safetensors(path) as file:
            for stored in sorted(file.keys()):
                if any(fnmatch.fnmatchcase(stored, pattern) for pattern in ignored):
                    self.ignored.append(stored)
                    continue
                name = rename(stored, renames)
                if name in self.files:
                    first = self.files[name].name
                    raise UserError(
                        f"{self.folder}: {name} is in {first} and in {path.name}; keep one of the two files"
                    )
                tensor = file.get_slice(stored)
                self.files[name], self.names[name] = path, stored
                self.shapes[name], self.dtypes[name] = tuple(tensor.get_shape()), tensor.get_dtype()

    def check(self, plan: Plan, arch: str) -> None:
        """Refuse missing, unused and misshapen tensors before anything is loaded."""
        missing, unused = plan.keys() - self.files.keys(), self.files.keys() - plan.keys() - self.left_out
        if missing or unused:
            stored_unused = min((self.names[name] for name in unused), default="-")
            raise UserError(
                f"{self.folder}: {len(missing)} tensors of {arch} missing (first: {min(missing, default='-')}), "
                f"{len(unused)} not used by it (first: {stored_unused}); "
                f"run: weights_tools inspect {self.folder}"
            )
        for name, placement in plan.items():
            if self.shapes[name] != placement.shape:
                raise UserError(
                    f"{self.files[name]}: {self.names[name]} has shape {list(self.shapes[name])}, config.json asks for "
                    f"{list(placement.shape)}; the weights and the config are of different models"
                )
            if self.dtypes[name] not in DTYPES:
                raise UserError(
                    f"{self.files[name]}: {self.names[name]} is {self.dtypes[name]}; mmdist reads {', '.join(DTYPES)}"
                )

    def stored_dtypes(self) -> dict[str, str]:
        """Name in the files -> safetensors' word."""
        return {self.names[name]: dtype for name, dtype in self.dtypes.items()}

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.dtypes[name]]

    def leave_out(self, names: Iterable[str]) -> None:
        """Tensors that something else stands for: not loaded, and no mistake."""
        self.left_out = frozenset(names)

    def source_sha256(self, name: str) -> str:
        """Of the whole tensor's bytes, as it was before any split."""
        return sha256(self.read_whole(name))

    def hash_ahead(self, threads: int) -> None:
        """Begin to check what will be read, where there are hashes to check it against."""

    def all_read(self) -> None:
        """Call it when all that this rank holds was read, and so checked."""

    def read(self, placement: Placement, tp: TP) -> torch.Tensor:
        """This rank's part of the stored tensor, without padding.

        The result may be a view of the mapped file, so copy it and let it go: opening anew for each tensor keeps
        no more than one tensor's pages in memory.
        """
        with open_safetensors(self.files[placement.name]) as file:
            stored = file.get_slice(self.names[placement.name])
            if placement.dim is None:
                return stored[...]
            before = (slice(None),) * placement.dim
            parts = [stored[(*before, slice(first, last))] for first, last in placement.ranges(tp)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, placement.dim)

    def joined(self, placements: Sequence[Placement], parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """What was read, as one tensor in the file that may be kept; None where there is no such."""
        return None

    def blocks(self, placements: Sequence[Placement], tp: TP) -> torch.Tensor | None:
        """The parts of a parameter as one tensor in the file, where it is stored in blocks; may be kept."""
        return None

    def read_whole(self, name: str) -> torch.Tensor:
        """The stored tensor as it is; a view of the mapped file, see read()."""
        with open_safetensors(self.files[name]) as file:
            return file.get_tensor(self.names[name])


class SplitCheckpoint(Checkpoint):
    """One rank's part of a folder written by `weights_tools split`; every part is checked against its hash, once for
    each version of the file where hash_ahead() is called (mmdist.checked)."""

    def __init__(self, folder: Path, renames: Renames, tp: TP):
        self.manifest = load_manifest(folder)
        if self.manifest.world_size != tp.size:
            raise UserError(
                f"{folder}: split for world_size={self.manifest.world_size}, asked for {tp.size}; use world_size="
                f"{self.manifest.world_size}, or run: weights_tools split {self.manifest.model} --ranks {tp.size} "
                f"--src {self.manifest.source} --dst NEW_FOLDER"
            )
        self.folder, self.rank = folder, tp.rank
        self.path = folder / part_file(tp.rank, tp.size)
        self.entries = {rename(entry.name, renames): entry for entry in self.manifest.tensors}
        self.names = {name: entry.name for name, entry in self.entries.items()}
        self.files = dict.fromkeys(self.entries, self.path)
        self.shapes = {name: tuple(entry.shape) for name, entry in self.entries.items()}
        self.dtypes = {name: entry.dtype for name, entry in self.entries.items()}
        for rank in range(tp.size):
            if not (folder / part_file(rank, tp.size)).exists():
                raise UserError(f"{folder / part_file(rank, tp.size)}: missing; run weights_tools split again")
        self.version = CheckedFile(self.path, folder / MANIFEST)
        with open_safetensors(self.path):  # it is whole
            self.file = RankFile(self.path)
        self.is_checked = False
        self.left_out = frozenset()

    def source_sha256(self, name: str) -> str:
        return self.entries[name].source_sha256

    def hash_ahead(self, threads: int) -> None:
        """Nothing to do where this very file was checked before."""
        self.is_checked = self.version.was_checked()
        if self.is_checked:
            log.info("%s: checked before; weights_tools verify hashes it again", self.path)
        else:
            self.file.hash_ahead(threads)

    def all_read(self) -> None:
        if self.is_checked:
            return
        for name in self.left_out:  # the whole file is remembered as checked
            for part in self.entries[name].parts:
                if part.rank == self.rank:
                    self._check_hash(self.entries[name], part)
        self.version.remember()

    def check(self, plan: Plan, arch: str) -> None:
        super().check(plan, arch)
        tp = TP(self.rank, self.manifest.world_size)
        for entry in (self.entries[placement.name] for placement in plan.values() if placement.held_by(tp)):
            if [part.rank for part in entry.parts].count(self.rank) != 1:
                raise UserError(
                    f"{self.folder / MANIFEST}: {entry.name} has no part for rank {self.rank}; "
                    "run weights_tools split again"
                )
            if entry.name not in self.file.header:
                raise UserError(f"{self.path}: {entry.name} is missing; run weights_tools split again")

    def read(self, placement: Placement, tp: TP) -> torch.Tensor:
        return from_stored(self._stored(placement, tp), self._part(placement).order)

    def _part(self, placement: Placement) -> Part:
        (part,) = (part for part in self.entries[placement.name].parts if part.rank == self.rank)
        return part

    def _stored(self, placement: Placement, tp: TP) -> torch.Tensor:
        """This rank's part as it lies in the file."""
        entry, part = self.entries[placement.name], self._part(placement)
        tensor = self.file.map(entry.name)
        wanted = placement.part_shape(tp)
        same_rows = [list(rows) for rows in placement.ranges(tp)] == part.ranges
        if tuple(tensor.shape) != wanted or not same_rows or tensor.dtype != self.dtype(placement.name):
            raise UserError(
                f"{self.path}: {entry.name} is {tensor.dtype} {list(tensor.shape)}, rows {part.ranges}; expected "
                f"{entry.dtype} {list(wanted)}, rows {placement.ranges(tp)}; run weights_tools split again"
            )
        if not self.is_checked:
            self._check_hash(entry, part)
        return tensor

    def _check_hash(self, entry: TensorEntry, part: Part) -> None:
        if self.file.sha256(entry.name) != part.sha256:
            raise UserError(
                f"{self.path}: {entry.name} is damaged (its sha256 is not the manifest's); copy or split again"
            )

    def joined(self, placements: Sequence[Placement], parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Rows of one parameter that lie one behind the other, as split writes them."""
        if len(parts) == 1:
            return parts[0]
        starts = accumulate((len(part) for part in parts), initial=0)
        if any((p.dim, p.offset) != (0, start) for p, start in zip(placements, starts, strict=False)):
            return None
        if any(self._part(placement).order is not None for placement in placements):
            return None
        return self.file.map_rows([self.names[placement.name] for placement in placements])

    def blocks(self, placements: Sequence[Placement], tp: TP) -> torch.Tensor | None:
        if any(self._part(placement).order is None for placement in placements):
            return None
        for placement in placements:
            self._stored(placement, tp)
        return self.file.map_rows([self.names[placement.name] for placement in placements])


def find_index(folder: Path) -> Path:
    """model.safetensors.index.json, which may not be there, or where the weights are msmodelslim's, their index."""
    return next(iter(sorted(folder.glob(f"{QUANT_STEM}*.safetensors.index.json"))), folder / INDEX)


def find_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder, in the order of their names."""
    quantised, plain = (sorted(folder.glob(f"{stem}*.safetensors")) for stem in (QUANT_STEM, "model"))
    if quantised and plain:
        raise UserError(
            f"{folder}: plain weights ({plain[0].name}) beside quantised ({quantised[0].name}); keep one of the two"
        )
    index = find_index(folder)
    if index.exists():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: not a safetensors index ({error!r}); copy it again") from error
        return [folder / name for name in sorted(names)]
    files = [folder / SINGLE] if (folder / SINGLE).exists() else sorted(folder.glob("*.safetensors"))
    if any(fnmatch.fnmatchcase(path.name, PART_FILES) for path in files):
        raise UserError(f"{folder}: parts of weights_tools split without their {MANIFEST}; copy it, or split again")
    if not files:
        raise UserError(
            f"{folder}: config.json but no *.safetensors: the weights are missing; copy them into this folder"
        )
    return files


def open_checkpoint(folder: Path, renames: Renames, ignored: Sequence[str], tp: TP) -> Checkpoint:
    if (folder / MANIFEST).exists():
        return SplitCheckpoint(folder, renames, tp)
    return Checkpoint(folder, renames, ignored)
