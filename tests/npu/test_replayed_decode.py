"""Decoding by captured graphs on an emulated 910B: the tokens of decoding operation by operation, while batches grow
and shrink and sequences are preempted. (test_families.py has every family by graphs against the CPU.)"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from npu.jobs import PROGRAMS, Run, results, torchrun
from test_shapes import SHAPES, write_questions

PROGRAM = str(PROGRAMS / "decode.py")
SOC = "Ascend910B3"
PADDED = {1: 1, 2: 2, 3: 4, 4: 4}


@pytest.mark.parametrize(
    ("family", "size", "quant"),
    [("llava_next", 1, "auto"), ("llava_next", 2, "auto"), ("llava", 2, "w8a16")],
)
def test_graphs_give_the_same_tokens(family: str, size: int, quant: str, run_on_npu: Run, tmp_path: Path) -> None:
    write_questions(family, tmp_path)
    asked = [PROGRAM, family, str(SHAPES[family]), str(tmp_path), quant]
    lines = results(run_on_npu([sys.executable, *asked] if size == 1 else torchrun(size, *asked), SOC))
    assert len(lines) == size
    off, on = (lines[0][mode] for mode in ("off", "auto"))
    assert on["tokens"] == off["tokens"] and len(set(off["prompts"].values())) > 1
    assert on["preempted"] == off["preempted"] > 0
    assert off["replayed"] == [] and on["replayed"] == [PADDED[n] for n in on["steps"]]
    assert {1, 2, 3, 4} == set(on["steps"])
    for line in lines[1:]:
        assert line["auto"]["replayed"] == on["replayed"]


def test_violations_are_caught(run_on_npu: Run) -> None:
    found = results(run_on_npu([sys.executable, PROGRAM, "break", str(SHAPES["llava_next"])], SOC))[0]["refused"]
    assert "a graph waits for an event that no one has recorded" in found["no update"]
    assert "aten::_local_scalar_dense on Ascend910B3: waits for the device" in found["waits"]
    assert "a slot is given twice" in found["shared slot"]
