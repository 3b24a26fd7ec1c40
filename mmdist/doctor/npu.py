"""What a job on an Ascend chip needs beyond the versions of torch_npu and CANN: that they load, NNAL, its dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import torch

from mmdist.ascend import (
    SET_ATB_ENV,
    Chip,
    check_cards,
    check_dtype,
    check_machine,
    has_atb,
    load_torch_npu,
    machine_chip,
    npu_problem,
)
from mmdist.config import Config, UserError
from mmdist.doctor.finding import Finding, broken
from mmdist.hccl import obsolete_variables
from mmdist.kernels.npu_plan import operations


def npu(config: Config) -> Iterator[Finding]:
    """Nothing where torch_npu is not installed."""
    if find_spec("torch_npu") is None:
        return
    if problem := npu_problem():
        yield Finding("torch_npu", *broken(problem))
        return
    try:
        chip = machine_chip()
    except UserError as error:
        yield Finding("chip", *broken(str(error)))
        return
    yield asked_chip(config, chip)
    yield nnal(chip)
    yield plan(chip)
    if lines := obsolete_variables():
        yield Finding("variables", "; ".join(lines), "note", "unset them; they change nothing")


def asked_chip(config: Config, chip: Chip) -> Finding:
    """The chip against hardware=, dtype= and hardware.pin=."""
    count = load_torch_npu().npu.device_count()
    try:
        check_machine(config.hardware)
        if config.dtype != "auto":
            check_dtype(config.dtype, config.hardware)
        if config.hardware.pin == "card":
            check_cards(chip, config.world_size if isinstance(config.world_size, int) else count, count)
    except UserError as error:
        return Finding("chip", *broken(str(error)))
    return Finding("chip", f"{count} x {chip.title}, computes in {' or '.join(chip.dtypes)}")


def nnal(chip: Chip) -> Finding:
    wanted = any(name.startswith("atb::") for name in operations(chip.name))
    if has_atb():
        return Finding("NNAL", "its operations (torch.ops.atb) are there")
    state = "broken" if wanted else "ok"
    value = f"libatb.so cannot be loaded; a {chip.title} {'attends by it' if wanted else 'does without'}"
    return Finding("NNAL", value, state, SET_ATB_ENV if wanted else "")


def plan(chip: Chip) -> Finding:
    """Whether torch_npu has each operation that mmdist calls on this chip."""
    wanted = operations(chip.name)
    missing = sorted(name for name in wanted if not is_there(name))
    if missing:
        cure = (
            "pip install the torch_npu of torch's version, with its CANN and NNAL; hardware.kernels=plain does without"
        )
        return Finding("operations", f"missing: {', '.join(missing)}", "broken", cure)
    return Finding("operations", f"all {len(wanted)} of the plan (task=plan lists them)")


def is_there(name: str) -> bool:
    space, _, operation = name.partition("::")
    return hasattr(getattr(torch.ops, space), operation)
