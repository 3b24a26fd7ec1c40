"""The folder a verb makes: may it be made, what else goes into it, and the rename that makes it whole."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from mmdist.config import UserError
from mmdist.manifest import MANIFEST
from mmdist.vision_folder import VISION_MANIFEST
from weights_tools.display import size_words

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz")
CONVERSION, EXPORT, QUANTIZATION = "conversion.json", "export.json", "quantization.json"
# Verb -> the file by which a folder it made is known.
MARKS = {
    "split": MANIFEST, "convert": CONVERSION, "export": EXPORT, "quantize": QUANTIZATION,
    "export --vision": VISION_MANIFEST,
}  # fmt: skip


def mark(folder: Path, verb: str) -> Path:
    return folder / MARKS[verb]


def absolute(path: str) -> Path:
    """Absolute and without `..`, symbolic links kept: the folder's own name gives the default of --dst."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def check_apart(src: Path, dst: Path) -> None:
    if src.resolve() == dst.resolve():
        raise UserError(f"{dst}: source and target are the same folder; choose another --dst")


def check_target(dst: Path, force: bool, verb: str) -> None:
    if not dst.exists():
        return
    made_by_verb = mark(dst, verb).exists()
    if not force:
        hint = "choose another --dst" + (", or --force to replace it" if made_by_verb else "")
        raise UserError(f"{dst}: is there already; {hint}")
    if not made_by_verb:
        raise UserError(f"{dst}: not a folder made by {verb}, so --force does not replace it; choose another --dst")


def lock(file: IO, path: Path, verb: str) -> None:
    """Hold the open file at `path` until it is closed, so that no other run writes the folder it is in."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        mine = False
    if not mine:  # taken, or moved away by the other as it finished
        file.close()
        raise UserError(f"{path.parent}: another {verb} is writing it; wait for it or choose another --dst")


def clear(folder: Path, keep: str) -> None:
    """Remove all but the file `keep`."""
    for path in folder.iterdir():
        if path.name != keep:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def check_space(partial: Path, sizes: dict[str, int]) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    there = sum(path.stat().st_blocks * 512 for path in partial.glob("*.safetensors"))
    needed, free = sum(sizes.values()) - there, shutil.disk_usage(partial.parent).free
    if needed > free:
        raise UserError(
            f"{partial.parent}: {size_words(needed)} needed, {size_words(free)} free; make room or choose another --dst"
        )


def copy_other_files(src: Path, dst: Path) -> None:
    for path in other_files(src):
        shutil.copyfile(path, dst / path.name)


def other_files(folder: Path) -> list[Path]:
    """Config, tokenizer and processor files: all that is neither weights nor their index, nor a verb's own."""

    def wanted(path: Path) -> bool:
        weights = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        return path.is_file() and not weights and not path.name.startswith(".") and path.name not in MARKS.values()

    return sorted(path for path in folder.iterdir() if wanted(path))


def publish(partial: Path, dst: Path, force: bool, verb: str) -> None:
    """Rename; a folder that is replaced is moved away first and removed last."""
    check_target(dst, force, verb)
    replaced = dst.with_name(f"{dst.name}.replaced.partial")
    if dst.exists():
        dst.rename(replaced)
    partial.rename(dst)
    sync_all([dst.parent])
    shutil.rmtree(replaced, ignore_errors=True)


def sync_all(paths: Iterable[Path]) -> None:
    """Files or folders to the disk."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
