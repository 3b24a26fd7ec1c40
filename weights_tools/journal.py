"""What is finished of a folder: a line a tensor, so that a killed run goes on where it stopped; also its lock."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mmdist.config import UserError
from weights_tools.folder import MARKS, clear, lock

JOURNAL = "progress.jsonl"


class Journal:
    """The journal of a folder being written, locked while open. done: tensor name -> its entry, plain JSON.

    Its first line is the job's identity (sources, layout, files): a journal of another job, or one whose files are
    not all there, is thrown away with everything in the folder. Lines are on the disk after commit().
    """

    def __init__(self, folder: Path, verb: str, identity: dict[str, Any]):
        self.path = folder / JOURNAL
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not (self.path.exists() or (folder / MARKS[verb]).exists()):
            raise UserError(f"{folder}: in the way and not left by a {verb}; move it, or choose another --dst")
        self.file = open(self.path, "a+b")  # noqa: SIM115 - open for as long as the job runs
        lock(self.file, self.path, verb)
        self.done: dict[str, dict[str, Any]] = {}
        self.pending: list[Any] = []
        lines = self._read_lines()
        if lines and lines[0] == identity and all_there(folder, identity["files"]):
            self.done = {entry["name"]: entry for entry in lines[1:]}
        else:
            self._start(folder, identity)

    def _read_lines(self) -> list[Any]:
        """The whole lines; one cut off by a kill is removed, with all that follows."""
        self.file.seek(0)
        lines, end = [], 0
        for line in self.file:
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
            if not line.endswith(b"\n"):
                lines.pop()
                break
            end += len(line)
        self.file.truncate(end)
        return lines

    def _start(self, folder: Path, identity: dict[str, Any]) -> None:
        clear(folder, keep=JOURNAL)
        self.file.truncate(0)
        self.pending = [identity]

    def add(self, entry: dict[str, Any]) -> None:
        self.done[entry["name"]] = entry
        self.pending.append(entry)

    def take(self) -> list[Any]:
        """The lines added since the last time, to be committed."""
        lines, self.pending = self.pending, []
        return lines

    def commit(self, lines: list[Any]) -> None:
        """Call it once the tensors of these lines are on the disk."""
        self.file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def all_there(folder: Path, sizes: dict[str, int]) -> bool:
    return all((folder / name).exists() and (folder / name).stat().st_size == size for name, size in sizes.items())
