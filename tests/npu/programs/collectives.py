"""Collectives of the real ProcessGroupHCCL between ranks of torchrun, as a line of JSON a rank; run by test_hccl.py.

collectives.py ranks: the plain ones; collectives.py NAME: one that is refused.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
LARGE = 2_500_001  # float16: several slots of the emulation, and not a whole number of them


def full(value: float, count: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.full((count,), value, dtype=dtype).npu()


def same(x: torch.Tensor) -> list:
    """The number that x is full of."""
    host = x.cpu()
    return host[:1].tolist() if (host == host[0]).all() else host[:3].tolist()


def all_reduce(dtype: torch.dtype, count: int = 7, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> list:
    x = full(RANK + 1, count, dtype)
    dist.all_reduce(x, op)
    return same(x)


def gather(count: int) -> list:
    out = torch.empty(count * SIZE, dtype=torch.float16, device="npu")
    dist.all_gather_into_tensor(out, full(RANK, count))
    return [number for row in out.view(SIZE, count) for number in same(row)]


def scatter(count: int) -> list:
    out = torch.empty(count, dtype=torch.float16, device="npu")
    parts = torch.arange(SIZE, dtype=torch.float16).repeat_interleave(count)
    dist.reduce_scatter_tensor(out, parts.npu())
    return same(out)


def broadcast(count: int) -> list:
    x = full(RANK, count, torch.int64)
    dist.broadcast(x, src=SIZE - 1)
    return same(x)


def fused() -> bool:
    """Product and sum in one operation, by the communicator's name."""
    x, w = torch.ones(3, 16).half() * (RANK + 1), torch.ones(16, 8).half()
    name = dist.group.WORLD._get_backend(torch.device("npu")).get_hccl_comm_name(RANK)
    y = torch.ops.npu.npu_mm_all_reduce_base(x1=x.npu(), x2=w.npu(), hcom=name)
    return bool((y.cpu() == 16 * SIZE * (SIZE + 1) / 2).all())


def plain() -> dict:
    found = {
        "fp16": all_reduce(torch.float16),
        "fp32": all_reduce(torch.float32),
        "int32": all_reduce(torch.int32, op=dist.ReduceOp.MAX),
        "large": all_reduce(torch.float16, LARGE),
        "all_gather": gather(5),
        "large all_gather": gather(LARGE),
        "reduce_scatter": scatter(5),
        "large reduce_scatter": scatter(LARGE),
        "broadcast": broadcast(5),
        "large broadcast": broadcast(LARGE),
    }
    dist.barrier()
    messages = [None] * SIZE
    dist.all_gather_object(messages, {"rank": RANK})
    found["objects"] = [message["rank"] for message in messages]
    if os.environ["EMULATED_SOC"].startswith("Ascend910B"):
        found |= {"int64": all_reduce(torch.int64), "bf16": all_reduce(torch.bfloat16), "fused": fused()}
    return found


REFUSED = {
    "int64": lambda: all_reduce(torch.int64),
    "bf16": lambda: all_reduce(torch.bfloat16),
    "bf16 gather": lambda: dist.broadcast(full(1, 4, torch.bfloat16), src=0),
    "int16 max": lambda: all_reduce(torch.int16, op=dist.ReduceOp.MAX),
    "bf16 product": lambda: all_reduce(torch.bfloat16, op=dist.ReduceOp.PRODUCT),
    "counts": lambda: all_reduce(torch.float16, 4 + RANK),
    "lonely": lambda: all_reduce(torch.float16) if RANK == 0 else None,
    "fused": fused,
}


def attempt(name: str) -> str:
    if name != "fused":
        dist.barrier()
    try:
        return f"gave {REFUSED[name]()}"
    except Exception as error:
        return str(error)


if __name__ == "__main__":
    torch.npu.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,npu:hccl", timeout=timedelta(seconds=60))
    kind = type(dist.group.WORLD._get_backend(torch.device("npu"))).__name__
    found = plain() if sys.argv[1] == "ranks" else {"refused": {name: attempt(name) for name in sys.argv[1:]}}
    # In one write: ranks share the output.
    os.write(1, (json.dumps({"rank": RANK, "group": kind, **found}) + "\n").encode())
    dist.barrier(group=dist.new_group(backend="gloo"))  # a rank's end would be an error of the others
    os._exit(0)
