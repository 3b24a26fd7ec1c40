"""What verify checks in a split folder: manifest against plan, part files against manifest, parts against source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from mmdist.blocks import to_stored
from mmdist.config import UserError
from mmdist.manifest import MANIFEST, Manifest, Part, TensorEntry, load_manifest, part_file
from mmdist.models.family import find_model
from mmdist.plan import Plan, cut
from mmdist.rank_file import DTYPES, sha256
from mmdist.tp import TP
from mmdist.weights import Checkpoint, open_safetensors, rename
from weights_tools.display import byte_bar
from weights_tools.folder import other_files
from weights_tools.source import load_plan, open_source
from weights_tools.values import bad_values, count_bytes


def check_split(folder: Path, against: Path | None) -> Iterator[str]:
    """Problems of a folder made by split; `against` is the folder of whole tensors it was cut from."""
    try:
        manifest = load_manifest(folder)
        plan = load_plan(manifest.model, folder, manifest.world_size)[1]
    except UserError as error:
        yield str(error)
        return
    for entry in manifest.tensors:
        yield from (f"{folder / MANIFEST}: {entry.name} {words}" for words in tiling_gaps(entry, manifest.world_size))
    yield from check_plan(folder, manifest, plan)
    yield from check_part_files(folder, manifest)
    if against is not None:
        yield from check_source(folder, manifest, plan, against)


def tiling_gaps(entry: TensorEntry, world_size: int) -> Iterator[str]:
    """Words on every way in which the parts do not make up the tensor exactly; copies count once."""
    ranks = [part.rank for part in entry.parts]
    wanted = [0] if entry.placement == "rank0" else list(range(world_size))
    if ranks != wanted:
        yield f"is on ranks {ranks}, a {entry.placement} tensor is on {wanted}"
    for part in entry.parts:
        if part.shape != part_shape(entry, part):
            yield f"has shape {part.shape} on rank {part.rank}, its rows {part.ranges} make {part_shape(entry, part)}"
    if entry.dim is None:
        return
    end = 0
    for first, last in sorted({(first, last) for part in entry.parts for first, last in part.ranges if first < last}):
        if first > end:
            yield f"rows {end} to {first} of dim {entry.dim} are in no part"
        elif first < end:
            yield f"rows {first} to {end} of dim {entry.dim} are in parts that overlap"
        end = max(end, last)
    if end != entry.shape[entry.dim]:
        yield f"parts end at row {end} of dim {entry.dim}, the tensor at {entry.shape[entry.dim]}"


def part_shape(entry: TensorEntry, part: Part) -> list[int]:
    shape = list(entry.shape)
    if entry.dim is not None:
        shape[entry.dim] = sum(last - first for first, last in part.ranges)
    return shape


def check_plan(folder: Path, manifest: Manifest, plan: Plan) -> Iterator[str]:
    """The manifest's tensors and cuts are those this mmdist asks for."""
    renames = find_model(manifest.model).renames
    entries = {rename(entry.name, renames): entry for entry in manifest.tensors}
    yield from (f"{folder / MANIFEST}: {name} of {manifest.model} is missing" for name in sorted(plan.keys() - entries))
    for name, entry in entries.items():
        if name not in plan:
            yield f"{folder / MANIFEST}: {entry.name} is not used by {manifest.model}"
            continue
        placement = plan[name]
        planned = (list(placement.shape), placement.kind, placement.dim)
        if (entry.shape, entry.placement, entry.dim) != planned:
            yield (
                f"{folder / MANIFEST}: {entry.name} is {entry.shape}, {entry.placement} along dim {entry.dim}; this "
                f"mmdist has {planned[0]}, {planned[1]} along dim {planned[2]}"
            )
            continue
        for part in entry.parts:
            wanted = [list(rows) for rows in placement.ranges(TP(part.rank, manifest.world_size))]
            if part.ranges != wanted:
                yield f"{folder / MANIFEST}: {entry.name} has rows {part.ranges} on rank {part.rank}, not {wanted}"


def check_part_files(folder: Path, manifest: Manifest) -> Iterator[str]:
    files = [folder / part_file(rank, manifest.world_size) for rank in range(manifest.world_size)]
    for path in sorted(set(folder.glob("*.safetensors")) - set(files)):
        yield f"{path}: not one of the {manifest.world_size} files of this split"
    with byte_bar(sum(path.stat().st_size for path in files if path.exists()), "verifying parts") as bar:
        for rank, path in enumerate(files):
            mine = {
                entry.name: (entry, part) for entry in manifest.tensors for part in entry.parts if part.rank == rank
            }
            try:
                with open_safetensors(path) as file:
                    there = set(file.keys())
            except UserError as error:
                yield str(error)
                continue
            yield from (f"{path}: {name} is missing" for name in sorted(mine.keys() - there))
            yield from (f"{path}: {name} is not in {MANIFEST}" for name in sorted(there - mine.keys()))
            for name in (name for name in mine if name in there):
                with open_safetensors(path) as file:
                    tensor = file.get_tensor(name)
                yield from (f"{path}: {name} {words}" for words in check_part(tensor, *mine[name]))
                bar.update(tensor.nbytes)
                del tensor


def check_part(tensor: torch.Tensor, entry: TensorEntry, part: Part) -> Iterator[str]:
    if list(tensor.shape) != part.shape or tensor.dtype != DTYPES.get(entry.dtype):
        yield f"is {tensor.dtype} {list(tensor.shape)}, the manifest says {entry.dtype} {part.shape}"
    elif sha256(tensor) != part.sha256:
        yield "is damaged: its sha256 is not the manifest's"
    yield from bad_values(tensor)


def check_source(folder: Path, manifest: Manifest, plan: Plan, against: Path) -> Iterator[str]:
    """Every tensor of the source is the one that was cut, and its parts are what the manifest has hashes of."""
    try:
        source = open_source(manifest.model, against)
    except UserError as error:
        yield str(error)
        return
    renames = find_model(manifest.model).renames
    entries = {rename(entry.name, renames): entry for entry in manifest.tensors}
    for name in sorted(source.files.keys() - entries.keys()):
        yield f"{source.files[name]}: {source.names[name]} is in no part of {folder}"
    with byte_bar(sum(count_bytes(e.dtype, e.shape) for e in manifest.tensors), "verifying source") as bar:
        for name, entry in entries.items():
            if name not in source.files:
                yield f"{against}: {entry.name} is missing, {folder} has it"
            elif name in plan:
                words = check_cut(source, name, entry, plan, manifest.world_size)
                yield from (f"{source.files[name]}: {source.names[name]} {line}" for line in words)
            bar.update(count_bytes(entry.dtype, entry.shape))
    for path in other_files(against):
        if not (folder / path.name).exists() or (folder / path.name).read_bytes() != path.read_bytes():
            yield f"{folder / path.name}: missing or not the same as {path}"


def check_cut(source: Checkpoint, name: str, entry: TensorEntry, plan: Plan, world_size: int) -> Iterator[str]:
    if (source.dtypes[name], list(source.shapes[name])) != (entry.dtype, entry.shape):
        yield f"is {source.dtypes[name]} {list(source.shapes[name])}, what was split is {entry.dtype} {entry.shape}"
        return
    full = source.read_whole(name)
    if sha256(full) != entry.source_sha256:
        yield "is not the tensor that was split: its sha256 is not the manifest's"
        return
    for part in entry.parts:
        part_of_source = cut(full, plan[name], TP(part.rank, world_size))
        if sha256(to_stored(part_of_source, part.order)) != part.sha256:
            yield f"cut for rank {part.rank} is not the part in the manifest"
