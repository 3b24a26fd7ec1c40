"""One rank's safetensors file, written tensor by tensor: the header is known ahead, so each part has its place.

Format: 8 bytes little-endian header length, the header as JSON padded with spaces, then the tensors' bytes
(https://github.com/huggingface/safetensors, format section).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from weights_tools.values import count_bytes

# (name in the file, safetensors' word for its dtype, shape)
Layout = list[tuple[str, str, tuple[int, ...]]]


def build_header(layout: Layout) -> tuple[bytes, dict[str, int], int]:
    """-> (header with its length in front, offset of each tensor in the file, size of the file).

    Wider dtypes come first and the header fills whole words, so every tensor is aligned to its dtype.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name, dtype, shape in sorted(layout, key=lambda item: -count_bytes(item[1], ())):
        starts[name], end = end, end + count_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [starts[name], end]}
    words = json.dumps(header, separators=(",", ":")).encode()
    words += b" " * (-len(words) % 8)
    base = 8 + len(words)
    return len(words).to_bytes(8, "little") + words, {name: base + start for name, start in starts.items()}, base + end


class PartFile:
    """Opens the file at its full size (a hole where nothing was written yet); tensors come in any order."""

    def __init__(self, path: Path, layout: Layout):
        header, self.offsets, size = build_header(layout)
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        os.ftruncate(self.fd, size)
        write_at(self.fd, memoryview(header), 0)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        flat = tensor.contiguous().flatten().view(torch.uint8)
        write_at(self.fd, flat.numpy().data, self.offsets[name])

    def sync(self) -> None:
        os.fsync(self.fd)

    def close(self) -> None:
        os.close(self.fd)


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """All of data: one call may write less (Linux: at most 2 GiB)."""
    while len(data):
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count
