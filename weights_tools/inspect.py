"""Show what a checkpoint or a split folder holds, and how it would be cut for N ranks; reads headers only."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from mmdist.config import UserError
from mmdist.manifest import MANIFEST, load_manifest, part_file
from mmdist.models.family import find_model, legal_world_sizes
from mmdist.plan import Plan
from mmdist.quant import FORMATS
from mmdist.quant_files import find_format
from mmdist.tp import TP
from mmdist.weights import Checkpoint
from weights_tools.display import show_table, size_words
from weights_tools.folder import absolute
from weights_tools.job import whole_number
from weights_tools.source import find_family, load_plan, open_source
from weights_tools.values import count_bytes

KINDS = {
    "cut": "each rank has its own part",
    "copied": "fewer KV heads than ranks: neighbours have the same part",
    "replicated": "every rank has the whole",
    "rank0": "rank 0 has the whole, the others nothing",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="PATH", help="a checkpoint, or a folder made by split")
    parser.add_argument("--ranks", type=whole_number, metavar="N", help="show how it is cut for this world size")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def run(args: argparse.Namespace) -> int:
    folder = absolute(args.folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a checkpoint, or a folder made by weights_tools split")
    if (folder / MANIFEST).exists():
        if args.ranks is not None:
            raise UserError(f"{folder}: split already; --ranks is for the checkpoint it was cut from")
        facts, show = describe_split(folder), show_split
    else:
        facts, show = describe_source(folder, args.ranks), show_source
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        show(facts)
    return 0


def describe_split(folder: Path) -> dict[str, Any]:
    manifest = load_manifest(folder)
    sizes: dict[str, int | None] = {}
    for rank in range(manifest.world_size):
        path = folder / part_file(rank, manifest.world_size)
        sizes[path.name] = path.stat().st_size if path.exists() else None
    return {
        "folder": str(folder),
        "model": manifest.model,
        "world_size": manifest.world_size,
        "source": manifest.source,
        "format_version": manifest.format_version,
        "quantised": describe_format(folder),
        "num_tensors": len(manifest.tensors),
        "num_bytes": sum(count_bytes(entry.dtype, entry.shape) for entry in manifest.tensors),
        "dtypes": dict(Counter(entry.dtype for entry in manifest.tensors)),
        "placements": dict(Counter(entry.placement for entry in manifest.tensors)),
        "num_packed_parts": sum(part.order is not None for entry in manifest.tensors for part in entry.parts),
        "parts": sizes,
    }


def show_split(facts: dict[str, Any]) -> None:
    print(f"{facts['folder']}: {facts['model']}, split for world_size={facts['world_size']}")
    print(f"source: {facts['source']}")
    show_format(facts)
    print(f"{facts['num_tensors']} tensors, {size_words(facts['num_bytes'])}, {count_words(facts['dtypes'])}")
    print(f"placement: {count_words(facts['placements'])}")
    if facts["num_packed_parts"]:
        print(f"packed: {facts['num_packed_parts']} parts lie as native CPU kernels read them")
    for name, size in facts["parts"].items():
        print(f"  {name}  {'MISSING' if size is None else size_words(size)}")


def describe_format(folder: Path) -> dict[str, Any] | None:
    """How quantised weights are stored; None for plain ones."""
    held = find_format(folder)
    if held is None:
        return None
    (name,) = (name for name, kind in FORMATS.items() if isinstance(held, kind))
    return {"scheme": held.scheme.name, "group_size": held.scheme.group_size, "format": name}


def show_format(facts: dict[str, Any]) -> None:
    held = facts["quantised"]
    if held is not None:
        groups = f"groups of {held['group_size']} columns" if held["group_size"] else "a scale a row"
        print(f"quantised: {held['scheme']}, {groups}, stored as {held['format']} has it")


def count_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items())


def describe_source(folder: Path, world_size: int | None) -> dict[str, Any]:
    """Facts of a folder of whole tensors; its tensors need not be the model's."""
    family = find_family(folder)
    checkpoint = open_source(family, folder)
    config, plan = load_plan(family, folder, world_size or 1)
    ranks = [TP(rank, world_size or 1) for rank in range(world_size or 1)]
    sizes = {name: count_bytes(checkpoint.dtypes[name], shape) for name, shape in checkpoint.shapes.items()}
    facts = {
        "folder": str(folder),
        "model": family,
        "num_files": len(set(checkpoint.files.values())),
        "num_tensors": len(sizes),
        "num_bytes": sum(sizes.values()),
        "dtypes": dict(Counter(checkpoint.dtypes.values())),
        "legal_world_sizes": legal_world_sizes(find_model(family), config, find_format(folder)),
        "quantised": describe_format(folder),
        "ignored": sorted(checkpoint.ignored),
        **mismatches(checkpoint, plan),
        "groups": list_groups(checkpoint, plan, sizes),
    }
    if world_size is not None:
        facts["world_size"] = world_size
        facts["bytes_per_rank"] = [bytes_on_rank(checkpoint, plan, tp) for tp in ranks]
        facts["bytes_by_placement"] = {
            kind: sum(sizes[name] for name, p in plan.items() if p.kind == kind and name in sizes) for kind in KINDS
        }
    return facts


