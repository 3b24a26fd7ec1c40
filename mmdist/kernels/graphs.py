"""Work of an accelerator captured once and then done again by one call: what each device family makes of it.

A graph reads and writes the memory it was captured with, so its inputs are put into the same tensors each time and its
result is good until the next replay. While it is captured nothing is done, and nothing may wait for the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

import torch

from mmdist.kernels.npu_plan import WITHOUT_GRAPHS

Work = Callable[[list[int]], torch.Tensor]  # context lengths, as the host knows them -> a result on the device
Replay = Callable[[list[int]], torch.Tensor]


class Graphs(Protocol):
    def capture(self, work: Work, lens: list[int]) -> Replay:
        """work(lens), captured; what does it again with other lengths."""


class CudaGraphs:
    """Lengths lie on the device, so a replay needs no more than its call. Never run: we had no CUDA device."""

    def __init__(self, device: torch.device):
        self.device, self.pool = device, torch.cuda.graph_pool_handle()

    def capture(self, work: Work, lens: list[int]) -> Replay:
        warm_up(torch.cuda, self.device, work, lens)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = work(lens)

        def replay(lens: list[int]) -> torch.Tensor:
            graph.replay()
            return result

        return replay


class NpuGraphs:
    """npu_fused_infer_attention_score takes lengths from the host. torch_npu captures each call of it as a group of
    tasks behind an event that update() records, so a replay whose lengths were not renewed would wait for ever."""

    def __init__(self, device: torch.device):
        self.device, self.npu = device, torch.get_device_module("npu")
        self.pool = self.npu.graph_pool_handle()

    def capture(self, work: Work, lens: list[int]) -> Replay:
        warm_up(self.npu, self.device, work, lens)
        graph = self.npu.NPUGraph()
        with self.npu.graph(graph, pool=self.pool, auto_dispatch_capture=True):
            result = work(lens)

        def replay(lens: list[int]) -> torch.Tensor:
            self.npu.current_stream().synchronize()  # a replay under way would read half of each
            graph.update(cpu_update_input=[{"actual_seq_lengths_kv": lens}])
            graph.replay()
            return result

        return replay


def warm_up(accelerator: Any, device: torch.device, work: Work, lens: list[int]) -> None:
    """What an operation does only once, a communicator's beginning too, is no part of a graph."""
    work(lens)
    accelerator.synchronize(device)


# What else rules them out on an NPU: torch_npu refuses to capture with the first; over the second, captures with groups
# of tasks fail or hang (vllm-ascend issue 13688).
RULED_OUT = {("TASK_QUEUE_ENABLE", "2"): "1 is the default", ("HCCL_OP_EXPANSION_MODE", "AIV"): "unset it"}
GRAPHS: dict[str, type[CudaGraphs] | type[NpuGraphs]] = {"cuda": CudaGraphs, "npu": NpuGraphs}


def why_no_graphs(device: str, chip: str | None, kernels: str) -> str | None:
    """Why decoding cannot be captured there; None where it can. chip: of an NPU; kernels: hardware.kernels."""
    if device not in GRAPHS:
        return f"a {device.upper()} has no graphs"
    if chip is not None and kernels == "plain":
        return "hardware.kernels=plain waits for the device as it masks"
    for (variable, value), cure in RULED_OUT.items() if device == "npu" else ():
        if os.environ.get(variable) == value:
            return f"{variable}={value} rules them out ({cure})"
    return WITHOUT_GRAPHS.get(chip or "")
