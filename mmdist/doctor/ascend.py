"""Ascend: whether torch, torch_npu and CANN are there together and fit."""

from __future__ import annotations

import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mmdist.doctor.finding import Finding

DEFAULT_TOOLKIT = Path("/usr/local/Ascend/ascend-toolkit/latest")


def ascend(device_files: Path = Path("/dev")) -> Finding | None:
    """None on a machine without Ascend devices and without torch_npu."""
    devices = len(list(device_files.glob("davinci[0-9]*")))
    adapter = find_version("torch_npu")
    if not devices and adapter is None:
        return None
    toolkit = find_cann(Path(os.environ.get("ASCEND_TOOLKIT_HOME") or DEFAULT_TOOLKIT))
    value = f"{devices} devices, torch_npu {adapter or 'missing'}, CANN {toolkit or 'missing'}"
    cure = find_cure(torch.__version__, adapter, toolkit)
    return Finding("ascend", value, "broken" if cure else "ok", cure)


def find_cure(torch_version: str, adapter: str | None, toolkit: str | None) -> str:
    """torch_npu has torch's own number (2.13.0 and 2.13.0.post1 go with torch 2.13.0)."""
    wanted = torch_version.partition("+")[0]
    if adapter is None or not f"{adapter}.".startswith(f"{wanted}."):
        return f"pip install 'torch-npu=={wanted}.*'"
    if toolkit is None:
        return f"source {DEFAULT_TOOLKIT.parent}/set_env.sh (install the CANN toolkit if there is no such file)"
    return ""


def find_cann(toolkit: Path) -> str | None:
    """The version that CANN's installer left in the toolkit's folder, or in one of its parts, as torch_npu has it."""
    for path in (path for part in ("toolkit", "*") for path in sorted(toolkit.glob(f"*/ascend_{part}_install.info"))):
        found = re.search(r"^version=(\S+)", path.read_text(), re.MULTILINE)
        if found:
            return found[1]
    return None


def find_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
