"""Graphs of vision towers: arrays of one batch in, one array out, by onnxruntime or on an Ascend NPU."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from mmdist.config import UserError

HAS_ONNXRUNTIME = find_spec("onnxruntime") is not None  # the extra `onnx`; the rest of it writes graphs
HAS_ONNX = HAS_ONNXRUNTIME and find_spec("onnxscript") is not None
INSTALL_ONNX = "run: pip install 'mmdist[onnx]'"
INSTALL_OM = (
    "install its wheels and those of aclruntime from https://gitee.com/ascend/tools (ais-bench_workload/tool/ais_bench)"
)


class VisionSession(Protocol):
    """A graph that is loaded; its shapes are fixed. UserError where it cannot be loaded."""

    def run(self, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """In the graph's order; the result is the caller's own."""


def open_session(backend: str, path: Path, shapes: Sequence[Sequence[int]], device: torch.device) -> VisionSession:
    """backend: onnx or om. shapes: of the inputs, as path should have them. device: of this rank's tensors."""
    if backend == "onnx":
        return OnnxSession(path)
    return OmSession(path, shapes, device.index or 0)


class OnnxSession:
    """On the CPU, with as many threads as this rank has."""

    def __init__(self, path: Path):
        if not HAS_ONNXRUNTIME:
            raise UserError(f"onnxruntime is not installed, and nothing else runs {path.name}; {INSTALL_ONNX}")
        onnxruntime = import_module("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the ranks want the cores
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors share no class of their own
            raise UserError(f"{path}: onnxruntime does not load it ({first_line(error)}); export it again") from error
        self.names = [node.name for node in self.session.get_inputs()]

    def run(self, inputs: Sequence[np.ndarray]) -> np.ndarray:
        return self.session.run(None, dict(zip(self.names, inputs, strict=True)))[0]


class OmSession:
    """In a thread of its own: ACL binds its context to the thread, and torch_npu's must stay the one of ours.

    The calls are those of ais_bench's InferSession(device_id, model_path), with mode="static".
    """

    def __init__(self, path: Path, shapes: Sequence[Sequence[int]], device_id: int):
        if find_spec("ais_bench") is None:
            raise UserError(f"vision.backend=om: ais_bench is not installed; {INSTALL_OM}")
        self.thread = ThreadPoolExecutor(1)
        try:
            self.session = self.thread.submit(load_om, path, device_id).result()
        except Exception as error:  # aclruntime raises RuntimeError, ais_bench errors of its own
            raise UserError(
                f"{path}: ais_bench does not load it on device {device_id} ({first_line(error)}); was it made for this "
                "chip? run weights_tools export --vision om with the --soc that npu-smi info shows"
            ) from error
        found, wanted = [list(node.shape) for node in self.session.get_inputs()], [list(shape) for shape in shapes]
        if found != wanted:
            raise UserError(f"{path}: takes inputs of shape {found}, expected {wanted}; export it again")

    def run(self, inputs: Sequence[np.ndarray]) -> np.ndarray:
        return self.thread.submit(self._run, inputs).result()

    def _run(self, inputs: Sequence[np.ndarray]) -> np.ndarray:
        return np.array(self.session.infer([np.ascontiguousarray(x) for x in inputs], mode="static")[0])


def load_om(path: Path, device_id: int) -> Any:
    return import_module("ais_bench.infer.interface").InferSession(device_id, str(path))


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
