"""The emulated chips: what torch_npu sees of them, that operators run right, and that each limit is named."""

from __future__ import annotations

import sys

import pytest
from npu.jobs import PROGRAMS, Run, results

ONE_CHIP = [sys.executable, str(PROGRAMS / "one_chip.py")]


def test_operators_and_limits(run_on_npu: Run, soc: str) -> None:
    done = run_on_npu(ONE_CHIP, soc, TASK_QUEUE_ENABLE="1", TORCH_NPU_FALLBACK_CPU_DISABLE="1")
    found = results(done)[0]
    is_310p = soc == "Ascend310P3"
    assert (found["devices"], found["name"], found["bf16"]) == ((2, soc, False) if is_310p else (8, soc, True))
    assert found["memory_gib"] == pytest.approx(42.7 if is_310p else 64, abs=0.1)
    refused = found.pop("refused")
    assert not [name for name, value in found.items() if value is False and name != "bf16"], found
    words = {
        "odd swiglu": f"npu_swiglu on {soc}: dimension -1 is odd",
        "unknown keyword": "Unknown keyword argument 'eps'",
        "no reference": f"npu::npu_quantize on {soc}: the emulation has no reference kernel",
        "CPU tensor": f"aten::add.Tensor on {soc}: other is on the cpu",
        "CPU gamma": f"npu::npu_rms_norm on {soc}: gamma is on the cpu",
        "no such operator": "special_airy_ai",
        "device lengths": f"_npu_flash_attention_unpad on {soc}: seq_len is on the npu",
        "second chip": "aclrtSetDevice",
        "too much memory": "NPU out of memory",
        "host address": "ended by signal 11",
    }
    if is_310p:
        words |= {
            "bf16 cast": f"aten::_to_copy on {soc}: dtype is bfloat16",
            "bf16 zeros": f"aten::zeros on {soc}: dtype is bfloat16",
            "rows for tiles": f"_npu_reshape_and_cache on {soc}: cache is in format 2, not 29",
        }
    assert {name: refused[name] for name, text in words.items() if text not in refused[name]} == {}


def test_visible_devices(run_on_npu: Run) -> None:
    found = results(run_on_npu([*ONE_CHIP, "facts"], "Ascend910B3", ASCEND_RT_VISIBLE_DEVICES="5,6,7"))[0]
    assert found["devices"] == 3
