"""What a job would compute with: devices, ranks, kernels, collectives."""

from __future__ import annotations

import os
import platform
import shutil

import torch

from mmdist.backend import GIB, count_devices, threads_per_rank
from mmdist.collectives.shm import NoShm, probe_shm
from mmdist.config import HardwareConfig, UserError
from mmdist.cores import count_cores
from mmdist.doctor.finding import Finding, broken
from mmdist.native.build import BuildError, cache_folder, find_toolchain, open_level

FREE_DISK = GIB // 4  # a few libraries, with room
VISIBLE = ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "ASCEND_VISIBLE_DEVICES")


def describe_device(device: str) -> str:
    """Each accelerator with its memory."""
    if device == "cpu":
        return f"cpu ({platform.machine()})"
    cards = []
    for index in range(count_devices(device)):
        free, total = torch.accelerator.get_memory_info(index)
        name = torch.get_device_module(device).get_device_name(index)
        cards.append(f"{name}, {total / GIB:.1f} GiB, {free / GIB:.1f} free")
    return f"{device}: {'; '.join(cards)}"


def visible_devices(device: str, size: int) -> Finding:
    """The variables that hide accelerators from a job, and whether they leave enough."""
    found = {name: os.environ[name] for name in VISIBLE if name in os.environ}
    value = " ".join(f"{name}={text!r}" for name, text in found.items()) or "no variable hides any"
    twice = [name for name, text in found.items() if len(set(text.split(","))) < len(text.split(","))]
    if twice:
        return Finding("visible", f"{value}: a device is named twice", "broken", f"export {twice[0]}=0,1")
    if device == "cpu":
        return Finding("visible", value)
    count, name = count_devices(device), VISIBLE[0] if device == "cuda" else VISIBLE[1]
    if size > count:
        some = ",".join(map(str, range(size)))
        hidden = f"export {name}={some}, or world_size={count}"
        return Finding("visible", f"{count} devices for {size} ranks ({value})", "broken", hidden)
    return Finding("visible", f"{count} devices; {value}")


def ranks(hardware: HardwareConfig, device: str, size: int) -> Finding:
    threads = threads_per_rank(hardware, size)
    if device == "cpu" and size > count_cores():
        cure = f"world_size={count_cores()} or fewer, where the memory allows it"
        return Finding("ranks", f"{size} on {count_cores()} cores: they take turns", "note", cure)
    pinned = ", each on its own cores" if device == "cpu" and size > 1 and hardware.pin == "auto" else ""
    return Finding("ranks", f"{size} x {threads} threads{pinned}")


def kernels(hardware: HardwareConfig) -> Finding:
    """Compiles them, if no one has yet."""
    if hardware.kernels == "plain":
        return Finding("kernels", "plain torch, as asked")
    try:
        native = open_level(hardware.kernels)
    except (BuildError, UserError) as error:
        value, state, cure = broken(str(error))
        return Finding("kernels", f"plain torch: {value}", "note" if hardware.kernels == "auto" else state, cure)
    return Finding("kernels", f"{native.level}, {native.path} ({find_toolchain(hardware.kernels).version})")


def cache() -> Finding:
    try:
        folder = cache_folder()
    except (BuildError, OSError) as error:
        return Finding("cache", *broken(str(error)))
    free = shutil.disk_usage(folder).free
    value = f"{folder}, {free / GIB:.1f} GiB free"
    return Finding("cache", value) if free >= FREE_DISK else Finding("cache", value, "broken", f"make room on {folder}")


def collectives(hardware: HardwareConfig, device: str) -> Finding:
    if device != "cpu":
        return Finding("collectives", "hccl" if device == "npu" else "nccl")
    if hardware.collectives == "gloo":
        return Finding("collectives", "gloo, as asked")
    try:
        probe_shm(open_level("auto" if hardware.kernels == "plain" else hardware.kernels))
    except (BuildError, UserError, NoShm, OSError) as error:
        value, state, cure = broken(str(error))
        slow = f"gloo, a millisecond each instead of microseconds: {value}"
        return Finding("collectives", slow, "note" if hardware.collectives == "auto" else state, cure)
    return Finding("collectives", "shm (gloo between machines)")
