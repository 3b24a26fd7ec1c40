"""manifest.json: what a folder written by `weights_tools split` holds, and the proof for every part."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmdist.blocks import BLOCKS, fill_blocks
from mmdist.config import UserError

FORMAT_VERSION = 2
READABLE = (1, 2)  # 1 had no orders
MANIFEST = "manifest.json"
PART_FILES = "model-rank-*-of-*.safetensors"


@dataclass
class Part:
    """One rank's part of one tensor. ranges: [first, last) rows along the tensor's dim, one a piece.

    order: in which the numbers lie in the file (mmdist.blocks), None: row by row. sha256: of the bytes in the file.
    """

    rank: int
    ranges: list[list[int]]
    shape: list[int]
    sha256: str
    order: str | None = None


@dataclass
class TensorEntry:
    """name: as in the source file. dtype: safetensors' word (F16, BF16, ...). dim: None where it is not cut."""

    name: str
    source_file: str
    source_sha256: str
    dtype: str
    shape: list[int]
    placement: str
    dim: int | None
    parts: list[Part]


@dataclass
class Manifest:
    format_version: int
    model: str
    world_size: int
    source: str
    tensors: list[TensorEntry]


def part_file(rank: int, world_size: int) -> str:
    return f"model-rank-{rank:05d}-of-{world_size:05d}.safetensors"


def save_manifest(manifest: Manifest, folder: Path) -> None:
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n")


def tensor_entry(raw: dict[str, Any]) -> TensorEntry:
    """A TensorEntry from its JSON object."""
    return TensorEntry(**{**raw, "parts": [Part(**part) for part in raw["parts"]]})


def check_orders(entry: TensorEntry, path: Path) -> None:
    for part in entry.parts:
        if part.order is not None and (part.order != BLOCKS or not fill_blocks(part.shape, entry.dtype)):
            raise UserError(
                f"{path}: {entry.name}, {entry.dtype} {part.shape}, lies in the order '{part.order}', which is not "
                "known for such a part; run weights_tools split again"
            )


def load_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text())
        if raw["format_version"] not in READABLE:
            raise UserError(
                f"{path}: format_version {raw['format_version']}, this mmdist reads {FORMAT_VERSION}; "
                "run weights_tools split again"
            )
        tensors = [tensor_entry(entry) for entry in raw.pop("tensors")]
        for entry in tensors:
            check_orders(entry, path)
        return Manifest(**raw, tensors=tensors)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a manifest of weights_tools split ({error!r}); run weights_tools split again"
        ) from error