def mismatches(checkpoint: Checkpoint, plan: Plan) -> dict[str, list[str]]:
    shapes = checkpoint.shapes
    return {
        "missing": sorted(plan.keys() - shapes.keys()),
        "unused": sorted(checkpoint.names[name] for name in shapes.keys() - plan.keys()),
        "misshapen": [
            f"{checkpoint.names[name]} has shape {list(shapes[name])}, config.json asks for {list(plan[name].shape)}"
            for name in sorted(plan.keys() & shapes.keys())
            if shapes[name] != plan[name].shape
        ],
    }


def bytes_on_rank(checkpoint: Checkpoint, plan: Plan, tp: TP) -> int:
    there = [p for p in plan.values() if p.held_by(tp) and p.name in checkpoint.dtypes]
    return sum(count_bytes(checkpoint.dtypes[p.name], p.part_shape(tp)) for p in there)


def list_groups(checkpoint: Checkpoint, plan: Plan, sizes: dict[str, int]) -> list[dict[str, Any]]:
    """Tensors that differ in their layer's number alone, in the order of the files."""
    groups: dict[tuple, dict[str, Any]] = {}
    for name, size in sizes.items():
        pattern = re.sub(r"\.\d+\.", ".*.", checkpoint.names[name])
        shape, dtype = list(checkpoint.shapes[name]), checkpoint.dtypes[name]
        kind, dim = (plan[name].kind, plan[name].dim) if name in plan else ("unused", None)
        new = {"name": pattern, "num_tensors": 0, "dtype": dtype, "shape": shape, "num_bytes": 0}
        group = groups.setdefault((pattern, *shape, dtype), {**new, "placement": kind, "dim": dim})
        group["num_tensors"] += 1
        group["num_bytes"] += size
    return list(groups.values())


def show_source(facts: dict[str, Any]) -> None:
    print(f"{facts['folder']}: {facts['model']}")
    print(f"{facts['num_tensors']} tensors in {facts['num_files']} files, {size_words(facts['num_bytes'])}, ", end="")
    print(f"dtypes {count_words(facts['dtypes'])}")
    show_format(facts)
    print(f"legal world sizes: {', '.join(map(str, facts['legal_world_sizes']))}")
    show_groups(facts["groups"], with_placement="world_size" in facts)
    if "world_size" in facts:
        show_ranks(facts)
    for title in ("missing", "unused", "misshapen", "ignored"):
        names = facts[title]
        if names:
            print(f"{title}: {len(names)}")
            print("".join(f"  {name}\n" for name in names), end="")


def show_groups(groups: list[dict[str, Any]], *, with_placement: bool) -> None:
    rows: list[tuple[str, ...]] = [("tensors", "count", "dtype", "shape", "size", "placement")]
    for group in groups:
        cells = (group["num_tensors"], group["dtype"], group["shape"], size_words(group["num_bytes"]))
        along = "" if group["dim"] is None else f" along dim {group['dim']}"
        rows.append((group["name"], *map(str, cells), f"{group['placement']}{along}"))
    if not with_placement:
        rows = [row[:-1] for row in rows]
    show_table(rows)


def show_ranks(facts: dict[str, Any]) -> None:
    print(f"world_size={facts['world_size']}:")
    for kind, size in facts["bytes_by_placement"].items():
        if size:
            print(f"  {kind:<10}  {size_words(size):>10}  {KINDS[kind]}")
    for rank, size in enumerate(facts["bytes_per_rank"]):
        print(f"  rank {rank:<5}  {size_words(size):>10}")
