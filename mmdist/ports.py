"""Ports of this machine, taken for as long as a job lives."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path


def is_port_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def lock_ports(ports: Sequence[int]) -> ExitStack | None:
    """Locks held until they are closed, or None when another job or program has one of the ports."""
    with ExitStack() as locks:
        for port in ports:
            path = Path(tempfile.gettempdir()) / f"mmdist-{os.getuid()}-port-{port}.lock"
            lock = locks.enter_context(path.open("a"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return None
            if not is_port_free(port):
                return None
        return locks.pop_all()
