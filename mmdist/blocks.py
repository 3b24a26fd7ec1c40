"""The order in which native kernels read a weight, as a split folder may hold it: no work is left for who loads it.

Whole blocks are a permutation of the numbers, so a packed tensor keeps shape and dtype, and several that lie one behind
the other are packed as one. native/linear.c says what the order is good for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

ROWS, COLUMNS = 32, 8  # of a block; columns come in multiples of
BLOCKS = f"blocks of {ROWS} rows, pairs of columns"  # the order's name in a manifest


def fill_blocks(shape: Sequence[int], dtype: str) -> bool:
    """True for a matrix of whole blocks; dtype is safetensors' word."""
    return dtype == "BF16" and len(shape) == 2 and shape[0] % ROWS == 0 and shape[1] % COLUMNS == 0


def to_stored(numbers: torch.Tensor, order: str | None) -> torch.Tensor:
    """(rows, columns) that fill blocks -> the same numbers as they lie in the file; order None: as they are."""
    return numbers if order is None else exchange(numbers, ROWS, numbers.shape[1] // 2)


def from_stored(stored: torch.Tensor, order: str | None) -> torch.Tensor:
    """to_stored undone."""
    return stored if order is None else exchange(stored, stored.shape[1] // 2, ROWS)


def exchange(x: torch.Tensor, outer: int, inner: int) -> torch.Tensor:
    """In each block of rows, the pairs of `outer` runs of `inner` pairs -> `inner` runs of `outer`."""
    pairs = x.contiguous().view(torch.int32).view(len(x) // ROWS, outer, inner)
    return pairs.transpose(1, 2).contiguous().view(x.dtype).view(x.shape)
