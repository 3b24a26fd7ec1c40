"""Versions that are installed, and whether torch is a build for the accelerators that are plugged in."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from mmdist.doctor.finding import Finding

SHOWN = ("torch", "transformers")


def python() -> Finding:
    return Finding("python", f"{platform.python_version()} ({sys.executable})")


def required_packages() -> list[str]:
    try:
        return [name for name in requires("mmdist") or [] if "extra ==" not in name]
    except PackageNotFoundError:  # a checkout that was not installed says nothing of what it needs
        return list(SHOWN)


def packages(required: list[str]) -> Finding:
    shown, wrong = [], []
    for requirement in map(Requirement, required):
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = "missing"
        if found == "missing" or not requirement.specifier.contains(found, prereleases=True):
            wrong.append(str(requirement))
        if requirement.name in SHOWN or str(requirement) in wrong:
            shown.append(f"{requirement.name} {found}")
    cure = f"pip install {' '.join(repr(name) for name in wrong)}" if wrong else ""
    return Finding("packages", ", ".join(shown), "broken" if wrong else "ok", cure)


def cuda_build(device_files: Path = Path("/dev")) -> Finding | None:
    """NVIDIA's cards, and whether torch can use them; None where there are none."""
    cards = sorted(path.name for path in device_files.glob("nvidia[0-9]*"))
    if not cards:
        return None
    if torch.version.cuda is None:
        cure = f"pip install torch=={torch.__version__.partition('+')[0]}, a build without +cpu"
        return Finding("cuda", f"{len(cards)} NVIDIA cards, but torch {torch.__version__} has no CUDA", "note", cure)
    if not torch.cuda.is_available():
        value = f"{len(cards)} NVIDIA cards, but torch, built for CUDA {torch.version.cuda}, cannot use them"
        return Finding(
            "cuda", value, "broken", "nvidia-smi says which CUDA the driver can; update it or CUDA_VISIBLE_DEVICES"
        )
    return Finding("cuda", f"CUDA {torch.version.cuda}, {len(cards)} cards plugged in")
