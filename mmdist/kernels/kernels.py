"""The hot operations behind one interface. In plain torch they run everywhere and are the reference for the others."""

from __future__ import annotations

import torch

from mmdist.kernels import packed
from mmdist.kernels.linear import Linear, PackedLinear, quantized_linear
from mmdist.quant import Quantized


class Kernels:
    """Those of plain torch; a device family's own override what they do better."""

    level = "plain"

    def __init__(self, device: torch.device):
        self.device = device

    def linear(self, weight: torch.Tensor) -> Linear | None:
        """A weight (out, in) made ready, which then holds its own copy; None where it is best as it is."""
        return PackedLinear(weight) if packed.can_pack(weight) else None

    def quantized_linear(self, weight: Quantized) -> Linear:
        return quantized_linear(weight)
