"""One ONNX file, operation by operation: every shape is fixed, and weights stay in a safetensors file beside it.

A safetensors file is a header and then raw little-endian numbers, which is what ONNX calls external data: a prefill
network and its cached twin share one. Opset 17 with IR 8, as onnx 1.14 reads it, which TPU-MLIR pins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from weights_tools.part_file import Layout, build_header
from weights_tools.values import count_bytes

OPSET, IR_VERSION = 17, 8
FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file in float32. names: as the graphs call a weight -> as the file does."""

    file: str
    layout: Layout = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int, ...]:
        return {stored: shape for stored, _, shape in self.layout}[self.names[name]]

    def tensor(self, name: str) -> TensorProto:
        stored, shape = self.names[name], self.shape(name)
        offset = build_header(self.layout)[1][stored]
        place = {"location": self.file, "offset": offset, "length": count_bytes("F32", shape)}
        tensor = TensorProto(name=stored, data_type=FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor


class Graph:
    """Values are their names; `weights` is where the file's own weights are, None for one without."""

    def __init__(self, name: str, weights: WeightFile | None = None):
        self.name, self.weights = name, weights
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.tensors: dict[str, TensorProto] = {}

    def input(self, name: str, shape: Sequence[int], dtype: int = FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, value: str, name: str, shape: Sequence[int], dtype: int = FLOAT) -> None:
        """Say what a computed value is called outside."""
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [name if old == value else old for old in names]

    def weight(self, name: str) -> str:
        assert self.weights is not None, f"{self.name} has no weights"
        tensor = self.weights.tensor(name)
        self.tensors[tensor.name] = tensor
        return tensor.name

    def const(self, value: Any, dtype: type = np.float32) -> str:
        array: np.ndarray = np.asarray(value, dtype)
        known = (name for name, tensor in self.tensors.items() if same(tensor, array))
        name = next(known, f"const_{len(self.tensors)}")
        self.tensors.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """A node; its first output."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, num_outputs: int, *inputs: str, **attributes: Any) -> list[str]:
        name = f"{kind.lower()}_{len(self.nodes)}"
        outputs = [name, *(f"{name}_{number}" for number in range(1, num_outputs))]
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=name, **attributes))
        return outputs

    def reshape(self, x: str, *shape: int) -> str:
        return self.op("Reshape", x, self.const(shape, np.int64))

    def transpose(self, x: str, *axes: int) -> str:
        return self.op("Transpose", x, perm=axes)

    def part(self, x: str, axis: int, start: int, stop: int) -> str:
        """x[start:stop] along an axis."""
        return self.op("Slice", x, *(self.const([number], np.int64) for number in (start, stop, axis)))

    def linear(self, x: str, name: str, *, bias: bool = False) -> str:
        """x W^T, where the file has W^T."""
        y = self.op("MatMul", x, self.weight(f"{name}.weight"))
        return self.op("Add", y, self.weight(f"{name}.bias")) if bias else y

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, [*self.tensors.values()])
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="mmdist")


def same(tensor: TensorProto, array: np.ndarray) -> bool:
    if tensor.data_location == TensorProto.EXTERNAL or tuple(tensor.dims) != array.shape:
        return False
    other = numpy_helper.to_array(tensor)
    return other.dtype == array.dtype and bool((other == array).all())
