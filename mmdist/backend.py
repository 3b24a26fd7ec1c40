"""The few things that accelerators and the CPU do differently: device, collectives, threads, memory."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch

from mmdist.config import HardwareConfig, UserError
from mmdist.cores import count_cores, pin

GIB = 2**30
log = logging.getLogger("mmdist.backend")


@dataclass(frozen=True)
class Backend:
    device: torch.device
    collectives: str  # shm, auto, or torch.distributed's backend string; messages between ranks of cards go over gloo


def find_device(hardware: HardwareConfig) -> str:
    """auto -> cuda where torch sees a CUDA device, else cpu."""
    available = torch.cuda.is_available()
    if hardware.device == "cuda" and not available:
        raise UserError(
            f"hardware.device=cuda: torch {torch.__version__} sees no CUDA device; use hardware=cpu, or install a CUDA "
            "build of torch and check CUDA_VISIBLE_DEVICES"
        )
    if hardware.device == "auto":
        return "cuda" if available else "cpu"
    return hardware.device


def count_devices(device: str) -> int:
    """Visible accelerators; a CPU with two or more cores counts as 2, so that the default job is a parallel one."""
    return torch.cuda.device_count() if device == "cuda" else min(2, count_cores())


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
    visible = torch.cuda.device_count()
    if local_rank >= visible:
        raise UserError(f"world_size: local rank {local_rank} has no device, {visible} visible; lower world_size")
    torch.cuda.set_device(local_rank)
    return Backend(torch.device(device, local_rank), "cpu:gloo,cuda:nccl")


def memory_per_rank(hardware: HardwareConfig, device: str, world_size: int) -> int:
    """Bytes one rank may use: an accelerator's memory, or its share of the host's, times memory_utilization."""
    if hardware.memory_gib is not None:
        total = int(hardware.memory_gib * GIB)
    elif device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(total * hardware.memory_utilization) // (world_size if device == "cpu" else 1)
