"""The few things that accelerators and the CPU do differently: device, collectives, threads, memory."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mmdist.ascend import (
    VISIBLE,
    Chip,
    base_version,
    check_cards,
    check_machine,
    find_chip,
    load_torch_npu,
    npu_problem,
)
from mmdist.config import HardwareConfig, UserError
from mmdist.cores import count_cores, pin
from mmdist.hccl import check_ports, obsolete_variables

GIB = 2**30
RESET, RESET_PEAK = Path("/proc/self/clear_refs"), "5"  # linux, proc(5)
log = logging.getLogger("mmdist.backend")


@dataclass(frozen=True)
class Backend:
    device: torch.device
    collectives: str  # shm, auto, or torch.distributed's backend string; messages between ranks of cards go over gloo
    chip: Chip | None = None  # of an NPU


def find_device(hardware: HardwareConfig) -> str:
    """auto -> cuda where torch sees a CUDA device, else npu where torch_npu sees one, else cpu."""
    available = torch.cuda.is_available()
    if hardware.device == "cuda" and not available:
        raise UserError(
            f"hardware.device=cuda: torch {torch.__version__} sees no CUDA device; use hardware=cpu, or install a CUDA "
            "build of torch and check CUDA_VISIBLE_DEVICES"
        )
    if hardware.device == "npu" and (problem := npu_problem()):
        raise UserError(f"hardware.device=npu: {problem}")
    if hardware.device == "auto":
        return "cuda" if available else "npu" if is_npu_there() else "cpu"
    return hardware.device


def is_npu_there() -> bool:
    """What hardware=auto goes by; a torch_npu that cannot be used is said so, once."""
    if not base_version("torch-npu"):
        return False
    problem = npu_problem()
    if problem:
        warn_once(problem)
    return problem is None


@cache
def warn_once(problem: str) -> None:
    log.warning("torch_npu is installed, but the job runs on the CPU: %s", problem)


def planned_device(hardware: HardwareConfig) -> str:
    """find_device(), but a plan for a named chip needs no such chip."""
    return "npu" if hardware.device == "npu" and hardware.chip != "auto" else find_device(hardware)


def count_devices(device: str) -> int:
    """Visible accelerators; a CPU with two or more cores counts as 2, so that the default job is a parallel one, and
    so does a machine without the NPU that is planned for."""
    if device == "npu":
        return load_torch_npu().npu.device_count() if npu_problem() is None else 2
    return torch.cuda.device_count() if device == "cuda" else min(2, count_cores())


def check_visible(hardware: HardwareConfig, device: str, size: int) -> None:
    """Refuse more ranks than accelerators, and hardware.pin=card where chips do not come by whole cards."""
    count = count_devices(device)
    if device != "cpu" and size > count:
        variable = VISIBLE if device == "npu" else "CUDA_VISIBLE_DEVICES"
        found = f"{count} {device} devices are visible ({variable}={os.environ.get(variable, 'not set')})"
        raise UserError(f"world_size={size}: {found}; lower world_size to {count} or make more visible")
    if hardware.pin == "card":
        if device != "npu":
            raise UserError(f"hardware.pin=card is for NPUs of several chips a card, and the job runs on {device}")
        check_cards(find_chip(hardware), size, count)


def threads_per_rank(hardware: HardwareConfig, local_size: int) -> int:
    """hardware.threads_per_rank, else OMP_NUM_THREADS, else the rank's share of the cores."""
    if hardware.threads_per_rank is not None:
        return hardware.threads_per_rank
    user_set, share = os.environ.get("OMP_NUM_THREADS", ""), max(1, count_cores() // local_size)
    if user_set == "1" and share > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        log.info(
            "OMP_NUM_THREADS=1 (torchrun's default) is kept; hardware.threads_per_rank=%d would use all cores", share
        )
    return int(user_set) if user_set.isdigit() else share


def init_backend(hardware: HardwareConfig, *, local_rank: int, local_size: int) -> Backend:
    """Take this rank's device and its share of the CPU's cores and threads."""
    device = find_device(hardware)
    torch.set_num_threads(threads_per_rank(hardware, local_size))
    if device == "cpu":
        if hardware.pin == "auto":
            pin(local_rank, local_size)
        return Backend(torch.device("cpu"), hardware.collectives)
    check_visible(hardware, device, local_size)
    if device == "npu":
        return init_npu(hardware, local_rank)
    torch.cuda.set_device(local_rank)
    return Backend(torch.device(device, local_rank), "cpu:gloo,cuda:nccl")


def init_npu(hardware: HardwareConfig, local_rank: int) -> Backend:
    chip, npu = check_machine(hardware), load_torch_npu().npu
    if local_rank == 0:
        check_ports()
        for line in obsolete_variables():
            log.warning(line)
    npu.set_device(local_rank)
    npu.set_compile_mode(jit_compile=False)  # a 310P would compile every operation anew for each shape
    return Backend(torch.device("npu", local_rank), "cpu:gloo,npu:hccl", chip)


def accelerator(device: torch.device) -> Any:
    """torch.cuda, or torch.npu, which torch_npu gives the same functions."""
    return getattr(torch, device.type)


def synchronize(device: torch.device) -> None:
    """Wait for what the device has been given to do."""
    if device.type != "cpu":
        accelerator(device).synchronize(device)


def reset_peak_memory(device: torch.device) -> bool:
    """Begin a new peak_memory(); False where there is none (a CPU without Linux's /proc, or with a closed one)."""
    if device.type != "cpu":
        accelerator(device).reset_peak_memory_stats(device)
        return True
    try:
        RESET.write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def peak_memory(device: torch.device) -> int:
    """Most bytes of the device that this process held since reset_peak_memory(); on a CPU (Linux) its resident set."""
    if device.type != "cpu":
        return accelerator(device).max_memory_allocated(device)
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(words[1]) * 1024 for words in lines if words[0] == "VmHWM:")


def memory_per_rank(hardware: HardwareConfig, device: str, world_size: int) -> int:
    """Bytes one rank may use: an accelerator's memory, or its share of the host's, times memory_utilization."""
    if hardware.memory_gib is not None:
        total = int(hardware.memory_gib * GIB)
    elif device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
    elif device == "npu":
        here = npu_problem() is None
        total = load_torch_npu().npu.mem_get_info()[1] if here else int(find_chip(hardware).memory_gib * GIB)
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(total * hardware.memory_utilization) // (world_size if device == "cpu" else 1)
