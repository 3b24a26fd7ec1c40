"""The collectives a TP needs, and those of torch.distributed: gloo for CPUs, nccl for cards, any number of machines."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist

# A step's batch of decode requests fits, so that most steps cost one broadcast.
MESSAGE_BYTES = 16384
LENGTH_BYTES = 8


class Collectives(Protocol):
    """Every rank calls the same ones in the same order with the same shapes and dtypes."""

    name: str

    def all_sum(self, x: torch.Tensor) -> None:
        """In place."""

    def all_max(self, x: torch.Tensor) -> None:
        """In place."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """(..., n) on each rank -> (..., n * size), in the order of the ranks."""

    def broadcast(self, x: torch.Tensor) -> None:
        """Rank 0's values to all, in place."""

    def broadcast_bytes(self, data: bytes) -> bytes:
        """Rank 0's bytes to all; the others' are not looked at."""

    def device_group(self, device: torch.device) -> str | None:
        """The name of the communicator that operations on the device itself may use; None where there is none."""


class DistributedCollectives:
    def __init__(self, rank: int, size: int, group: dist.ProcessGroup | None):
        self.rank, self.size, self.group = rank, size, group
        self.name = str(dist.get_backend(group))

    def all_sum(self, x: torch.Tensor) -> None:
        dist.all_reduce(x, group=self.group)

    def all_max(self, x: torch.Tensor) -> None:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "npu":  # ProcessGroupHCCL would fill and pad a list's parts first
            out = x.new_empty((self.size, *x.shape))
            dist.all_gather_single(out, x.contiguous(), group=self.group)
            return out.movedim(0, -2).flatten(-2)
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)

    def broadcast(self, x: torch.Tensor) -> None:
        dist.broadcast(x, src=0, group=self.group)

    def device_group(self, device: torch.device) -> str | None:
        if device.type != "npu" or self.group is None:
            return None
        name: str = self.group._get_backend(device).get_hccl_comm_name(self.rank)  # type: ignore[attr-defined]
        return name

    def broadcast_bytes(self, data: bytes) -> bytes:
        """One collective while they are few."""
        message = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8)
        if self.rank == 0:
            head = len(data).to_bytes(LENGTH_BYTES, "little") + data[: MESSAGE_BYTES - LENGTH_BYTES]
            message[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        self.broadcast(message)
        head = message.numpy().tobytes()
        length = int.from_bytes(head[:LENGTH_BYTES], "little")
        rest_bytes = length - (MESSAGE_BYTES - LENGTH_BYTES)
        if rest_bytes <= 0:
            return head[LENGTH_BYTES : LENGTH_BYTES + length]
        rest = torch.empty(rest_bytes, dtype=torch.uint8)
        if self.rank == 0:
            rest = torch.frombuffer(bytearray(data[MESSAGE_BYTES - LENGTH_BYTES :]), dtype=torch.uint8)
        self.broadcast(rest)
        return head[LENGTH_BYTES:] + rest.numpy().tobytes()
