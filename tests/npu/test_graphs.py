"""NPUGraph as torch_npu has it, over the emulated capture: what a replay does, and what a capture refuses."""

from __future__ import annotations

import sys

from npu.jobs import PROGRAMS, Run, results, torchrun

PROGRAM = str(PROGRAMS / "graphs.py")
REFUSED = {
    "no update": "a graph waits for an event that no one has recorded",
    "an update used up": "a graph waits for an event that no one has recorded",
    "item": "aten::_local_scalar_dense on Ascend910B3: waits for the device",
    "to the host": "aten::_to_copy on Ascend910B3: copies between host and device",
    "from the host": "aten::_to_copy on Ascend910B3: copies between host and device",
    "into a buffer": "aclrtMemcpy while a stream is captured",
    "synchronize": "synchronising the device while a stream is captured",
    "stream": "synchronising a stream that is captured",
    "nonzero": "aten::nonzero on Ascend910B3: waits for the device",
    "mask": "aten::index.Tensor on Ascend910B3: waits for the device",
    "host index": "aten::index.Tensor on Ascend910B3: copies between host and device",
    "cast to the host": "aten::_to_copy on Ascend910B3: copies between host and device",
    "lost stream": "no one waits for a stream of the capture",
}


def test_one_chip(run_on_npu: Run) -> None:
    found = results(run_on_npu([sys.executable, PROGRAM], "Ascend910B3"))[0]
    refused = found.pop("refused")
    assert {name: text for name, text in refused.items() if REFUSED[name] not in text} == {}
    assert not [name for name, value in found.items() if value is False], found


def test_collectives(run_on_npu: Run) -> None:
    """A capture makes none, so ranks may capture what they like; a replay makes them anew."""
    lines = results(run_on_npu(torchrun(2, PROGRAM, "ranks"), "Ascend910B3"))
    for line in lines:
        assert line["before"] == [0.0] * 5
        assert line["sums"] == [[3, 21], [5, 35], [7, 49]]


def test_a_310p_captures_nothing(run_on_npu: Run) -> None:
    done = run_on_npu([sys.executable, PROGRAM], "Ascend310P3")
    assert done.returncode and "aclmdlRICaptureBegin: this chip captures no streams" in done.stderr, done.stderr


def test_the_task_queue(run_on_npu: Run) -> None:
    """Off it is as good as on; in its second form torch_npu captures nothing, which engine.decode_graph knows."""
    first, second = (
        run_on_npu(torchrun(2, PROGRAM, "ranks"), "Ascend910B3", TASK_QUEUE_ENABLE=queue) for queue in "02"
    )
    assert [line["sums"][-1] for line in results(first)] == [[7, 49]] * 2
    assert "Do not support TASK_QUEUE_ENABLE = 2 during NPU graph capture" in second.stderr
