"""Runs the operators of npu tensors on the CPU, in place of the kernels that the emulated CANN lacks.

The real dispatcher of torch_npu is left in charge: each operator it has a kernel for gets another one here, at the
same place (dispatch key PrivateUse1), so an operator that torch_npu has not is refused as on a machine with NPUs.
Operators of torch run torch's CPU kernels, fused ones their reference kernels, and any other fails by name. Tensors
keep lying in device memory, which only this emulator may read (stubs/acl.c); views and allocations are torch_npu's own.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch_npu
from npu.capture import WORKS, Captures
from npu.chip import FRACTAL_NZ, ND, TILE, Chip, ChipLimit
from npu.reference_ops import reference_ops

# Allocations, views, and what only calls other operators: torch_npu's own kernels do these.
NATIVE = (
    "empty", "new_empty", "resize_", "set_", "is_set_to", "record_stream", "is_pinned", "_pin_memory",
    "scaled_dot_product_attention",
)  # fmt: skip
NATIVE_NPU = (
    "get_npu_format", "get_storage_size", "empty_with_format", "npu_change_data_ptr", "_npu_getOption",
    "_npu_fused_infer_attention_score_infer_output",
)  # fmt: skip
HOST_ARGUMENTS = ("seq_len", "context_lens")  # of NNAL's operations, which may lie on the host
CPU_INDICES = ("index", "_index_put_impl_", "index_put_", "_unsafe_index", "_local_scalar_dense")
HCCL_TYPES = {torch.float16: 3, torch.bfloat16: 11}
LIBRARIES: list[torch.library.Library] = []  # kernels last as long as their library
EMULATORS: list[Emulator] = []  # one, once installed
Tensor = torch.Tensor


def install() -> None:
    """Once a process, after torch_npu's import."""
    warnings.filterwarnings("ignore", message=".*deprecated.*", module="torch.distributed")
    emulator = Emulator()
    EMULATORS.append(emulator)
    libraries = {space: torch.library.Library(space, "IMPL") for space in ("aten", "npu", "atb")}
    LIBRARIES.extend(libraries.values())
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1"):
        space, _, rest = name.partition("::")
        base, _, overload = rest.partition(".")
        packet = getattr(getattr(torch.ops, space), base, None) if space in libraries else None
        if packet is None:  # also "aten::npu_...", which torch_npu lists twice
            continue
        function = emulator.kernel_for(name, getattr(packet, overload or "default"))
        if function is not None:
            libraries[space].impl(name, function, "PrivateUse1", allow_override=True)


