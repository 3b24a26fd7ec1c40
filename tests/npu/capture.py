"""Operators given to a stream that is captured: kept, not done, until their graph is replayed.

As on a chip: a capture leaves memory as it was (so its results are there only once the graph has been replayed); a
replay reads and writes the addresses of the capture, whoever owns them by then; arguments that lie on the host, scalars
and lengths, stay as they were given until graph_task_update gives others; and what has to wait for the device, or
reads or writes host memory, is refused. The runtime keeps the order, among copies and collectives (stubs/streams.c).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from npu.chip import FRACTAL_NZ

WORKS, CAPTURED, UPDATES = range(3)  # what a stream does with what it is given (stubs/emulated.h)
HOOK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)
WAITING = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}  # operators the host has to wait for
NEVER_WRITTEN = 0xFF  # NaN, or -1
Tensor = torch.Tensor


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in device memory."""

    address: int
    nbytes: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(x: Tensor) -> Place:
        storage = x.untyped_storage()
        return Place(storage.data_ptr(), storage.nbytes(), x.storage_offset(), x.shape, x.stride(), x.dtype)


@dataclass
class Task:
    """run: on tensors of the host over device memory. outputs: where its new results go; None for its arguments."""

    name: str
    run: Callable
    args: tuple
    kwargs: dict[str, Any]
    outputs: list[Place | None]


class Captures:
    def __init__(self, runtime: ctypes.CDLL, refuse: Callable[[str, str], None]):
        self.runtime, self.refuse = runtime, refuse
        self.tasks: list[Task] = []
        self.before: list[tuple[Place, Tensor]] = []  # what lay where this capture's operators wrote, in their order
        self.fresh: list[Place] = []  # what they made
        self.hooks = HOOK(self.replay), HOOK(self.undo)
        runtime.emulated_stream_state.argtypes = runtime.emulated_replaced.argtypes = [ctypes.c_void_p]
        runtime.emulated_add_operator.argtypes = [ctypes.c_void_p, ctypes.c_int]
        runtime.emulated_set_hooks(*self.hooks)

    def state(self, stream: int) -> int:
        return int(self.runtime.emulated_stream_state(stream))

    @property
    def is_open(self) -> bool:
        return self.state(torch.npu.current_stream().npu_stream) != WORKS

    def take(
        self, stream: int, op: torch._ops.OpOverload, run: Callable, compute: Callable, args: tuple, kwargs: dict
    ) -> Any:
        """An operator that such a stream is given. compute() does it now, for the shapes of its results."""
        name = op._schema.name + (f".{op._schema.overload_name}" if op._schema.overload_name else "")
        self.check(name, op, args, kwargs)
        task = Task(name, run, placed(args), placed(kwargs), [])
        if self.state(stream) == UPDATES:
            return self.update(stream, task, kwargs)
        self.before += [(Place.of(x), self.host(Place.of(x)).clone()) for x in written(op, args, kwargs)]
        given = {id(x) for x in tensors((args, kwargs))}
        result = compute()
        task.outputs = [None if id(x) in given else Place.of(x) for x in tensors(result)]
        self.fresh += [place for place in task.outputs if place is not None]
        self.add(stream, task)
        return result

    def check(self, name: str, op: torch._ops.OpOverload, args: tuple, kwargs: dict) -> None:
        if waits(name, op, args):
            self.refuse(name, "waits for the device, and a stream is being captured")
        device = kwargs.get("device")
        leaves = name == "aten::_to_copy" and device is not None and device.type == "cpu"
        if leaves or any(x.device.type == "cpu" and x.dim() for x in tensors((args, kwargs))):
            self.refuse(name, "copies between host and device, and a stream is being captured")
        if any(
            torch.ops.npu.get_npu_format.default(x) == FRACTAL_NZ
            for x in tensors((args, kwargs))
            if x.device.type == "npu"
        ):
            self.refuse(name, "FRACTAL_NZ in a captured stream is not emulated")

    def add(self, stream: int, task: Task) -> None:
        self.tasks.append(task)
        if self.runtime.emulated_add_operator(stream, len(self.tasks) - 1):
            self.refuse(task.name, "was not kept: see the runtime's error")

    def update(self, stream: int, task: Task, kwargs: dict) -> Any:
        number = self.runtime.emulated_replaced(stream)
        before = self.tasks[number].name if number >= 0 else "nothing"
        if before != task.name or "out" not in kwargs:
            self.refuse(task.name, f"updates {before}: the same operator with `out` was expected")
        self.add(stream, task)
        return kwargs["out"]

    def replay(self, number: int) -> int:
        """The hook `run`: 0, or an error of the runtime's."""
        task = self.tasks[number]
        try:
            with torch.no_grad():
                result = task.run(*self.hosted(task.args), **self.hosted(task.kwargs))
            for place, x in zip(task.outputs, tensors(result), strict=False):
                if place is not None:
                    self.host(place).copy_(x)
        except Exception as error:
            self.runtime.emulated_error(b"%s", f"{task.name} in a replayed graph: {error}".encode())
            return 507000  # ACL_ERROR_RT_INTERNAL_ERROR
        return 0

    def undo(self, number: int) -> int:
        """The hook `ended`: nothing was done."""
        for place, before in reversed(self.before):
            self.host(place).copy_(before)
        for place in self.fresh:
            self.bytes_at(place).fill_(NEVER_WRITTEN)
        self.before, self.fresh = [], []
        return 0

    def hosted(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(map(self.hosted, value))
        if isinstance(value, dict):
            return {key: self.hosted(item) for key, item in value.items()}
        return self.host(value) if isinstance(value, Place) else value

    def bytes_at(self, place: Place) -> Tensor:
        if not place.nbytes:
            return torch.empty(0, dtype=torch.uint8)
        address = self.runtime.emulated_host(place.address)
        return torch.frombuffer((ctypes.c_char * place.nbytes).from_address(address), dtype=torch.uint8)

    def host(self, place: Place) -> Tensor:
        host = torch.empty(0, dtype=place.dtype)
        host.set_(self.bytes_at(place).untyped_storage(), place.offset, place.shape, place.stride)
        return host


def waits(name: str, op: torch._ops.OpOverload, args: tuple) -> bool:
    """Whether the host has to wait for the device, to know a number or the shape of a result."""
    if "index" in name:  # by rows it has not
        return any(x.dtype in (torch.bool, torch.uint8) for x in tensors(args[1])) if len(args) > 1 else False
    return bool(WAITING & set(op.tags)) or name == "aten::_local_scalar_dense"


def placed(value: Any) -> Any:
    """Device tensors by their places; what lies on the host as it is now."""
    if isinstance(value, list | tuple):
        return type(value)(map(placed, value))
    if isinstance(value, dict):
        return {key: placed(item) for key, item in value.items()}
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if not isinstance(value, Tensor):
        return value
    return Place.of(value) if value.device.type == "npu" else value.clone()


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def written(op: torch._ops.OpOverload, args: tuple, kwargs: dict) -> Iterator[Tensor]:
    """The arguments that an operator changes; that it changes `out` not every schema says."""
    yield from tensors(kwargs.get("out"))
    for number, argument in enumerate(op._schema.arguments):
        if argument.name != "out" and argument.alias_info is not None and argument.alias_info.is_write:
            yield from tensors(args[number] if number < len(args) else kwargs.get(argument.name))
