"""Ascend chips: what each computes in, which one this machine has, and why torch_npu cannot be used if it cannot.

torch_npu is imported here and nowhere else, only once an NPU is asked for: TORCH_DEVICE_BACKEND_AUTOLOAD=0 (mmdist's
__init__) keeps `import torch` from doing it by itself, which fails where CANN is not sourced.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType

import torch

from mmdist.config import HardwareConfig, UserError

SET_ENV = "source /usr/local/Ascend/ascend-toolkit/set_env.sh"
SET_ATB_ENV = "source /usr/local/Ascend/nnal/atb/set_env.sh"
VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Chip:
    """name: hardware.chip; hardware: its yaml; soc_versions: as torch_npu numbers them; soc_name: as atc does.

    dtypes: what its fused operations compute in, the best one first. block_sizes: of the paged KV cache, the default
    first. memory_gib: of one chip, where none is there to be asked.
    """

    name: str
    title: str
    hardware: str
    soc_versions: range
    soc_name: str
    dtypes: tuple[str, ...]
    block_sizes: tuple[int, ...]
    chips_per_card: int
    memory_gib: float


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("310p", "300I DUO (310P)", "300i_duo", range(200, 206), "Ascend310P3", ("float16",), (128, 64), 2, 42.0),
        Chip(
            "910b", "800I A2 (910B)", "800i_a2", range(220, 226), "Ascend910B3", ("bfloat16", "float16"),
            (128, 256, 384, 512), 1, 60.0,
        ),
    )
}  # fmt: skip


@cache
def npu_problem() -> str | None:
    """Why no NPU can be used here, and after a semicolon what to do; None where one can."""
    try:
        npu = load_torch_npu()
    except UserError as error:
        return str(error)
    if npu.npu.device_count():
        return None
    visible = os.environ.get(VISIBLE)
    where = f"{VISIBLE}={visible}" if visible is not None else "npu-smi info lists those of the machine"
    return f"no NPU is visible ({where}); check the driver and {VISIBLE}"


@cache
def load_torch_npu() -> ModuleType:
    """torch_npu, or a UserError that says what is in its way."""
    if find_spec("torch_npu") is None:
        raise UserError(f"torch_npu is not installed; pip install torch-npu=={base_version('torch')}.*")
    check_versions()
    try:
        ctypes.CDLL("libhccl.so")  # the first of CANN's libraries that torch_npu wants; half an import is worse
    except OSError as error:
        raise UserError(f"CANN is not on the library path ({error}); {SET_ENV}") from None
    # An operation the chip lacks must not run on the host unnoticed.
    os.environ.setdefault("TORCH_NPU_FALLBACK_CPU_DISABLE", "1")
    try:
        return import_module("torch_npu")
    except Exception as error:  # ImportError, OSError, RuntimeError: whatever CANN and the driver make of it
        raise UserError(explain_import(str(error))) from error


def spare_transformers() -> None:
    """Before transformers is imported: it imports an installed torch_npu by itself, and dies where CANN is not sourced.

    There it shall not see one; npu_problem() remembers why.
    """
    if "torch_npu" in sys.modules or find_spec("torch_npu") is None:
        return
    try:
        ctypes.CDLL("libhccl.so")
    except OSError:
        npu_problem()
        sys.modules["torch_npu"] = None  # type: ignore[assignment]  # as the import system has it


def explain_import(error: str) -> str:
    """Why torch_npu could not be imported, with the cure after a semicolon."""
    libgomp = re.search(r"(\S*libgomp\S*): cannot allocate memory in static TLS block", error)
    first = " ".join(error.split("\n", 1)[0].split())
    if libgomp:
        return f"{first}; export LD_PRELOAD={libgomp[1]}:$LD_PRELOAD"
    if "Two accelerators" in error:
        return f"{first}; install the CPU build of torch {base_version('torch')}"
    if "undefined symbol" in error:
        return f"{first}; CANN and torch_npu {base_version('torch-npu')} do not fit: see torch_npu's version table"
    return f"torch_npu cannot be loaded: {first}; {SET_ENV}"


def check_versions() -> None:
    ours, theirs = base_version("torch"), base_version("torch-npu")
    if theirs and not f"{theirs}.".startswith(f"{ours}."):
        raise UserError(f"torch_npu {theirs} is not for torch {ours}; pip install torch-npu=={ours}.*")


def base_version(package: str) -> str:
    """As 2.13.0, without build or post-release; "" where the package has no metadata."""
    try:
        found = re.match(r"\d+(\.\d+)*", version(package))
    except PackageNotFoundError:
        return ""
    return found[0] if found else ""


def has_atb() -> bool:
    """True where NNAL's operations, torch.ops.atb, could be loaded."""
    load_torch_npu()
    return hasattr(torch.ops.atb, "_npu_paged_attention")


def find_chip(hardware: HardwareConfig) -> Chip:
    """hardware.chip, else the machine's own."""
    return machine_chip() if hardware.chip == "auto" else CHIPS[hardware.chip]


def machine_chip() -> Chip:
    soc = load_torch_npu()._C._npu_get_soc_version()
    for chip in CHIPS.values():
        if soc in chip.soc_versions:
            return chip
    known = ", ".join(f"{chip.title} {chip.soc_versions[0]}-{chip.soc_versions[-1]}" for chip in CHIPS.values())
    raise UserError(
        f"this chip's SoC version is {soc}, and the ones with a plan are {known}; hardware.chip= to try one"
    )


def check_machine(hardware: HardwareConfig) -> Chip:
    """find_chip(), refused where the machine has another."""
    asked, found = find_chip(hardware), machine_chip()
    if asked is not found:
        raise UserError(f"hardware.chip={asked.name}: this is a {found.title}; use hardware={found.hardware}")
    if asked.name == "310p" and hardware.kernels != "plain" and not has_atb():
        raise UserError(
            f"the {asked.title} attends by NNAL's operations, and libatb.so cannot be loaded; {SET_ATB_ENV}"
        )
    return asked


def check_dtype(dtype: str, hardware: HardwareConfig) -> None:
    """A dtype= other than auto, against the chip."""
    chip = find_chip(hardware)
    if dtype not in chip.dtypes:
        legal = ", ".join(chip.dtypes)
        raise UserError(f"dtype={dtype}: a {chip.title} computes in {legal}; use dtype={chip.dtypes[0]} or auto")


def visible_ids() -> list[int] | None:
    """The chips ASCEND_RT_VISIBLE_DEVICES names; None where it is not set."""
    text = os.environ.get(VISIBLE)
    if text is None:
        return None
    if not re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", text):
        raise UserError(f"{VISIBLE}={text}: expected chip numbers with commas between, such as 0,1")
    return [int(number) for number in text.split(",")]


def check_cards(chip: Chip, size: int, count: int) -> None:
    """hardware.pin=card: neighbouring ranks share a card, so chips come by whole cards."""
    ids, step = visible_ids() or list(range(count)), chip.chips_per_card
    if len(ids) % step:
        raise UserError(
            f"hardware.pin=card: {len(ids)} chips are visible ({VISIBLE}={','.join(map(str, ids))}), and a "
            f"{chip.title} card has {step}; make an even number visible, or use hardware.pin=auto"
        )
    split = [i for i in range(0, len(ids), step) if [n // step for n in ids[i : i + step]] != [ids[i] // step] * step]
    if split or (size > 1 and size % step):
        raise UserError(
            f"hardware.pin=card: world_size={size} over {VISIBLE}={','.join(map(str, ids))} does not take whole cards "
            f"(0,1 then 2,3 ...); choose such chips, or use hardware.pin=auto"
        )
