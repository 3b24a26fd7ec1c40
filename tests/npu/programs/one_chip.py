"""What one process sees of the emulated chips, as a line of JSON; run by test_emulation.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torch_npu
from npu import emulator

NZ, ND = 29, 2


def refused(work: Callable[[], object]) -> str:
    try:
        return f"gave {work()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape).half()


def device_facts() -> dict:
    return {
        "devices": torch.npu.device_count(),
        "name": torch.npu.get_device_name(0),
        "bf16": torch.npu.is_bf16_supported(),
        "memory_gib": torch.npu.mem_get_info()[1] / 2**30,
    }


def arithmetic() -> dict:
    """Operators of torch as the CPU has them, whatever the strides and the format."""
    x, w = half(5, 64), half(48, 64)
    tiles = torch.ops.npu.npu_format_cast(input=w.npu(), acl_format=NZ)
    strided = torch.zeros(4, 6, device="npu")
    strided.T[1:3].add_(torch.arange(4.0).npu())
    want = torch.zeros(4, 6)
    want.T[1:3].add_(torch.arange(4.0))
    grown = torch.empty(0, device="npu")
    torch.add(torch.ones(3).npu(), 1, out=grown)
    return {
        "linear": torch.equal(F.linear(x.npu(), w.npu()).cpu(), F.linear(x, w)),
        "linear over tiles": torch.equal(F.linear(x.npu(), tiles).cpu(), F.linear(x, w)),
        "tiles read back": torch.equal(tiles.cpu(), w) and torch.equal((tiles.T[3:5] + 0).cpu(), w.T[3:5]),
        "format": torch.ops.npu.get_npu_format(tiles) == NZ,
        "tiles differ from rows": not torch.equal(raw(tiles), raw(w.npu())),
        "back to rows": torch.ops.npu.get_npu_format(torch.ops.npu.npu_format_cast(tiles, ND)) == ND,
        "strides": torch.equal(strided.cpu(), want),
        "out grows": grown.cpu().tolist() == [2.0] * 3,
        "index": torch.equal(x.npu()[torch.tensor([3, 1]).npu()].cpu(), x[[3, 1]]),
        "item": torch.full((2,), 7.0).npu().sum().item() == 14,
        "softmax": torch.allclose(x.float().npu().softmax(-1).cpu(), x.float().softmax(-1)),
    }


def raw(x: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes in device memory, whatever its format says."""
    return emulator.EMULATORS[0].bytes_of(x).clone()


def refusals() -> dict:
    x = half(4, 64).npu()
    return {
        "bf16 cast": refused(lambda: x.bfloat16()),
        "bf16 zeros": refused(lambda: torch.zeros(2, dtype=torch.bfloat16, device="npu")),
        "odd swiglu": refused(lambda: torch.ops.npu.npu_swiglu(x[:, :63])),
        "unknown keyword": refused(lambda: torch.ops.npu.npu_rms_norm(x, x[0], eps=1e-5)),
        "no reference": refused(lambda: torch_npu.npu_quantize(x, x[0], None, torch.qint8, 1)),
        "CPU tensor": refused(lambda: x + torch.ones(64)),
        "CPU gamma": refused(lambda: torch.ops.npu.npu_rms_norm(x, torch.ones(64).half())),
        "no such operator": refused(lambda: torch.ops.aten.special_airy_ai(x.float())),
        "device lengths": refused(lambda: unpad(x, torch.tensor([4], dtype=torch.int32).npu())),
        "rows for tiles": refused(lambda: cache_rows(x)),
        "second chip": refused(lambda: torch.npu.set_device(99)),
        "too much memory": refused(lambda: torch.empty(2**37, dtype=torch.uint8, device="npu")),
        "host address": read_on_host(),
    }


def unpad(x: torch.Tensor, lens: torch.Tensor) -> None:
    q = x.view(4, 1, 64).contiguous()
    torch.ops.atb._npu_flash_attention_unpad(q, q, q, lens, 1.0, 1, 1, torch.empty_like(q))


def cache_rows(x: torch.Tensor) -> None:
    cache = torch.zeros(2, 4, 16, 16, dtype=torch.float16, device="npu")  # not cast to FRACTAL_NZ
    slots = torch.zeros(1, dtype=torch.int32, device="npu")
    torch.ops.atb._npu_reshape_and_cache(x[:1].view(1, 1, 64), x[:1].view(1, 1, 64), cache, cache.clone(), slots)


def read_on_host() -> str:
    """The end of a process that reads device memory at its own address."""
    program = "import ctypes, torch, torch_npu; ctypes.string_at(torch.ones(4).npu().data_ptr(), 4)"
    return f"ended by signal {-subprocess.run([sys.executable, '-c', program], capture_output=True).returncode}"


if __name__ == "__main__":
    torch.npu.set_device(0)
    facts = device_facts() if sys.argv[1:] == ["facts"] else {**device_facts(), **arithmetic(), "refused": refusals()}
    print(json.dumps({"rank": 0, **facts}), flush=True)
    os._exit(0)
