"""TP: one rank's place among the ranks that share a model, and the collectives between them.

It is passed in, never looked up. `TP()` is rank 0 of 1 and its collectives are the identity, so no caller needs a
single-device branch. `TP(3, 8)` without a group can plan for rank 3 of 8 but not communicate.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mmdist.config import UserError

# A step's batch of decode requests fits, so that most steps cost one broadcast.
MESSAGE_BYTES = 16384
LENGTH_BYTES = 8


@dataclass(frozen=True)
class TP:
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def divide(self, count: int, what: str) -> int:
        """This rank's share of `count`; a count that does not divide is the user's mistake."""
        if count % self.size:
            raise UserError(f"{what}={count} does not divide into {self.size} ranks")
        return count // self.size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def all_max(self, x: torch.Tensor) -> torch.Tensor:
        """Largest over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """(..., n) on each rank -> (..., n * size), in the order of the ranks."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's values to all, in place; every rank passes a tensor of the same shape and dtype."""
        if self.size > 1:
            dist.broadcast(x, src=0, group=self.group)
        return x

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's picklable object to all; one collective while it is small."""
        if self.size == 1:
            return value
        data = pickle.dumps(value) if self.rank == 0 else b""
        message = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8)
        if self.rank == 0:
            head = len(data).to_bytes(LENGTH_BYTES, "little") + data[: MESSAGE_BYTES - LENGTH_BYTES]
            message[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        head = self.broadcast(message).numpy().tobytes()
        length = int.from_bytes(head[:LENGTH_BYTES], "little")
        rest_bytes = length - (MESSAGE_BYTES - LENGTH_BYTES)
        if rest_bytes <= 0:
            return pickle.loads(head[LENGTH_BYTES : LENGTH_BYTES + length])
        rest = torch.empty(rest_bytes, dtype=torch.uint8)
        if self.rank == 0:
            rest = torch.frombuffer(bytearray(data[MESSAGE_BYTES - LENGTH_BYTES :]), dtype=torch.uint8)
        return pickle.loads(head[LENGTH_BYTES:] + self.broadcast(rest).numpy().tobytes())


def init_tp(collectives: str, *, rank: int, size: int, timeout_s: int) -> TP:
    """Join the ranks named by the torchrun environment (MASTER_ADDR, MASTER_PORT); alone, nothing is opened.

    `collectives` is torch's backend string, e.g. "gloo" or "cpu:gloo,cuda:nccl".
    """
    if size == 1:
        return TP()
    dist.init_process_group(collectives, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s))
    return TP(rank, size, dist.group.WORLD)
