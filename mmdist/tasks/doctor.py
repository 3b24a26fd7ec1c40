"""task=doctor: what this machine has, what a job would use of it, and what is in its way, each with its cure.

Exit code 1 where something keeps jobs from running; what only costs speed or memory is a note.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict

from mmdist.backend import count_devices, find_device
from mmdist.config import EXIT_FAILED, UserError
from mmdist.doctor import compute, machine, packages
from mmdist.doctor.ascend import ascend
from mmdist.doctor.exchange import exchange
from mmdist.doctor.finding import Finding, broken
from mmdist.doctor.npu import npu
from mmdist.task_config import DoctorConfig

ON_RANKS = False


def check(config: DoctorConfig) -> None:
    pass


def run(config: DoctorConfig) -> int:
    logging.getLogger("mmdist").setLevel(logging.WARNING)  # what the checks find is all there is to say
    findings = list(examine(config))
    ok = all(finding.state != "broken" for finding in findings)
    if config.format == "json":
        print(json.dumps({"ok": ok, "findings": [asdict(finding) for finding in findings]}))
    else:
        print("\n".join(line(finding) for finding in findings))
    return 0 if ok else EXIT_FAILED


def line(finding: Finding) -> str:
    mark = "" if finding.state == "ok" else f"{finding.state.upper()}: "
    cure = f"\n{'':13}-> {finding.cure}" if finding.cure else ""
    return f"{finding.name:12} {mark}{finding.value}{cure}"


def examine(config: DoctorConfig) -> Iterator[Finding]:
    yield packages.python()
    yield packages.packages(packages.required_packages())
    yield from (found for found in (packages.cuda_build(), ascend()) if found is not None)
    yield from npu(config)
    device = "cpu"
    try:
        device = find_device(config.hardware)
        yield Finding("device", compute.describe_device(device))
    except UserError as error:
        yield Finding("device", *broken(str(error)))
    yield from examine_machine(config, device)
    size = config.world_size if isinstance(config.world_size, int) else max(1, count_devices(device))
    yield from examine_ranks(config, device, size)


def examine_machine(config: DoctorConfig, device: str) -> Iterator[Finding]:
    yield machine.cores()
    yield machine.memory(config.hardware)
    yield machine.shared_memory(device)
    yield machine.limits(device)
    yield machine.ports(config.launcher)


def examine_ranks(config: DoctorConfig, device: str, size: int) -> Iterator[Finding]:
    hardware = config.hardware
    seen = compute.visible_devices(device, size)
    yield seen
    yield compute.ranks(hardware, device, size)
    yield from (compute.kernels(hardware), compute.cache()) if device == "cpu" else ()
    possible = compute.collectives(hardware, device)
    yield possible
    if "broken" not in (seen.state, possible.state):
        yield exchange(hardware, config.launcher, device, size)
