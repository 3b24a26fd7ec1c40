"""torch_npu's operations without torch_npu: its schemas, defined through torch.library, over the reference kernels.

The dispatcher binds each call to the schema as it would on a chip: an unknown keyword or a wrong type is refused. For
shapes alone (FakeTensorMode) each operation also says what it returns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from npu.chip import Chip
from npu.dump_schemas import SCHEMAS
from npu.reference_ops import reference_ops

SOC = {"310p": "Ascend310P3", "910b": "Ascend910B3"}


class Called:
    """Which chip the operations stand for now, and which of them were called since."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.kernels: dict[str, Any] = {}

    def run(self, name: str, *args: Any, **kwargs: Any) -> Any:
        self.names.add(name)
        return self.kernels[name](*args, **kwargs)


CALLED = Called()


@contextmanager
def operations_of(chip: str, **options: Any) -> Iterator[set[str]]:
    """The reference kernels of a chip behind torch.ops; gives the names of what is called. options: of npu.Chip."""
    define()
    CALLED.names, CALLED.kernels = set(), reference_ops(Chip(SOC[chip], **options))
    yield CALLED.names


@cache
def define() -> list[torch.library.Library]:
    """All schemas, once a process."""
    libraries = {space: torch.library.Library(space, "DEF") for space in ("npu", "atb")}
    for name, schema in json.loads(SCHEMAS.read_text())["schemas"].items():
        space, _, operation = name.partition("::")
        libraries[space].define(schema.partition("::")[2])
        libraries[space].impl(operation, lambda *args, _name=name, **kwargs: CALLED.run(_name, *args, **kwargs), "CPU")
        torch.library.register_fake(name, FAKES.get(name, nothing), lib=libraries[space])
    return list(libraries.values())


def nothing(*args: Any, **kwargs: Any) -> None:
    """Of what writes into its arguments."""


def like(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.empty_like(x)


FAKES: dict[str, Any] = {
    "npu::npu_rms_norm": lambda x, gamma, epsilon=1e-6: (like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)),
    "npu::npu_add_rms_norm": lambda x1, x2, gamma, epsilon=1e-6: (
        like(x1),
        x1.new_empty(*x1.shape[:-1], 1, dtype=torch.float32),
        like(x1),
    ),
    "npu::npu_apply_rotary_pos_emb": lambda query, key, *args, **kwargs: (like(query), like(key)),
    "npu::npu_swiglu": lambda x, dim=-1: x.new_empty(*x.shape[:-1], x.shape[-1] // 2),
    "npu::npu_format_cast": like,
    "npu::npu_prompt_flash_attention": like,
    "npu::npu_fused_infer_attention_score": lambda query, *args, **kwargs: (like(query), query.new_empty(1)),
    "npu::npu_convert_weight_to_int4pack": lambda w, inner_k_tiles=0: w.new_empty(w.shape[0], w.shape[1] // 8),
    "npu::npu_weight_quant_batchmatmul": lambda x, weight, scale, *args, **kwargs: x.new_empty(
        x.shape[0], scale.shape[-1]
    ),
    "npu::npu_mm_all_reduce_base": lambda x1, x2, hcom, **kwargs: x1.new_empty(x1.shape[0], x2.shape[1]),
}
