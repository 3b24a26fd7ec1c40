"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Finding:
    name: str
    value: str
    state: str = "ok"  # or note (it costs speed or memory), or broken (it keeps jobs from running)
    cure: str = ""  # the command or key that mends it


def broken(error: str) -> tuple[str, str, str]:
    """An error that tells its cure after a semicolon, as (value, state, cure)."""
    what, _, cure = error.partition("; ")
    return what, "broken", cure
