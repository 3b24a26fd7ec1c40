"""What a checkpoint's weights come to, by which figures become shares of the limits (mmdist.performance.limits).

Weights count as they are stored: our native kernels read bfloat16 in 12 bits, so their share may be above 1.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

LAYERS, HEAD = "language_model.model.layers.", "language_model.lm_head."
BYTES_A_NUMBER = {"bf16": 2, "w8a16": 1, "w4a16": 0.5 + 4 / 128, "q8_0": 34 / 32, "q4_0": 18 / 32}
HEAD_BYTES = {"w8a16": 2, "w4a16": 2, "q4_0": 210 / 256}  # of those that keep it in more bits: bfloat16, q6_K


def count_numbers(checkpoint: Path) -> tuple[int, int]:
    """Of the decoder's layers, and of its head: a decoded token reads both, a prompt's multiplies with the first."""
    with (checkpoint / "model.safetensors").open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    sizes = {name: torch.Size(entry["shape"]).numel() for name, entry in header.items() if "shape" in entry}
    return tuple(sum(size for name, size in sizes.items() if name.startswith(part)) for part in (LAYERS, HEAD))


def bytes_a_token(checkpoint: Path, kind: str) -> float:
    """Bytes of weights that one step of decoding has to read."""
    layers, head = count_numbers(checkpoint)
    return layers * BYTES_A_NUMBER[kind] + head * HEAD_BYTES.get(kind, BYTES_A_NUMBER[kind])
