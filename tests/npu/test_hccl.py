"""The real ProcessGroupHCCL between ranks of torchrun over the emulated HCCL, and what that refuses on each chip."""

from __future__ import annotations

import sys

import pytest
from npu.jobs import PROGRAMS, Run, free_ports, results, torchrun

PROGRAM = str(PROGRAMS / "collectives.py")


@pytest.mark.parametrize(("soc", "size"), [("Ascend310P3", 2), ("Ascend910B3", 2), ("Ascend910B3", 8)])
def test_collectives(run_on_npu: Run, soc: str, size: int) -> None:
    lines = results(run_on_npu(torchrun(size, PROGRAM, "ranks"), soc))
    total = size * (size + 1) / 2
    assert [line["rank"] for line in lines] == list(range(size))
    for line in lines:
        assert line["group"] == "ProcessGroupHCCL"
        assert line["fp16"] == line["fp32"] == line["large"] == [total]
        assert line["int32"] == [size]
        assert line["all_gather"] == line["large all_gather"] == line["objects"] == list(range(size))
        assert line["reduce_scatter"] == line["large reduce_scatter"] == [size * line["rank"]]
        assert line["broadcast"] == line["large broadcast"] == [size - 1]
        if soc == "Ascend910B3":
            assert line["int64"] == line["bf16"] == [total] and line["fused"]


REFUSED = {
    "Ascend310P3": {
        "int64": "HcclAllReduce on Ascend310P3: int64 is not supported",
        "bf16": "HcclAllReduce on Ascend310P3: bfp16 is not supported",
        "bf16 gather": "HcclBroadcast on Ascend310P3: bfp16 is not supported",
        "int16 max": "HcclAllReduce on Ascend310P3: max of int16 is not supported",
        "counts": "ranks differ",
        "fused": "npu_mm_all_reduce_base on Ascend310P3: the chip has no such operation",
    },
    "Ascend910B3": {
        "bf16 product": "HcclAllReduce on Ascend910B3: prod of bfp16 is not supported",
        "lonely": "timed out after 3 s, 1 ranks missing",
    },
}


def test_refused_collectives(run_on_npu: Run, soc: str) -> None:
    """One after the other in one job: without the task queue, a refusal is an error of its own call alone."""
    names = list(REFUSED[soc])
    done = run_on_npu(torchrun(2, PROGRAM, *names), soc, TASK_QUEUE_ENABLE="0", HCCL_EXEC_TIMEOUT="3")
    refused = results(done)[0]["refused"]
    assert {name: refused[name] for name in names if REFUSED[soc][name] not in refused[name]} == {}


def test_a_port_in_use_is_named(run_on_npu: Run) -> None:
    """Two jobs with the same HCCL_IF_BASE_PORT."""
    first = free_ports()
    holder = f"import socket, subprocess, sys; s = socket.socket(); s.bind(('', {first + 1})); s.listen(); "
    command = [sys.executable, "-c", holder + f"subprocess.run({torchrun(2, PROGRAM, 'counts')!r})"]
    done = run_on_npu(
        command, "Ascend310P3", TASK_QUEUE_ENABLE="0", HCCL_IF_BASE_PORT=str(first), HCCL_CONNECT_TIMEOUT="3"
    )
    assert f"EJ0003: failed to bind port {first + 1}" in done.stdout + done.stderr
