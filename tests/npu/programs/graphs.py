"""What torch_npu's NPUGraph does on an emulated chip, as a line of JSON; run by test_graphs.py.

graphs.py: one chip; graphs.py ranks: between ranks of torchrun.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch_npu
from one_chip import refused

HEADS, HEAD_DIM, BLOCK_SIZE = 4, 64, 128
SHORT, LONG = [5, 7, 200], [6, 140, 256]


def captured(work: Callable[[], object], **options: object) -> tuple[torch.npu.NPUGraph, object]:
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph, **options):
        result = work()
    return graph, result


def in_capture(work: Callable[[], object]) -> str:
    """How a capture of it is refused; none is left under way."""
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        return refused(work)


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape).half().npu()


def nothing_is_done() -> dict:
    """Memory is as it was until the first replay, which then reads what is there."""
    x, total = torch.arange(4.0).npu(), torch.zeros(4).npu()

    def work() -> torch.Tensor:
        total.add_(x)
        return total * 2

    graph, y = captured(work)
    before = total.cpu().tolist(), bool(y.isnan().all())
    graph.replay()
    x.fill_(1)
    graph.replay()
    rows = torch.tensor([2, 0]).npu()
    taken = captured(lambda: x[rows])
    taken[0].replay()
    return {
        "rows": bool((taken[1] == 1).all()),
        "untouched": before == ([0.0] * 4, True),
        "replayed": y.cpu().tolist() == [2.0, 4.0, 6.0, 8.0] and total.cpu().tolist() == [1.0, 2.0, 3.0, 4.0],
    }


def memory_stays() -> dict:
    """A graph's own memory is no one else's; what it was only lent is whose it is by the time of the replay."""
    lent = [torch.ones(1000).npu()]
    graph, y = captured(lambda: (lent[0] + 1).mul(3).add(1))
    taken = [torch.full((1000,), 9.0).npu() for _ in range(50)]
    graph.replay()
    mine = bool((y == 7).all())
    lent.clear()
    others = [torch.full((1000,), 9.0).npu() for _ in range(600)]  # more than a segment of the allocator's
    graph.replay()
    return {
        "its own": mine and all(bool((t == 9).all()) for t in taken),
        "a lost input": len(others) == 600 and not bool((y == 7).all()),
    }


class Attention:
    """Fused attention of three sequences over a paged cache."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.q = half(3, 1, HEADS * HEAD_DIM)
        self.k, self.v = (half(6, BLOCK_SIZE, HEADS * HEAD_DIM) for _ in range(2))
        self.tables = torch.arange(6, dtype=torch.int32).view(3, 2).npu()

    def arguments(self, lens: list[int]) -> dict:
        return {
            "query": self.q, "key": self.k, "value": self.v, "actual_seq_lengths_kv": lens, "block_table": self.tables,
            "block_size": BLOCK_SIZE, "num_heads": HEADS, "num_key_value_heads": HEADS, "scale": 0.1,
            "input_layout": "BSH",
        }  # fmt: skip

    def __call__(self, lens: list[int]) -> torch.Tensor:
        return torch.ops.npu.npu_fused_infer_attention_score(**self.arguments(lens))[0]


def lengths() -> dict:
    """By NPUGraph.update, as mmdist has it; and by task groups, without the event that makes a forgotten one hang."""
    attention = Attention()
    graph, y = captured(lambda: attention(LONG), auto_dispatch_capture=True)
    first = refused(graph.replay)
    graph.update(cpu_update_input=[{"actual_seq_lengths_kv": SHORT}])
    graph.replay()
    updated = torch.equal(y.cpu(), attention(SHORT).cpu())
    second = refused(graph.replay)
    attention.q.copy_(half(3, 1, HEADS * HEAD_DIM))
    graph.update(cpu_update_input=[{"actual_seq_lengths_kv": LONG}])
    graph.replay()
    again = torch.equal(y.cpu(), attention(LONG).cpu())
    return {"updated": updated and again, "refused": {"no update": first, "an update used up": second}, **groups()}


