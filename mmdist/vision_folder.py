"""What weights_tools export --vision writes: a graph for each size of batch, and vision.json, which says of what."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mmdist.config import UserError

FORMAT_VERSION = 1
VISION_MANIFEST = "vision.json"


@dataclass(frozen=True)
class GraphInput:
    """shape: of one picture, the batch left out."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class VisionManifest:
    """weights_sha256: tower_hash of the checkpoint. dtype: of pixels, weights and result. files: name -> bytes.

    errors: batch size -> the graph beside torch in float32 (weights_tools.vision.Errors).
    """

    format_version: int
    model: str
    source: str
    weights_sha256: str
    dtype: str
    opset: int
    inputs: tuple[GraphInput, ...]
    batch_sizes: tuple[int, ...]
    errors: Mapping[str, Mapping[str, float]]
    files: Mapping[str, int]


def graph_file(batch: int, backend: str) -> str:
    return f"vision_bs{batch}.{backend}"


def default_folder(checkpoint: Path, backend: str) -> Path:
    """Beside the checkpoint."""
    checkpoint = checkpoint.absolute()
    return checkpoint.with_name(f"{checkpoint.name}-vision-{backend}")


def save_vision_manifest(manifest: VisionManifest, folder: Path) -> None:
    (folder / VISION_MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n")


def load_vision_manifest(folder: Path) -> VisionManifest:
    path = folder / VISION_MANIFEST
    try:
        raw = json.loads(path.read_text())
        if raw["format_version"] != FORMAT_VERSION:
            raise UserError(f"{path}: format_version {raw['format_version']}, this mmdist reads {FORMAT_VERSION}")
        return read_manifest(raw)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not what weights_tools export --vision writes ({error!r}); export again") from error


def read_manifest(raw: dict[str, Any]) -> VisionManifest:
    inputs = tuple(GraphInput(node["name"], tuple(node["shape"]), node["dtype"]) for node in raw["inputs"])
    batch_sizes = tuple(sorted(int(size) for size in raw["batch_sizes"]))
    if set(raw) != {field.name for field in fields(VisionManifest)} or not batch_sizes or batch_sizes[0] < 1:
        raise ValueError("another set of facts, or no batch sizes")
    return VisionManifest(**{**raw, "inputs": inputs, "batch_sizes": batch_sizes})


def tower_hash(tensors: Mapping[str, tuple[str, Sequence[int], str]]) -> str:
    """Of a tower's weights wherever they are stored: our name -> (dtype, shape, sha256 of the bytes)."""
    lines = [f"{name} {dtype} {list(shape)} {digest}\n" for name, (dtype, shape, digest) in sorted(tensors.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def split_batch(count: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """`count` pictures in passes of fixed sizes -> (size, how many of it are pictures; the rest is padding) of each.

    sizes: rising. The largest that is full, and at the end the smallest that holds what is left.
    """
    passes = []
    while count:
        size = max((size for size in sizes if size <= count), default=sizes[0])
        passes.append((size, min(size, count)))
        count -= passes[-1][1]
    return passes
