"""Cut a checkpoint, plain or quantised, for its ranks: a safetensors file a rank, manifest.json, the other files.

Written to DST.partial and renamed when whole; run the same command again after a kill and it goes on where it stopped.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmdist.blocks import BLOCKS, fill_blocks, to_stored
from mmdist.manifest import FORMAT_VERSION, Manifest, Part, TensorEntry, part_file, save_manifest, tensor_entry
from mmdist.plan import Placement, Plan, cut
from mmdist.rank_file import sha256
from mmdist.tp import TP
from mmdist.weights import Checkpoint
from weights_tools.display import size_words
from weights_tools.folder import absolute, copy_other_files
from weights_tools.job import Files, FolderJob, add_job_arguments, whole_number
from weights_tools.part_file import Layout
from weights_tools.source import find_source, load_plan, open_source
from weights_tools.values import count_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a family as in conf/model, or a checkpoint folder")
    parser.add_argument("--ranks", type=whole_number, required=True, metavar="N", help="the world size to cut for")
    parser.add_argument("--src", metavar="DIR", help="the checkpoint; default: the family's demo_checkpoint")
    parser.add_argument("--dst", metavar="DIR", help="the folder to write; default: beside the source, SRC-tpN")
    parser.add_argument(
        "--packed", action="store_true",
        help="bfloat16 linear weights in the order in which native CPU kernels read them: used where they lie, so that "
        "the first token comes sooner; all else reads such a folder too, and puts them in their old order to do so",
    )  # fmt: skip
    add_job_arguments(parser, SplitJob.verb)


def run(args: argparse.Namespace) -> int:
    model, src = find_source(args.model, args.src)
    dst = absolute(args.dst) if args.dst else src.with_name(f"{src.name}-tp{args.ranks}")
    job = SplitJob(model, src, args.ranks, packed=args.packed)
    if args.dry_run:
        job.check(dst, force=args.force)
    else:
        job.write(dst, force=args.force, jobs=args.jobs)
    sizes = ", ".join(size_words(size) for size in job.file_sizes().values())
    words = "; nothing was written" if args.dry_run else ""
    print(f"{dst}: {len(job.plan)} tensors for {args.ranks} ranks ({sizes}){words}")
    return 0


class SplitJob(FolderJob):
    """One checkpoint and one world size: who gets what. packed: in blocks (mmdist.blocks), what can be."""

    verb = "split"

    def __init__(self, model: str, src: Path, world_size: int, *, packed: bool = False):
        self.packed = packed
        self.ranks = [TP(rank, world_size) for rank in range(world_size)]
        self.checkpoint: Checkpoint = open_source(model, src)
        super().__init__(model, src, sorted(set(self.checkpoint.files.values())))
        self.plan: Plan = load_plan(model, src, world_size)[1]
        self.checkpoint.check(self.plan, model)
        files, names = self.checkpoint.files, self.checkpoint.names
        placements = sorted(self.plan.values(), key=lambda p: (files[p.name], names[p.name]))
        self.placements = {names[p.name]: p for p in placements}
        self.layouts = {part_file(tp.rank, tp.size): self._layout(tp) for tp in self.ranks}
        dtypes = self.checkpoint.dtypes
        self.sizes = {name: count_bytes(dtypes[p.name], p.shape) for name, p in self.placements.items()}

    def _layout(self, tp: TP) -> Layout:
        """What is in one rank's file, in the plan's order: what makes one parameter lies together and is not copied."""
        mine = (placement for placement in self.plan.values() if placement.held_by(tp))
        return [(self.checkpoint.names[p.name], self.checkpoint.dtypes[p.name], p.part_shape(tp)) for p in mine]

    def settings(self) -> dict[str, Any]:
        placements = self.placements.items()
        cuts = [
            (name, p.kind, p.dim, [(p.ranges(tp), self.order(p, tp)) for tp in self.ranks]) for name, p in placements
        ]
        return {"format_version": FORMAT_VERSION, "cuts": cuts}

    def order(self, placement: Placement, tp: TP) -> str | None:
        """In which this rank's part is stored."""
        fills = fill_blocks(placement.part_shape(tp), self.checkpoint.dtypes[placement.name])
        return BLOCKS if self.packed and placement.packs and fills else None

    def write_tensor(self, name: str, files: Files) -> dict[str, Any]:
        placement, checkpoint = self.placements[name], self.checkpoint
        full = checkpoint.read_whole(placement.name)
        source_sha256 = sha256(full)
        parts = []
        for tp in self.ranks:
            if placement.held_by(tp):
                order = self.order(placement, tp)
                part = to_stored(cut(full, placement, tp), order).contiguous()
                files[part_file(tp.rank, tp.size)].write(name, part)
                hash_of_part = source_sha256 if placement.dim is None else sha256(part)
                ranges = [list(rows) for rows in placement.ranges(tp)]
                parts.append(Part(tp.rank, ranges, list(part.shape), hash_of_part, order))
        entry = TensorEntry(
            name=name,
            source_file=checkpoint.files[placement.name].name,
            source_sha256=source_sha256,
            dtype=checkpoint.dtypes[placement.name],
            shape=list(placement.shape),
            placement=placement.kind,
            dim=placement.dim,
            parts=parts,
        )
        return asdict(entry)

    def write_rest(self, folder: Path, entries: list[dict[str, Any]]) -> None:
        copy_other_files(self.src, folder)
        tensors = [tensor_entry(entry) for entry in entries]
        save_manifest(Manifest(FORMAT_VERSION, self.model, len(self.ranks), str(self.src), tensors), folder)
