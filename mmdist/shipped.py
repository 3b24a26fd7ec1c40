"""Where conf/ and assets/ are, and where the shipped checkpoints go that are converted at their first use.

A checkout has both folders beside the package, a wheel inside it (setup.py puts them there).
"""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from mmdist.config import ModelConfig, UserError

PACKAGE = Path(__file__).resolve().parent
INSTALLED = (PACKAGE / "conf").is_dir()
SHIPPED = PACKAGE if INSTALLED else PACKAGE.parent
CONF, ASSETS = SHIPPED / "conf", SHIPPED / "assets"


def demo_folder(model: ModelConfig) -> Path:
    """The family's shipped checkpoint, which may have to be made of model.demo_source first.

    A checkout has it in build/, an installed mmdist, whose own folder may be read-only, in the user's cache.
    """
    if model.demo_checkpoint is None:
        raise UserError(f"model={model.name} ships no checkpoint; give one with checkpoint=DIR")
    if not INSTALLED or model.demo_source is None:
        return SHIPPED / model.demo_checkpoint
    try:
        return cache_folder() / version("mmdist") / Path(model.demo_checkpoint).name
    except OSError as error:
        raise UserError(f"{error}; set XDG_CACHE_HOME to a folder that can be written") from error


def cache_folder() -> Path:
    """XDG_CACHE_HOME/mmdist, else ~/.cache/mmdist; where that cannot be written, a private temporary one."""
    asked = Path(os.environ.get("XDG_CACHE_HOME", ""))
    with suppress(OSError, RuntimeError):  # RuntimeError: a user without a home
        folder = (asked if asked.is_absolute() else Path.home() / ".cache") / "mmdist"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    return private_folder(Path(tempfile.gettempdir()) / f"mmdist-{os.getuid()}")


def private_folder(folder: Path) -> Path:
    """A folder that only this user can write; PermissionError for one that another user has laid there."""
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(f"{folder} is not a folder of this user alone; remove it")
    return folder