def groups() -> dict:
    attention, handles = Attention(), []
    run = torch.ops.npu.npu_fused_infer_attention_score.out
    out = [torch.empty_like(attention.q), torch.empty(1).npu()]
    room = torch_npu._npu_fused_infer_attention_score_get_max_workspace(**attention.arguments(LONG))

    def work() -> None:
        stream = torch.npu.current_stream()
        torch.npu.graph_task_group_begin(stream)
        run(**attention.arguments(LONG), workspace=room, out=out)
        handles.append(torch.npu.graph_task_group_end(stream))

    graph, _ = captured(work)
    graph.replay()
    stale = torch.equal(out[0].cpu(), attention(LONG).cpu()) and not torch.equal(out[0].cpu(), attention(SHORT).cpu())
    update = torch.npu.Stream()
    with torch.npu.stream(update):
        torch.npu.graph_task_update_begin(update, handles[0])
        run(**attention.arguments(SHORT), workspace=room, out=out)
        torch.npu.graph_task_update_end(update)
    graph.replay()
    return {"stale": stale, "group updated": torch.equal(out[0].cpu(), attention(SHORT).cpu())}


def refusals() -> dict:
    x = half(4, 64)
    numbers = torch.arange(4).npu()
    return {
        "item": in_capture(lambda: x.sum().item()),
        "to the host": in_capture(lambda: x.cpu()),
        "from the host": in_capture(lambda: torch.ones(4).npu()),
        "into a buffer": in_capture(lambda: numbers.copy_(torch.arange(4))),
        "synchronize": in_capture(torch.npu.synchronize),
        "stream": in_capture(lambda: torch.npu.current_stream().synchronize()),
        "nonzero": in_capture(lambda: (x > 0).nonzero()),
        "mask": in_capture(lambda: x[x > 0]),
        "host index": in_capture(lambda: x[torch.tensor([1, 2])]),
        "cast to the host": in_capture(lambda: x.to("cpu", torch.float32)),
        "lost stream": refused(lambda: captured(lambda: forked(x, joins=False))),
    }


def forked(x: torch.Tensor, joins: bool = True) -> torch.Tensor:
    """On a stream of its own, which joins the capture; joins=False: and which no one waits for."""
    stream, own = torch.npu.current_stream(), torch.npu.Stream()
    own.wait_stream(stream)
    with torch.npu.stream(own):
        y = x + 1
    if joins:
        stream.wait_stream(own)
    return y * 2


def streams() -> dict:
    x = torch.zeros(4).npu()
    graph, y = captured(lambda: forked(x))
    x.fill_(1)
    graph.replay()
    return {"another stream": bool((y == 4).all())}


def one_chip() -> dict:
    found = nothing_is_done() | memory_stays() | streams() | lengths()
    found["refused"] |= refusals()
    return found


def ranks() -> dict:
    """An all-reduce and an all-gather within a graph: none is made while it is captured, each rank by itself."""
    rank, size = dist.get_rank(), dist.get_world_size()
    x, total = torch.full((5,), rank + 1.0).half().npu(), torch.zeros(5).half().npu()
    dist.all_reduce(total)  # the communicator is made before
    gathered = torch.zeros(5 * size).half().npu()

    def work() -> torch.Tensor:
        total.copy_(x)
        dist.all_reduce(total)
        y = total * 2
        dist.all_gather_into_tensor(gathered, x)
        return y + gathered.sum()

    graphs = [captured(work) for _ in range(rank + 1)]  # not the same number everywhere
    before = total.cpu().tolist()
    sums = []
    for add in range(3):
        x.fill_(rank + 1 + add)
        graphs[0][0].replay()
        y = graphs[0][1]
        assert isinstance(y, torch.Tensor)
        sums.append([total[0].item(), y[0].item()])
    return {"before": before, "sums": sums}


if __name__ == "__main__":
    torch.npu.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    rank = int(os.environ.get("RANK", 0))
    if sys.argv[1:] == ["ranks"]:
        dist.init_process_group("cpu:gloo,npu:hccl", timeout=timedelta(seconds=60))
    found = ranks() if sys.argv[1:] == ["ranks"] else one_chip()
    os.write(1, (json.dumps({"rank": rank, **found}) + "\n").encode())
    if sys.argv[1:] == ["ranks"]:
        dist.barrier(group=dist.new_group(backend="gloo"))
    os._exit(0)