class Emulator:
    def __init__(self) -> None:
        self.runtime, self.hccl = ctypes.CDLL("libascendcl.so"), ctypes.CDLL("libhccl.so")
        self.runtime.emulated_host.restype = ctypes.c_void_p
        self.runtime.emulated_host.argtypes = [ctypes.c_void_p]
        self.hccl.emulated_all_reduce.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32]
        self.runtime.aclrtGetSocName.restype = ctypes.c_char_p
        self.chip = Chip(self.runtime.aclrtGetSocName().decode(), self.all_reduce)
        self.references = reference_ops(self.chip)
        self.captures = Captures(self.runtime, self.refuse)
        self.copy_natively = torch.library.get_kernel("aten::copy_", "PrivateUse1")
        self.keys = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
        self.fractal: dict[int, torch.Size] = {}  # the shapes of FRACTAL_NZ storages, by their addresses

    def kernel_for(self, name: str, op: torch._ops.OpOverload) -> Callable | None:
        """None where torch_npu's own stays."""
        space, _, base = name.partition("::")
        if name == "aten::copy_":
            return self.copy
        if name == "aten::contiguous":
            return lambda x, memory_format=torch.contiguous_format: (
                x if x.is_contiguous(memory_format=memory_format) else x.clone(memory_format=memory_format)
            )
        if name == "npu::npu_format_cast":
            return self.format_cast
        arguments = op._schema.arguments
        is_view = any(a.alias_info is not None and not a.alias_info.is_write for a in arguments)
        if is_view or (base.startswith(NATIVE) if space == "aten" else base.startswith(NATIVE_NPU)):
            return None
        run = self.references.get(name, op if space == "aten" else None)
        if run is None:
            return lambda *args, **kwargs: self.refuse(name, "the emulation has no reference kernel for it")
        return lambda *args, **kwargs: self.call(name, op, run, args, kwargs)

    def refuse(self, name: str, limit: str) -> None:
        raise ChipLimit(f"{name} on {self.chip.soc}: {limit}")

    def call(self, name: str, op: torch._ops.OpOverload, run: Callable, args: tuple, kwargs: dict) -> Any:
        self.check(name, op, args, kwargs)
        stream = torch.npu.current_stream().npu_stream  # asking for it waits for torch_npu's task queue
        if self.captures.state(stream) != WORKS:
            compute = partial(self.compute, name, op, run, args, kwargs)
            return self.captures.take(stream, op, run, compute, args, kwargs)
        torch.npu.current_stream().synchronize()  # what was queued before, copies and collectives too
        return self.compute(name, op, run, args, kwargs)

    def compute(self, name: str, op: torch._ops.OpOverload, run: Callable, args: tuple, kwargs: dict) -> Any:
        given: dict[int, Tensor] = {}  # npu tensors, by their stand-ins

        def down(x: Any) -> Any:
            if isinstance(x, torch.device):
                return torch.device("cpu") if x.type == "npu" else x
            if isinstance(x, list | tuple):
                return type(x)(map(down, x))
            if not isinstance(x, Tensor):
                return x
            host = self.host(x) if x.device.type == "npu" else x
            given[id(host)] = x
            return host

        device = kwargs.get("device")  # _to_copy's, and where nothing else says it, a new tensor's
        stays = name == "aten::_to_copy" and device is not None and device.type == "cpu"

        def up(x: Any) -> Any:
            if isinstance(x, list | tuple):
                return type(x)(map(up, x))
            if not isinstance(x, Tensor) or stays:
                return x
            return self.to_npu(x) if id(x) not in given else given[id(x)]

        here_args, here_kwargs = tuple(map(down, args)), {key: down(value) for key, value in kwargs.items()}
        with torch.no_grad():
            result = up(run(*here_args, **here_kwargs))
        self.write_back(op, (args, kwargs), (here_args, here_kwargs))
        return result

    def write_back(self, op: torch._ops.OpOverload, given: tuple, here: tuple) -> None:
        """What an operator changed in place but not in device memory: it grew an `out`, or wrote tiles."""
        for place, argument in enumerate(op._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            x, host = (a[place] if place < len(a) else k.get(argument.name) for a, k in (given, here))
            pairs = zip(x, host, strict=True) if isinstance(x, list | tuple) else [(x, host)]
            for tensor, changed in pairs:
                if not isinstance(tensor, Tensor) or tensor.device.type != "npu":
                    continue
                if tensor.shape != changed.shape:
                    tensor.resize_(changed.shape)
                    self.host(tensor).copy_(changed)
                elif getattr(changed, "npu_copy", False):
                    self.refuse(op._schema.name, "writes into a FRACTAL_NZ tensor whose tiles are not its rows")

    def check(self, name: str, op: torch._ops.OpOverload, args: tuple, kwargs: dict) -> None:
        """What holds for every operator: where its tensors lie, and that a 310P knows no bfloat16."""
        space, _, base = name.partition("::")
        moves = name == "aten::_to_copy" and (args[0].device.type == "cpu" or kwargs.get("dtype") is None)
        for place, argument in enumerate(op._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            for x in value if isinstance(value, list | tuple) else [value]:
                if (
                    self.chip.is_310p
                    and not moves
                    and (x is torch.bfloat16 or getattr(x, "dtype", None) is torch.bfloat16)
                ):
                    self.refuse(name, f"{argument.name} is bfloat16")
                if not isinstance(x, Tensor) or x.device.type == "npu":
                    continue
                anywhere = base.split(".")[0] in (*CPU_INDICES, "_to_copy") or x.dim() == 0
                if argument.name not in HOST_ARGUMENTS and not (space == "aten" and anywhere):
                    self.refuse(name, f"{argument.name} is on the {x.device.type}")

    # Memory

    def host(self, x: Tensor) -> Tensor:
        """A CPU tensor over the same bytes, marked with where it comes from; tiles are put in rows first."""
        if not x.numel():
            host = torch.empty(x.shape, dtype=x.dtype)
        elif is_fractal(x):
            host = self.untiled(x, self.bytes_of(x))
        else:
            host = torch.empty(0, dtype=x.dtype)
            host.set_(self.bytes_of(x).untyped_storage(), x.storage_offset(), x.shape, x.stride())
        host.npu_format = FRACTAL_NZ if is_fractal(x) else ND
        host.npu_place = "npu"
        return host

    def bytes_of(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        address = self.runtime.emulated_host(storage.data_ptr())
        return torch.frombuffer((ctypes.c_char * storage.nbytes()).from_address(address), dtype=torch.uint8)

    def untiled(self, x: Tensor, bytes_: Tensor) -> Tensor:
        """Of a tensor in FRACTAL_NZ, (..., columns / 16, rows / 16, 16, 16): its rows, or a view of them like x."""
        shape = self.fractal[x.untyped_storage().data_ptr()]
        tiles, is_same = tile_shape(shape, x.element_size())
        flat = bytes_.view(x.dtype)[: tiles.numel()].view(tiles)
        if is_same:  # a single column of tiles lies as its rows do: what is written is written
            return flat.view(shape).as_strided(x.shape, x.stride(), x.storage_offset())
        rows = flat.movedim(-4, -2).flatten(-4, -3).flatten(-2)[..., : shape[-2], : shape[-1]].contiguous()
        host = rows.as_strided(x.shape, x.stride(), x.storage_offset())
        host.npu_copy = True
        return host

    def to_npu(self, x: Tensor) -> Tensor:
        y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="npu")
        if x.numel():
            self.host(y).copy_(x)
        return y

    def copy(self, x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        npu = [t for t in (x, source) if t.device.type == "npu"]
        plain = not any(is_fractal(t) for t in npu)
        same = x.dtype == source.dtype and x.shape == source.shape and x.is_contiguous() and source.is_contiguous()
        if self.captures.is_open and (len(npu) == 2 or not (plain and same)):
            return self.call("aten::copy_", torch.ops.aten.copy_.default, Tensor.copy_, (x, source), {})
        if plain and same and len(npu) == 1:
            return self.copy_natively.call_boxed(self.keys, x, source, non_blocking)
        # Between host and device, torch_npu casts on the host.
        if self.chip.is_310p and len(npu) == 2 and torch.bfloat16 in (x.dtype, source.dtype):
            self.refuse("aten::copy_", "casts bfloat16")
        torch.npu.current_stream().synchronize()
        to, of = (self.host(t) if t.device.type == "npu" else t for t in (x, source))
        if getattr(to, "npu_copy", False):
            self.refuse("aten::copy_", "writes into a FRACTAL_NZ tensor")
        to.copy_(of)
        return x

    def format_cast(self, input: Tensor, acl_format: int, **kwargs: int | None) -> Tensor:
        """The numbers laid out anew, and noted by torch_npu itself."""
        if self.captures.is_open:
            self.refuse("npu_format_cast", "in a captured stream is not emulated")
        rows = self.references["npu::npu_format_cast"](self.host(input), acl_format, **kwargs)
        if acl_format != FRACTAL_NZ:
            return self.to_npu(rows)
        y = torch_npu.empty_with_format(input.shape, dtype=input.dtype, device=input.device, acl_format=acl_format)
        tiles, _ = tile_shape(input.shape, input.element_size())
        self.fractal[y.untyped_storage().data_ptr()] = input.shape
        room = self.bytes_of(y).view(y.dtype)[: tiles.numel()].view(tiles)
        down, across = -input.shape[-2] % TILE, -input.shape[-1] % tiles[-1]
        padded = torch.nn.functional.pad(rows, (0, across, 0, down))
        room.copy_(padded.unflatten(-1, (-1, tiles[-1])).unflatten(-3, (-1, TILE)).movedim(-2, -4))
        return y

    def all_reduce(self, x: Tensor, name: str) -> int:
        """Sums x over the ranks of a communicator; how many there are."""
        if self.captures.is_open:
            self.refuse("npu_mm_all_reduce_base", "in a captured stream is not emulated")
        size = self.hccl.emulated_all_reduce(name.encode(), x.data_ptr(), x.numel(), HCCL_TYPES[x.dtype])
        if size <= 0:
            self.refuse("npu_mm_all_reduce_base", f"no sum over the communicator {name} (HCCL error {-size})")
        return size


def is_fractal(x: Tensor) -> bool:
    return torch.ops.npu.get_npu_format.default(x) == FRACTAL_NZ


def tile_shape(shape: torch.Size, itemsize: int) -> tuple[torch.Size, bool]:
    """(..., columns / n, rows / 16, 16, n) with 32 bytes a tile's row, and whether that is the order of the rows."""
    width = 32 // itemsize
    rows, columns = -(-shape[-2] // TILE), -(-shape[-1] // width)
    return torch.Size((*shape[:-2], columns, rows, TILE, width)), columns == 1 and shape[-1] == width and not (
        shape[-2] % TILE
    )
