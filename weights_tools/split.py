"""Cut a checkpoint for its ranks: one safetensors file a rank, manifest.json, config and processor files.

Written to DST.partial and renamed when whole; run the same command again after a kill and it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmdist.manifest import FORMAT_VERSION, Manifest, Part, TensorEntry, part_file, save_manifest
from mmdist.plan import Placement, Plan, cut
from mmdist.tp import TP
from mmdist.weights import Checkpoint, sha256
from weights_tools.display import byte_bar, size_words
from weights_tools.folder import absolute, check_space, check_target, copy_other_files, publish, sync_all
from weights_tools.journal import Journal
from weights_tools.part_file import Layout, PartFile, build_header
from weights_tools.source import find_source, load_plan, open_source
from weights_tools.values import count_bytes

# Parts go to the disk, and their tensors into the journal, whenever this many bytes of the source were read.
COMMIT_BYTES = 256 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a family as in conf/model, or a checkpoint folder")
    parser.add_argument("--ranks", type=whole_number, required=True, metavar="N", help="the world size to cut for")
    parser.add_argument("--src", metavar="DIR", help="the checkpoint; default: the family's demo_checkpoint")
    parser.add_argument("--dst", metavar="DIR", help="the folder to write; default: beside the source, SRC-tpN")
    parser.add_argument("--force", action="store_true", help="replace DST when it is a folder made by split")


def whole_number(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def run(args: argparse.Namespace) -> int:
    model, src = find_source(args.model, args.src)
    dst = absolute(args.dst) if args.dst else src.with_name(f"{src.name}-tp{args.ranks}")
    job = SplitJob(model, src, args.ranks)
    job.write(dst, force=args.force)
    sizes = [size_words(size) for size in job.part_sizes().values()]
    print(f"{dst}: {len(job.plan)} tensors for {args.ranks} ranks ({', '.join(sizes)})")
    return 0


class SplitJob:
    """One checkpoint and one world size: who gets what, checked before anything is written."""

    def __init__(self, model: str, src: Path, world_size: int):
        self.model, self.src = model, src
        self.ranks = [TP(rank, world_size) for rank in range(world_size)]
        self.plan: Plan = load_plan(model, src, world_size)[1]
        self.checkpoint: Checkpoint = open_source(model, src)
        self.checkpoint.check(self.plan, model)
        files, names = self.checkpoint.files, self.checkpoint.names
        self.placements = sorted(self.plan.values(), key=lambda p: (files[p.name], names[p.name]))

    def layout(self, tp: TP) -> Layout:
        """What is in one rank's file."""
        mine = [placement for placement in self.placements if placement.held_by(tp)]
        return [(self.checkpoint.names[p.name], self.checkpoint.dtypes[p.name], p.part_shape(tp)) for p in mine]

    def part_sizes(self) -> dict[str, int]:
        """File name -> bytes."""
        return {part_file(tp.rank, tp.size): build_header(self.layout(tp))[2] for tp in self.ranks}

    def identity(self) -> dict[str, Any]:
        """What must be the same for a journal to be gone on with."""
        cuts = [(p.name, p.kind, p.dim, [p.ranges(tp) for tp in self.ranks]) for p in self.placements]
        layout = [self.layout(tp) for tp in self.ranks]
        stats = {path.name: path.stat() for path in sorted(set(self.checkpoint.files.values()))}
        return {
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "source": str(self.src),
            "source_files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
            "cuts": hashlib.sha256(json.dumps([cuts, layout]).encode()).hexdigest(),
            "parts": self.part_sizes(),
        }

    def write(self, dst: Path, *, force: bool = False) -> None:
        """Make the folder dst; until it is whole there is only DST.partial."""
        check_target(dst, force, "split")
        partial = dst.with_name(f"{dst.name}.partial")
        check_space(partial, self.part_sizes())
        journal = Journal(partial, self.identity())
        try:
            self._write_parts(partial, journal)
            copy_other_files(self.src, partial)
            save_manifest(self._manifest(journal), partial)
            journal.path.unlink()
            sync_all([*partial.iterdir(), partial])
            publish(partial, dst, force, "split")
        finally:
            journal.close()

    def _write_parts(self, folder: Path, journal: Journal) -> None:
        left = [p for p in self.placements if self.checkpoint.names[p.name] not in journal.done]
        total, todo = self._count(self.placements), self._count(left)
        uncommitted = 0
        with self._open_parts(folder, journal) as parts, byte_bar(total, "splitting", done=total - todo) as bar:
            for placement in left:
                journal.add(self._write_tensor(placement, parts))
                size = self._count([placement])
                bar.update(size)
                uncommitted += size
                if uncommitted >= COMMIT_BYTES:
                    commit(parts, journal)
                    uncommitted = 0

    def _count(self, placements: list[Placement]) -> int:
        """Bytes of these tensors in the source."""
        return sum(count_bytes(self.checkpoint.dtypes[p.name], p.shape) for p in placements)

    @contextmanager
    def _open_parts(self, folder: Path, journal: Journal) -> Iterator[list[PartFile]]:
        parts = [PartFile(folder / part_file(tp.rank, tp.size), self.layout(tp)) for tp in self.ranks]
        try:
            commit(parts, journal)
            yield parts
        finally:  # also when interrupted: what is finished need not be done again
            commit(parts, journal)
            for part in parts:
                part.close()

    def _write_tensor(self, placement: Placement, files: list[PartFile]) -> TensorEntry:
        checkpoint, name = self.checkpoint, placement.name
        full = checkpoint.read_whole(name)
        parts = []
        for tp in self.ranks:
            if placement.held_by(tp):
                part = cut(full, placement, tp).contiguous()
                files[tp.rank].write(checkpoint.names[name], part)
                ranges = [list(rows) for rows in placement.ranges(tp)]
                parts.append(Part(tp.rank, ranges, list(part.shape), sha256(part)))
        return TensorEntry(
            name=checkpoint.names[name],
            source_file=checkpoint.files[name].name,
            source_sha256=sha256(full),
            dtype=checkpoint.dtypes[name],
            shape=list(placement.shape),
            placement=placement.kind,
            dim=placement.dim,
            parts=parts,
        )

    def _manifest(self, journal: Journal) -> Manifest:
        entries = [journal.done[self.checkpoint.names[placement.name]] for placement in self.placements]
        return Manifest(FORMAT_VERSION, self.model, len(self.ranks), str(self.src), entries)


def commit(parts: list[PartFile], journal: Journal) -> None:
    for part in parts:
        part.sync()
    journal.commit()
