"""A folder made tensor by tensor from another: checked first, written to DST.partial, renamed when whole.

Run the same command again after a kill and it goes on where it stopped. Several tensors are at work at once, in
threads (reading, hashing and arithmetic leave Python's lock), as long as they fit a budget of bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch

from mmdist.config import UserError
from weights_tools.display import byte_bar
from weights_tools.folder import check_apart, check_space, check_target, other_files, publish, sync_all
from weights_tools.journal import Journal
from weights_tools.part_file import Layout, PartFile, build_header

# Files go to the disk, and their tensors into the journal, whenever this many bytes of the source were read.
COMMIT_BYTES = 128 << 20
# Tensors at work at once have no more bytes than this together; a larger one is alone.
WORK_BYTES = 192 << 20
Files = Mapping[str, PartFile]


class FolderJob(ABC):
    """src: the folder read. layouts: name of each safetensors file to write -> what is in it. sizes: each tensor of
    the source, by its name there and in reading order -> bytes."""

    verb: ClassVar[str]
    layouts: dict[str, Layout]
    sizes: dict[str, int]

    def __init__(self, model: str, src: Path, weight_files: list[Path]):
        self.model, self.src = model, src
        self.stamps = {path: stamp(path) for path in [*weight_files, *other_files(src)]}

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What decides the bytes written, besides the source."""

    @abstractmethod
    def write_tensor(self, name: str, files: Files) -> dict[str, Any]:
        """Write what becomes of a tensor of the source; its entry in the journal, with its "name"."""

    @abstractmethod
    def write_rest(self, folder: Path, entries: list[dict[str, Any]]) -> None:
        """All but the safetensors files, from the entries of all tensors."""

    def file_sizes(self) -> dict[str, int]:
        """File name -> bytes."""
        return {name: build_header(layout)[2] for name, layout in self.layouts.items()}

    def check(self, dst: Path, *, force: bool) -> Path:
        """Refuse a target that cannot be written; the folder it is written to until it is whole."""
        partial = dst.with_name(f"{dst.name}.partial")
        check_apart(self.src, dst)
        check_target(dst, force, self.verb)
        check_space(partial, self.file_sizes())
        return partial

    def write(self, dst: Path, *, force: bool = False, jobs: int = 1) -> None:
        partial = self.check(dst, force=force)
        journal = Journal(partial, self.verb, self._identity())
        try:
            self._write_tensors(partial, journal, jobs)
            self.write_rest(partial, [journal.done[name] for name in self.sizes])
            self.check_unchanged()
            journal.path.unlink()
            sync_all([*partial.iterdir(), partial])
            publish(partial, dst, force, self.verb)
        finally:
            journal.close()

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a journal to be gone on with."""
        settings = json.dumps([self.settings(), self.layouts])
        return {
            "model": self.model,
            "source": str(self.src),
            "source_files": {str(path): list(was) for path, was in self.stamps.items()},
            "settings": hashlib.sha256(settings.encode()).hexdigest(),
            "files": self.file_sizes(),
        }

    def check_unchanged(self) -> None:
        for path, was in self.stamps.items():
            if not path.exists() or stamp(path) != was:
                raise UserError(f"{path}: changed while it was read; run again when nothing writes to {self.src}")

    def _write_tensors(self, folder: Path, journal: Journal, jobs: int) -> None:
        left = {name: size for name, size in self.sizes.items() if name not in journal.done}
        total, todo, uncommitted = sum(self.sizes.values()), sum(left.values()), 0
        with (
            self._open_files(folder, journal) as files,
            byte_bar(total, self.verb, done=total - todo) as bar,
            ThreadPoolExecutor(1) as disk,  # the next tensors are at work while the last go to the disk
        ):
            committed = disk.submit(commit, files, journal, journal.take())
            for entry in work_bounded(lambda name: self._write_tensor(name, files), left, jobs):
                journal.add(entry)
                bar.update(left[entry["name"]])
                uncommitted += left[entry["name"]]
                if uncommitted >= COMMIT_BYTES:
                    committed.result()
                    committed, uncommitted = disk.submit(commit, files, journal, journal.take()), 0
            committed.result()

    def _write_tensor(self, name: str, files: Files) -> dict[str, Any]:
        self.check_unchanged()
        return self.write_tensor(name, files)

    @contextmanager
    def _open_files(self, folder: Path, journal: Journal) -> Iterator[Files]:
        files = {name: PartFile(folder / name, layout) for name, layout in self.layouts.items()}
        try:
            yield files
        finally:  # also when interrupted: what is finished need not be done again
            commit(files, journal, journal.take())
            for file in files.values():
                file.close()


def stamp(path: Path) -> tuple[int, int]:
    """(bytes, time of the last change)"""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def commit(files: Files, journal: Journal, lines: list[Any]) -> None:
    for file in files.values():
        file.sync()
    journal.commit(lines)


def work_bounded(work: Callable[[str], Any], sizes: Mapping[str, int], jobs: int) -> Iterator[Any]:
    """work(name) of each name, as they are finished; at most `jobs` and WORK_BYTES at once."""
    with ThreadPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running: dict[Future, int] = {}
        for name, size in sizes.items():
            while running and (len(running) >= jobs or sum(running.values()) + size > WORK_BYTES):
                yield from finished(running)
            running[pool.submit(work, name)] = size
        while running:
            yield from finished(running)


def finished(running: dict[Future, int]) -> Iterator[Any]:
    """Wait for one, and take out all that are finished."""
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        del running[future]
        yield future.result()


def add_job_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """What all verbs have that write a folder tensor by tensor."""
    parser.add_argument("--force", action="store_true", help=f"replace DST when it is a folder made by {verb}")
    parser.add_argument("--dry-run", action="store_true", help="check everything and write nothing")
    parser.add_argument(
        "--jobs", type=whole_number, default=min(4, os.cpu_count() or 1), metavar="N",
        help="tensors at work at once; default %(default)s",
    )  # fmt: skip


def whole_number(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)
