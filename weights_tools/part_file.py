"""One rank's safetensors file, written tensor by tensor: the header is known ahead, so each part has its place.

Format: 8 bytes little-endian header length, the header as JSON padded with spaces, then the tensors' bytes
(https://github.com/huggingface/safetensors, format section).
"""

from __future__ import annotations

import json
import mmap
import os
import threading
from pathlib import Path

import torch

from weights_tools.values import count_bytes

# (name in the file, safetensors' word for its dtype, shape)
Layout = list[tuple[str, str, tuple[int, ...]]]


PAGE = max(4096, mmap.PAGESIZE)
LINE = 64  # bytes that processors read at once
STAGE_BYTES = 8 << 20  # of one direct write
DIRECT_BYTES = 1 << 20  # less is not worth one
THREAD = threading.local()


def build_header(layout: Layout) -> tuple[bytes, dict[str, int], int]:
    """-> (header with its length in front, offset of each tensor in the file, size of the file).

    What fills whole cache lines comes first and begins with one, as kernels like it that read it in the file; of the
    rest, wider dtypes come first: so every tensor is aligned to its dtype.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    ordered = sorted(layout, key=lambda item: (count_bytes(*item[1:]) % LINE > 0, -count_bytes(item[1], ())))
    for name, dtype, shape in ordered:
        starts[name], end = end, end + count_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [starts[name], end]}
    words = json.dumps(header, separators=(",", ":")).encode()
    words += b" " * (-(8 + len(words)) % LINE)
    base = 8 + len(words)
    return len(words).to_bytes(8, "little") + words, {name: base + start for name, start in starts.items()}, base + end


class PartFile:
    """Opens the file at its full size (a hole where nothing was written yet); tensors come in any order.

    What fills whole pages goes past the page cache where the file system allows it: written once and read by others
    much later, it would push out what is being read, and in virtual machines fresh pages cost more than the disk.
    """

    def __init__(self, path: Path, layout: Layout):
        header, self.offsets, size = build_header(layout)
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self.direct = open_direct(path)
        os.ftruncate(self.fd, size)
        write_at(self.fd, memoryview(header), 0)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        flat, start = tensor.contiguous().flatten().view(torch.uint8), self.offsets[name]
        first, last = -(-start // PAGE) * PAGE, (start + len(flat)) // PAGE * PAGE
        if self.direct is None or last - first < DIRECT_BYTES:
            write_at(self.fd, flat.numpy().data, start)
            return
        for page in range(first, last, STAGE_BYTES):
            self._write_pages(flat[page - start : min(page + STAGE_BYTES, last) - start], page)
        write_at(self.fd, flat[: first - start].numpy().data, start)
        write_at(self.fd, flat[last - start :].numpy().data, last)

    def _write_pages(self, data: torch.Tensor, offset: int) -> None:
        """Whole pages, by way of memory that lies as direct writes want it."""
        assert self.direct is not None, "the file system takes direct writes"
        stage = staging()
        torch.frombuffer(stage, dtype=torch.uint8)[: len(data)].copy_(data)
        count = os.pwrite(self.direct, memoryview(stage)[: len(data)], offset)
        write_at(self.fd, memoryview(stage)[count : len(data)], offset + count)  # after a short write, say a full disk

    def sync(self) -> None:
        os.fsync(self.fd)

    def close(self) -> None:
        os.close(self.fd)
        if self.direct is not None:
            os.close(self.direct)


def open_direct(path: Path) -> int | None:
    """None where the system or the file system has no direct writes."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT) if hasattr(os, "O_DIRECT") else None
    except OSError:
        return None


def staging() -> mmap.mmap:
    """This thread's memory for pages on their way to the disk."""
    if not hasattr(THREAD, "stage"):
        THREAD.stage = mmap.mmap(-1, STAGE_BYTES)
    return THREAD.stage


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """All of data: one call may write less (Linux: at most 2 GiB)."""
    while len(data):
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count
