"""One log format with the rank in it: rank 0 at INFO, the others at WARNING, on stderr."""

from __future__ import annotations

import logging
import sys


def init_log(rank: int = 0, size: int = 1) -> None:
    where = f" rank {rank}" if size > 1 else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(levelname)s %(asctime)s{where} [%(name)s] %(message)s", "%H:%M:%S"))
    root = logging.getLogger("mmdist")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
