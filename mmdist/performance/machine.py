"""What a figure was measured on, and with what."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mmdist.backend import GIB, accelerator

CPUINFO = Path("/proc/cpuinfo")


def describe_machine(device: torch.device) -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": memory / GIB,
        "accelerators": [] if device.type == "cpu" else card_names(device),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "mmdist")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def card_names(device: torch.device) -> list[str]:
    cards = accelerator(device)
    return [cards.get_device_name(i) for i in range(cards.device_count())]


def cpu_name() -> str:
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
