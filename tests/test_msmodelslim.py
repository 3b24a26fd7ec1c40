"""Integers and scales are msmodelslim's own, bit for bit.

msmodelslim patches torch on import and asks for old packages, so it is no dependency and runs in a Python of its own:

    python -m venv /tmp/msmodelslim && /tmp/msmodelslim/bin/pip install torch safetensors msmodelslim
    MSMODELSLIM_PYTHON=/tmp/msmodelslim/bin/python pytest tests/test_msmodelslim.py
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from quant_cases import quantize, tensors
from safetensors.torch import load_file, save_file
from split_cases import source

PYTHON = os.environ.get("MSMODELSLIM_PYTHON")
THEIRS = """
import sys
import torch
from safetensors.torch import load_file, save_file
from msmodelslim.ir.api.impl.int_quantization import calculate_int_qparam, int_quantize
from msmodelslim.ir.qal import QDType, QScope, QStorage

from msmodelslim.pytorch.llm_ptq.llm_ptq_tools.save.complex_quantifier import _w4a16_pack_int4

source, target, bits, group_size = sys.argv[1:]
kind = QDType.INT8 if bits == "8" else QDType.INT4
found = {}
for name, weight in load_file(source).items():
    rows = weight.float().view(-1, int(group_size) or weight.shape[1])
    least, most = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    param = calculate_int_qparam(least, most, kind, QScope.PER_CHANNEL, True)
    q = int_quantize(QStorage(QDType.FLOAT, rows), param).value.to(torch.int8).view(weight.shape)
    found[name] = q if bits == "8" else _w4a16_pack_int4(q, group_size == "0")
    found[name + "_scale"] = param.ext["scale"].view(len(weight), -1).contiguous()
save_file(found, target)
"""


@pytest.mark.skipif(PYTHON is None, reason="MSMODELSLIM_PYTHON is not set; the file's docstring says how")
@pytest.mark.parametrize("group_size", ("0", "32"))
@pytest.mark.parametrize("scheme", ("w8a16", "w4a16"))
def test_bit_for_bit(tmp_path: Path, scheme: str, group_size: str) -> None:
    folder = quantize(source(), tmp_path / "q", "--scheme", scheme, "--group-size", group_size)
    ours = {name: x for name, x in tensors(folder).items() if name.endswith(("_scale", ".weight"))}
    names = [name.removesuffix("_scale") for name in ours if name.endswith("_scale")]
    plain = {name: x for path in source().glob("*.safetensors") for name, x in load_file(path).items()}
    save_file({name: plain[name] for name in names}, tmp_path / "plain.safetensors")
    files = [str(tmp_path / name) for name in ("plain.safetensors", "theirs")]
    subprocess.run([str(PYTHON), "-c", THEIRS, *files, scheme[1], group_size], check=True, cwd=tmp_path)
    theirs = load_file(tmp_path / "theirs")
    assert len(names) == 21 and theirs.keys() == {*names, *(f"{name}_scale" for name in names)}
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name]), name
