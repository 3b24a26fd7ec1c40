"""What a split has finished: a line a tensor, so that a killed run goes on where it stopped; also the folder's lock."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmdist.config import UserError
from mmdist.manifest import MANIFEST, TensorEntry, tensor_entry
from weights_tools.folder import clear, lock

JOURNAL = "progress.jsonl"


class Journal:
    """The journal of a folder being written, locked while open. done: tensor name -> its entry.

    Its first line is the job's identity (sources, layout, files): a journal of another job, or one whose part files
    are not all there, is thrown away with everything in the folder. Lines are on the disk after commit().
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.path = folder / JOURNAL
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not (self.path.exists() or (folder / MANIFEST).exists()):
            raise UserError(f"{folder}: in the way and not left by a split; move it, or choose another --dst")
        self.file = open(self.path, "a+b")  # noqa: SIM115 - open for as long as the job runs
        lock(self.file, self.path, "split")
        self.done: dict[str, TensorEntry] = {}
        self.pending: list[Any] = []
        lines = self._read_lines()
        if lines and lines[0] == identity and all_there(folder, identity["parts"]):
            self.done = {raw["name"]: tensor_entry(raw) for raw in lines[1:]}
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

    def add(self, entry: TensorEntry) -> None:
        self.done[entry.name] = entry
        self.pending.append(asdict(entry))

    def commit(self) -> None:
        """Call it once the parts of the tensors added so far are on the disk."""
        self.file.write(b"".join(json.dumps(line).encode() + b"\n" for line in self.pending))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.pending = []

    def close(self) -> None:
        self.file.close()


def all_there(folder: Path, sizes: dict[str, int]) -> bool:
    return all((folder / name).exists() and (folder / name).stat().st_size == size for name, size in sizes.items())
