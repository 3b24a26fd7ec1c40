"""Values no weight should have."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

# Values looked at in one go: the memory this takes beside the tensor stays small.
CHUNK = 1 << 24


def bad_values(tensor: torch.Tensor) -> Iterator[str]:
    """Nothing, or one line of words about NaN and infinite values."""
    if not tensor.is_floating_point():
        return
    num_nan = num_inf = 0
    for chunk in tensor.flatten().split(CHUNK):
        chunk = chunk.float() if chunk.dtype.itemsize == 1 else chunk  # float8 has no isfinite
        if not chunk.isfinite().all():
            num_nan += int(chunk.isnan().sum())
            num_inf += int(chunk.isinf().sum())
    if num_nan or num_inf:
        yield f"has {num_nan} NaN and {num_inf} infinite values (of {tensor.numel()})"


def count_bytes(dtype: str, shape: tuple[int, ...] | list[int]) -> int:
    """Bytes of a tensor from safetensors' word for its dtype (F16, BF16, F8_E4M3, BOOL, ...) and its shape."""
    bits = re.search(r"\d+", dtype)
    itemsize = int(bits.group()) // 8 if bits else 1
    for size in shape:
        itemsize *= size
    return itemsize
