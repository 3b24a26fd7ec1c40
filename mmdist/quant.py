"""Weight formats: how a quantised weight is stored, cut and read; knows no layer and no rank.

A quantised weight (rows, columns) is (q - offset) * scale: q int8, scale and offset one a row, or one a row and group
of columns. Formulas: msmodelslim's int_quantization.py (symmetric min-max, data-free).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from mmdist.config import UserError
from mmdist.plan import Piece, Shard

MAX_INT = {4: 7, 8: 127}
FOLLOWS = ("*.weight_shape",)  # tensors of a format that say nothing its others do not
INT32_BITS = 32


@dataclass(frozen=True)
class Scheme:
    """bits of a weight; group_size: columns that share a scale, 0 for whole rows."""

    bits: int
    group_size: int = 0

    @property
    def name(self) -> str:
        return f"w{self.bits}a16"

    def num_bytes(self, rows: int, columns: int) -> int:
        """Of a weight in memory: integers, and scales in float32."""
        return rows * (columns * self.bits // 8 + 4 * self.num_groups(columns))

    def num_groups(self, columns: int) -> int:
        if not self.group_size:
            return 1
        if columns % self.group_size:
            raise UserError(f"group_size={self.group_size} does not divide a weight of {columns} columns")
        return columns // self.group_size


@dataclass
class Quantized:
    """q int8 (rows, columns), scale float (rows, groups); offset like scale, None where it is zero."""

    bits: int
    q: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None = None

    def dequantize(self) -> torch.Tensor:
        """float32 (rows, columns)"""
        grouped = self.q.float().unflatten(1, (self.scale.shape[1], -1))
        if self.offset is not None:
            grouped = grouped - self.offset[..., None]
        return (grouped * self.scale[..., None]).flatten(1)


def find_scale(amax: torch.Tensor, bits: int) -> torch.Tensor:
    """Largest magnitude of each group (or row), float32 -> scale."""
    return (amax / MAX_INT[bits]).clamp(min=torch.finfo(torch.float32).eps)


def find_amax(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """(rows, columns) -> largest magnitudes (rows, groups), float32."""
    return weight.float().unflatten(1, (scheme.num_groups(weight.shape[1]), -1)).abs().amax(-1)


def quantize(
    weight: torch.Tensor,
    scheme: Scheme,
    amax: torch.Tensor | None = None,
    *,
    scale_dtype: torch.dtype = torch.float32,
) -> Quantized:
    """(rows, columns) -> symmetric integers. amax: find_amax's of the whole rows, where the weight is part of them.

    scale_dtype: what the scale will be stored in; the integers are those of the rounded scale.
    """
    amax = find_amax(weight, scheme) if amax is None else amax
    grouped = weight.float().unflatten(1, (amax.shape[1], -1))
    scale = find_scale(amax, scheme.bits).to(scale_dtype)
    q = (grouped / scale[..., None].float()).round_().clamp_(-MAX_INT[scheme.bits] - 1, MAX_INT[scheme.bits])
    return Quantized(scheme.bits, q.to(torch.int8).flatten(1), scale)


@dataclass(frozen=True)
class Spec:
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class WeightFormat(ABC):
    """How a checkpoint stores the quantised weight of one linear layer: its tensors, by their names' last word."""

    scheme: Scheme
    names: ClassVar[tuple[str, ...]]  # of what it stores instead of a weight

    @abstractmethod
    def specs(self, rows: int, columns: int) -> dict[str, Spec]:
        """What a layer holds instead of a weight (rows, columns)."""

    @abstractmethod
    def shards(self, dim: int, pieces: Sequence[Piece]) -> dict[str, Shard]:
        """How the tensors are cut where the weight is cut along dim."""

    @abstractmethod
    def read(self, tensors: Mapping[str, torch.Tensor]) -> Quantized: ...

    @abstractmethod
    def write(self, weight: Quantized) -> dict[str, torch.Tensor]: ...

    def weight_shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """(rows, columns) of the weight, from the shapes of what is stored."""
        return shapes["weight"]

    def following(self, name: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """What FOLLOWS beside a stored tensor: none."""
        return {}

    def scale_shards(self, names: Sequence[str], dim: int, pieces: Sequence[Piece]) -> dict[str, Shard]:
        """Of tensors (rows, groups): like the rows; along the columns only where there are groups of them."""
        if dim == 0:
            return {name: Shard(0, tuple(pieces)) for name in names}
        if not self.scheme.group_size:
            return {}
        groups = tuple(replace(piece, size=self.scheme.num_groups(piece.size)) for piece in pieces)
        return {name: Shard(1, groups) for name in names}


@dataclass(frozen=True)
class Ascend(WeightFormat):
    """msmodelslim's: weight int8, weight_scale and weight_offset float32 (rows, groups).

    packed: 4-bit values lie two in a byte, the first in its low half, as AscendV1 (version 1.0.0) has them; older
    files have a byte for each. Source: msmodelslim's complex_quantifier.py, _w4a16_pack_int4.
    """

    packed: bool = True
    names = ("weight", "weight_scale", "weight_offset")

    @property
    def paired_dim(self) -> int | None:
        """Along which two neighbours share a byte: the rows where columns are in groups, else the columns."""
        if self.scheme.bits != 4 or not self.packed:
            return None
        return 0 if self.scheme.group_size else 1

    def stored_shape(self, rows: int, columns: int) -> tuple[int, int]:
        if self.paired_dim is not None and (rows, columns)[self.paired_dim] % 2:
            raise UserError(f"a part of {rows} rows and {columns} columns cannot have two 4-bit values a byte")
        return rows // 2 if self.paired_dim == 0 else rows, columns // 2 if self.paired_dim == 1 else columns

    def specs(self, rows: int, columns: int) -> dict[str, Spec]:
        scale = Spec((rows, self.scheme.num_groups(columns)), torch.float32)
        weight = Spec(self.stored_shape(rows, columns), torch.int8)
        return {"weight": weight, "weight_scale": scale, "weight_offset": scale}

    def shards(self, dim: int, pieces: Sequence[Piece]) -> dict[str, Shard]:
        stored = tuple(pieces)
        if dim == self.paired_dim:
            stored = tuple(replace(piece, size=piece.size // 2, padded=piece.padded // 2) for piece in pieces)
        return {"weight": Shard(dim, stored), **self.scale_shards(("weight_scale", "weight_offset"), dim, pieces)}

    def weight_shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        rows, columns = shapes["weight"]
        return rows * (2 if self.paired_dim == 0 else 1), columns * (2 if self.paired_dim == 1 else 1)

    def read(self, tensors: Mapping[str, torch.Tensor]) -> Quantized:
        q, offset, dim = tensors["weight"], tensors["weight_offset"], self.paired_dim
        if dim is not None:
            low = (q << 4) >> 4  # the shifts carry the sign
            q = torch.stack((low, q >> 4), dim + 1).flatten(dim, dim + 1)
        return Quantized(self.scheme.bits, q, tensors["weight_scale"], offset if offset.any() else None)

    def write(self, weight: Quantized) -> dict[str, torch.Tensor]:
        q, dim = weight.q, self.paired_dim
        if dim is not None:
            low, high = q.unflatten(dim, (-1, 2)).unbind(dim + 1)
            q = (low & 15) | (high << 4)
        offset = torch.zeros_like(weight.scale) if weight.offset is None else weight.offset
        return {"weight": q, "weight_scale": weight.scale, "weight_offset": offset}


class Compressed(WeightFormat):
    """compressed-tensors' pack-quantized: weight_packed int32 (rows, columns / values a word), the lowest bits first,
    each value with half its range added; weight_scale (rows, groups); weight_shape int64 (2,), which follows from
    the others as long as rows fill whole words."""

    names = ("weight_packed", "weight_scale")

    @property
    def values_per_word(self) -> int:
        return INT32_BITS // self.scheme.bits

    def specs(self, rows: int, columns: int) -> dict[str, Spec]:
        if columns % self.values_per_word:
            raise UserError(f"{columns} columns of {self.scheme.bits} bits do not fill 32-bit words")
        return {
            "weight_packed": Spec((rows, columns // self.values_per_word), torch.int32),
            "weight_scale": Spec((rows, self.scheme.num_groups(columns)), torch.float32),
        }

    def shards(self, dim: int, pieces: Sequence[Piece]) -> dict[str, Shard]:
        packed = tuple(pieces)
        if dim == 1:
            packed = tuple(replace(piece, size=piece.size // self.values_per_word) for piece in pieces)
        return {"weight_packed": Shard(dim, packed), **self.scale_shards(("weight_scale",), dim, pieces)}

    def weight_shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        rows, words = shapes["weight_packed"]
        return rows, words * self.values_per_word

    def following(self, name: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        if not name.endswith(".weight_packed"):
            return {}
        return {"weight_shape": torch.tensor(self.weight_shape({"weight_packed": shape}))}

    def read(self, tensors: Mapping[str, torch.Tensor]) -> Quantized:
        bits, half = self.scheme.bits, 1 << (self.scheme.bits - 1)
        shifts = torch.arange(0, INT32_BITS, bits, dtype=torch.int32, device=tensors["weight_packed"].device)
        values = (tensors["weight_packed"][..., None] >> shifts) & (2 * half - 1)
        return Quantized(bits, (values - half).to(torch.int8).flatten(1), tensors["weight_scale"].float())

    def write(self, weight: Quantized) -> dict[str, torch.Tensor]:
        half = 1 << (self.scheme.bits - 1)
        values = (weight.q ^ -half).view(torch.uint8) & (2 * half - 1)  # q + half, in the bits it has
        if self.scheme.bits == 4:
            low, high = values.unflatten(1, (-1, 2)).unbind(-1)
            values = low | (high << 4)
        packed = values.contiguous().view(torch.int32)  # the lowest byte first, as safetensors has it
        return {"weight_packed": packed, "weight_scale": weight.scale, "weight_shape": torch.tensor(weight.q.shape)}


FORMATS: dict[str, type[WeightFormat]] = {"ascend": Ascend, "compressed-tensors": Compressed}
