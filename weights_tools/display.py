"""Numbers for people: sizes in words, and the progress bar of a run over bytes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tqdm import tqdm

UNITS = ("KiB", "MiB", "GiB", "TiB")


def size_words(num_bytes: int) -> str:
    """1536 -> 1.5 KiB"""
    if num_bytes < 1024:
        return f"{num_bytes} bytes"
    power = min((num_bytes.bit_length() - 1) // 10, len(UNITS))
    return f"{num_bytes / 1024**power:.1f} {UNITS[power - 1]}"


def byte_bar(total: int, what: str, *, done: int = 0, unit: str = "B") -> tqdm:
    """A bar with bytes/s (or others) and the time left on stderr, silent where no one watches."""
    hidden = not sys.stderr.isatty()
    return tqdm(total=total, initial=done, desc=what, unit=unit, unit_scale=True, unit_divisor=1024, disable=hidden)


def show_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
