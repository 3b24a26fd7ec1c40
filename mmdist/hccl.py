"""What HCCL and NNAL read from the environment of a job's ranks.

Names, ranges and defaults: the CANN documents' environment variables; which are still read: MindIE-LLM's source.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from mmdist.config import UserError
from mmdist.ports import is_port_free, lock_ports

BASE_PORT = "HCCL_IF_BASE_PORT"
DEFAULT_PORT = 60000  # HCCL's own
PORT_COUNT = 16  # from the base port on
FIRST_PORTS = range(61000, 65520, PORT_COUNT)  # above those that Linux gives to outgoing connections
CONNECT_TIMEOUTS = 120, 7200  # seconds, least and most
EXEC_STEP = 68  # seconds; a 310P takes multiples
EVENT_LATER = 32  # events outlast executions, as by default (1868 and 1836 s)
# Variables of the LLaVA scripts for MindIE that mmdist passes on; who read them is gone.
OBSOLETE = {
    "ATB_LAYER_INTERNAL_TENSOR_REUSE": "dropped from MindIE",
    "ATB_CONVERT_NCHW_TO_ND": "nothing in MindIE reads it",
    "ATB_CONTEXT_WORKSPACE_SIZE": "nothing in MindIE reads it",
    "LCCL_ENABLE_FALLBACK": "there is no LCCL here",
    "ATB_WORKSPACE_MEM_ALLOC_GLOBAL": "1 is NNAL's default now",
}


@contextmanager
def hccl_environment(timeout_s: int) -> Iterator[dict[str, str]]:
    """Variables for the ranks of a job, and its ports while it lives. timeout_s: launcher.timeout_s."""
    least, most = CONNECT_TIMEOUTS
    steps = max(1, (timeout_s - 1) // EXEC_STEP)  # HCCL's own report comes before torch's timeout
    with take_ports() as port:
        yield {
            BASE_PORT: str(port),
            # Ranks first meet after loading, which may take them minutes.
            "HCCL_CONNECT_TIMEOUT": str(min(most, max(least, timeout_s))),
            "HCCL_EXEC_TIMEOUT": str(steps * EXEC_STEP),
            "HCCL_EVENT_TIMEOUT": str(steps * EXEC_STEP + EVENT_LATER),
        }


@contextmanager
def take_ports() -> Iterator[int]:
    """HCCL_IF_BASE_PORT, else the first of FIRST_PORTS whose block no one uses; locked against other jobs."""
    asked = asked_port()
    for first in FIRST_PORTS if asked is None else [asked]:
        locks = lock_ports(block(first))
        if locks is not None:
            with locks:
                yield first
            return
    if asked is None:
        raise UserError(f"no {PORT_COUNT} free ports in a row from {FIRST_PORTS[0]} on; choose with {BASE_PORT}=PORT")
    raise ports_in_use(asked, "unset it, and each job takes free ones")


def check_ports() -> None:
    """For a job that torchrun started, whose ports are its user's: by one rank of the machine, before any communicates.

    Of several machines another rank may hold its port already.
    """
    if "MMDIST_AGENT" in os.environ or os.environ.get("WORLD_SIZE") != os.environ.get("LOCAL_WORLD_SIZE"):
        return
    first = asked_port() or DEFAULT_PORT
    if not all(map(is_port_free, block(first))):
        cure = f"export {BASE_PORT}=PORT, {PORT_COUNT} free ones from there on; launch.py without torchrun finds some"
        raise ports_in_use(first, cure)


def asked_port() -> int | None:
    asked = os.environ.get(BASE_PORT)
    if asked is not None and not asked.isdigit():
        raise UserError(f"{BASE_PORT}={asked}: expected a port number; unset it, and each job takes free ones")
    return int(asked) if asked is not None else None


def block(first: int) -> range:
    return range(first, first + PORT_COUNT)


def ports_in_use(first: int, cure: str) -> UserError:
    ports = block(first)
    busy = ", ".join(str(port) for port in ports if not is_port_free(port)) or "of another job of yours"
    return UserError(
        f"{BASE_PORT}={first}{'' if BASE_PORT in os.environ else ' (its default)'}: HCCL takes the ports "
        f"{ports[0]}-{ports[-1]}, and some are in use ({busy}); {cure}"
    )


def obsolete_variables() -> list[str]:
    """A line for each variable that is set and does nothing any more."""
    return [f"{name} is passed on, but is obsolete: {why}" for name, why in OBSOLETE.items() if name in os.environ]
