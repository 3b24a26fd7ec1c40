"""Files whose hashes were all found right once, remembered so that they are hashed once a version and not at each load.

A version is what the file system says of a file: its place, size, inode and times. Bytes that change beneath it (a
failing disk) go unnoticed then; `weights_tools verify` hashes always.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from mmdist.native.build import BuildError, cache_folder

log = logging.getLogger("mmdist.load")
MIN_BYTES = 16 << 20  # less is hashed in no time


class CheckedFile:
    """A file as it is now, with the proof it is checked against (say a manifest)."""

    def __init__(self, path: Path, proof: Path):
        self.path, self.proof = path, proof
        self.version = find_version(path, proof)

    def was_checked(self) -> bool:
        """True where remember() was called for this very version."""
        try:
            return json.loads(self._record().read_text()) == self.version
        except (OSError, BuildError, ValueError):
            return False

    def remember(self) -> None:
        """All its hashes are right. Not for small files, nor where it changed meanwhile."""
        if self.version["size"] < MIN_BYTES or find_version(self.path, self.proof) != self.version:
            return
        try:
            record = self._record()
            record.parent.mkdir(exist_ok=True)
            partial = record.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(json.dumps(self.version))
            partial.replace(record)
        except (OSError, BuildError) as error:
            log.info("%s will be hashed again: %s", self.path, error)

    def _record(self) -> Path:
        return cache_folder() / "checked" / f"{hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:32]}.json"


def find_version(path: Path, proof: Path) -> dict[str, Any]:
    """st_ctime_ns is there too: who sets st_mtime_ns back changes it."""
    found = path.stat()
    return {
        "path": str(path.resolve()),
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
        "inode": [found.st_dev, found.st_ino],
        "proof": hashlib.sha256(proof.read_bytes()).hexdigest(),
    }
