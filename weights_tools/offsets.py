"""Offsets of integers (msmodelslim's weight_offset) that are not zero: they run here, and are not portable."""

from __future__ import annotations

from mmdist.weights import Checkpoint

NOT_PORTABLE = "msmodelslim's formula subtracts them, the NPU's operator adds them"


def find_offsets(checkpoint: Checkpoint) -> list[str]:
    """Stored names of the offsets that are not zero."""
    names = [name for name, stored in checkpoint.names.items() if stored.endswith(".weight_offset")]
    return sorted(checkpoint.names[name] for name in names if checkpoint.read_whole(name).any())
