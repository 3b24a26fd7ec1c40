"""The part of a vision encoder that may be computed by an exported graph instead of by torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import nn


class Tower(nn.Module, ABC):
    """A function of tensors alone, the first of them pixels; its result has the dtype and device of these.

    input_names: as the graph has them, in forward's order. max_batch: the most pictures (or tiles) in one pass.
    """

    input_names: ClassVar[tuple[str, ...]] = ("input",)
    max_batch: ClassVar[int | None] = None

    @abstractmethod
    def example_inputs(self, batch: int) -> tuple[torch.Tensor, ...]:
        """forward's arguments for `batch` pictures of noise; the same at each call, numbers in float32."""


def noise(*shape: int) -> torch.Tensor:
    """Normal numbers, as pixels are once they are normalised."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
