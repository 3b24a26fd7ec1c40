"""The other ranks, watched by rank 0: what waits for an answer should hear of a death before a collective does."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable

import torch.distributed as dist


def exchange_pids(size: int) -> list[int]:
    """Every rank's process id, in the order of the ranks; all ranks call it."""
    pids = [os.getpid()] * size
    if size > 1:
        dist.all_gather_object(pids, os.getpid())
    return pids


class PeerWatch:
    """Calls lost(why) from a thread of its own when a process has ended."""

    def __init__(self, pids: list[int], lost: Callable[[str], None]):
        self.lost = lost
        self.watched = {os.pidfd_open(pid): rank for rank, pid in enumerate(pids) if pid != os.getpid()}
        self.closed = False
        if self.watched:
            threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def close(self) -> None:
        """From now on the ranks may leave."""
        self.closed = True

    def _watch(self) -> None:
        poll = select.poll()
        for fd in self.watched:
            poll.register(fd, select.POLLIN)
        fd, _ = poll.poll()[0]
        if not self.closed:
            self.lost(f"rank {self.watched[fd]} has died")
