"""One rank's file of a split folder: its tensors where they lie in the file, their hashes taken ahead in threads.

Hashing leaves Python's lock, so it goes on beside imports, and it brings the file into memory.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections import deque
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path
from threading import Thread

import torch

# safetensors' words for dtypes (https://github.com/huggingface/safetensors, format section)
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class RankFile:
    """A whole safetensors file, of which all tensors are aligned to their dtypes."""

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self.header = json.loads(file.read(length))
        self.header.pop("__metadata__", None)
        self.data_start = 8 + length
        self.hashes: dict[str, Future[str]] = {}

    def map(self, name: str) -> torch.Tensor:
        """The tensor in the file's own pages; writing to it changes a copy in memory."""
        entry = self.header[name]
        first, last = entry["data_offsets"]
        return self._map(first, last, DTYPES[entry["dtype"]], entry["shape"])

    def map_rows(self, names: list[str]) -> torch.Tensor | None:
        """These tensors as one, rows behind rows; None where they do not lie one behind the other."""
        entries = [self.header[name] for name in names]
        if any(a["data_offsets"][1] != b["data_offsets"][0] or a["dtype"] != b["dtype"] for a, b in pairwise(entries)):
            return None
        first, last = entries[0]["data_offsets"][0], entries[-1]["data_offsets"][1]
        shape = [sum(entry["shape"][0] for entry in entries), *entries[0]["shape"][1:]]
        return self._map(first, last, DTYPES[entries[0]["dtype"]], shape)

    def _map(self, first: int, last: int, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
        """Bytes [first, last) of the data."""
        if first == last:
            return torch.empty(shape, dtype=dtype)
        start = self.data_start + first
        page = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with open(self.path, "rb") as file:
            length = self.data_start + last - page
            pages = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=page)
        count = (last - first) // dtype.itemsize
        return torch.frombuffer(pages, dtype=dtype, count=count, offset=start - page).view(shape)

    def hash_ahead(self, threads: int) -> None:
        """Begin to hash the tensors, in the order of the file."""
        self.hashes = {name: Future() for name in self.header}
        todo = deque(self.header)
        for _ in range(threads):
            Thread(target=self._hash_all, args=[todo], daemon=True).start()  # a process that ends does not wait for it

    def _hash_all(self, todo: deque[str]) -> None:
        while todo:
            try:
                name = todo.popleft()
            except IndexError:  # the other thread took the last one
                return
            try:
                self.hashes[name].set_result(sha256(self.map(name)))
            except Exception as error:
                self.hashes[name].set_exception(error)

    def sha256(self, name: str) -> str:
        """Waits for it where it is on its way."""
        return self.hashes[name].result() if name in self.hashes else sha256(self.map(name))


def sha256(tensor: torch.Tensor) -> str:
    """Hash of the tensor's bytes in row-major order."""
    flat = tensor.contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()
