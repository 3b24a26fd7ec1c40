"""TP: one rank's place among the ranks that share a model, and the collectives between them.

It is passed in, never looked up. `TP()` is rank 0 of 1 and its collectives are the identity, so no caller needs a
single-device branch. `TP(3, 8)` without collectives can plan for rank 3 of 8 but not communicate.
"""

from __future__ import annotations

import logging
import os
import pickle
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mmdist.collectives.distributed import Collectives, DistributedCollectives
from mmdist.collectives.shm import NoShm, open_shm
from mmdist.config import UserError
from mmdist.native.build import load_library

log = logging.getLogger("mmdist.tp")


@dataclass(frozen=True)
class TP:
    rank: int = 0
    size: int = 1
    group: Collectives | None = None

    def divide(self, count: int, what: str) -> int:
        """This rank's share of `count`; a count that does not divide is the user's mistake."""
        if count % self.size:
            raise UserError(f"{what}={count} does not divide into {self.size} ranks")
        return count // self.size

    @property
    def others(self) -> Collectives:
        assert self.group is not None, "a TP without collectives can plan, not communicate"
        return self.group

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place."""
        if self.size > 1:
            self.others.all_sum(x)
        return x

    def all_max(self, x: torch.Tensor) -> torch.Tensor:
        """Largest over the ranks, in place."""
        if self.size > 1:
            self.others.all_max(x)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """(..., n) on each rank -> (..., n * size), in the order of the ranks."""
        return x if self.size == 1 else self.others.all_gather(x)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's values to all, in place; every rank passes a tensor of the same shape and dtype."""
        if self.size > 1:
            self.others.broadcast(x)
        return x

    def count_ranks(self, device: torch.device) -> int:
        """How many ranks there are, found by asking each of them."""
        return int(self.all_reduce(torch.ones(1, device=device)))

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's picklable object to all."""
        if self.size == 1:
            return value
        data = self.others.broadcast_bytes(pickle.dumps(value) if self.rank == 0 else b"")
        return value if self.rank == 0 else pickle.loads(data)


def init_tp(collectives: str, kernels: str, *, rank: int, size: int, local_size: int, timeout_s: int) -> TP:
    """Join the ranks named by the torchrun environment (MASTER_ADDR, MASTER_PORT); alone, nothing is opened.

    collectives: torch's backend string, e.g. "gloo" or "cpu:gloo,cuda:nccl"; or "shm", or "auto": shm where it can be,
    else gloo. kernels: hardware.kernels. UserError where shm is asked for and cannot be.
    """
    if size == 1:
        return TP()
    shared = collectives in ("auto", "shm")
    backend = "gloo" if shared else collectives
    limit = timedelta(seconds=timeout_s)
    store = open_store(rank, size, limit)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    if shared:
        native = load_library("auto" if kernels == "plain" else kernels)
        try:
            return TP(rank, size, open_shm(native, rank=rank, size=size, local_size=local_size, timeout_s=timeout_s))
        except NoShm as reason:
            if collectives == "shm":
                raise UserError(f"hardware.collectives=shm: {reason}; hardware.collectives=gloo works too") from None
            if rank == 0:
                log.warning("no shared memory between the ranks (%s); gloo is used instead", reason)
    return TP(rank, size, DistributedCollectives(rank, size, dist.group.WORLD))


def open_store(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """Where the ranks meet first. Those that are started again meet under another name: a launcher's store outlives
    them, with the addresses of the dead."""
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timeout))
    store.set_timeout(timeout)
    return dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
