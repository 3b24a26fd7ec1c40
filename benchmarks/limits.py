"""What a checkpoint's weights come to, by which figures become shares of the limits (mmdist.performance.limits)."""

from __future__ import annotations

import json
from pathlib import Path

import torch

LAYERS, HEAD = "language_model.model.layers.", "language_model.lm_head."
BYTES_A_NUMBER = {"bf16": 2, "w8a16": 1, "w4a16": 0.5 + 4 / 128, "q8_0": 34 / 32, "q4_0": 18 / 32}
OUR_INTEGERS = ("w8a16", "w4a16")  # which keep the head in bfloat16


def count_numbers(checkpoint: Path) -> tuple[int, int]:
    """Of the decoder's layers, and of its head: a decoded token reads both, a prompt's multiplies with the first."""
    with (checkpoint / "model.safetensors").open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    sizes = {name: torch.Size(entry["shape"]).numel() for name, entry in header.items() if "shape" in entry}
    return tuple(sum(size for name, size in sizes.items() if name.startswith(part)) for part in (LAYERS, HEAD))


def bytes_a_token(checkpoint: Path, kind: str) -> float:
    """Bytes of weights that one step of decoding has to read."""
    layers, head = count_numbers(checkpoint)
    return layers * BYTES_A_NUMBER[kind] + head * BYTES_A_NUMBER["bf16" if kind in OUR_INTEGERS else kind]
