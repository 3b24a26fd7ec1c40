"""Start the ranks of one machine through torch's elastic agent, and say in one piece why they failed."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib.util import find_spec

from torch.distributed.elastic.agent.server.api import WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous import registry as rendezvous

from mmdist.config import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER_ERROR, LauncherConfig, UserError
from mmdist.hccl import BASE_PORT, hccl_environment
from mmdist.ports import lock_ports

log = logging.getLogger("mmdist.launch")
PORTS = range(20030, 20051)
HOST = "127.0.0.1"
LOST_PEER = ("LostPeer", "Connection", "gloo", "HCCL", "Hccl", "EI0002", "EI0006", "EI0019", "EJ0003")
SHUTDOWN_S = 5  # from SIGTERM to SIGKILL for the ranks that are left when one has failed


def run_agent(command: list[str], size: int, config: LauncherConfig, threads: int, *, ends_itself: bool = False) -> int:
    """Run `command` as `size` ranks of `threads` CPU threads; the job's exit code, a failure's cause on stderr.

    ends_itself: SIGTERM is passed on to rank 0, which ends the job; else it ends the ranks.
    """
    port_taken, folder = take_port(config), tempfile.TemporaryDirectory(prefix="mmdist-")
    hccl = hccl_environment(config.timeout_s) if find_spec("torch_npu") else nullcontext(dict[str, str]())
    with port_taken as port, hccl as variables, folder as log_dir, rank_environment(threads, variables, ends_itself):
        hccl_port = f", {BASE_PORT}={variables[BASE_PORT]}" if variables else ""
        log.info("starting %d ranks, MASTER_PORT=%d%s", size, port, hccl_port)
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we report failures ourselves
        agent = build_agent(command, size, port, log_dir, config.max_restarts)
        with forward_interrupts(agent), forward_terminations(agent, ends_itself) as asked:
            try:
                result = agent.run()
            except SignalException as stopped:
                return 128 + int(stopped.sigval)
        if not result.is_failed() or (asked and stopped_early(result.failures)):
            return 0
        return report(result.failures, agent.stopped)


@contextmanager
def rank_environment(threads: int, variables: dict[str, str], ends_itself: bool) -> Iterator[None]:
    """What the ranks inherit beyond the user's own environment, which wins."""
    ours = {
        "MMDIST_AGENT": str(os.getpid()),
        # SIGINT is ours: rank 0 decides what Ctrl-C means (a chat only stops its answer).
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGHUP,SIGQUIT" if ends_itself else "SIGTERM,SIGHUP,SIGQUIT",
        "OMP_NUM_THREADS": str(threads),
        **variables,
    }
    added = {name: value for name, value in ours.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def build_agent(command: list[str], size: int, port: int, log_dir: str, max_restarts: int) -> Agent:
    parameters = RendezvousParameters("static", f"{HOST}:{port}", f"mmdist-{os.getpid()}", 1, 1, rank=0, timeout=60)
    spec = WorkerSpec(
        role="rank",
        local_world_size=size,
        entrypoint=command[0],
        args=tuple(command[1:]),
        rdzv_handler=rendezvous.get_rendezvous_handler(parameters),
        max_restarts=max_restarts,
        monitor_interval=0.1,
        master_addr=HOST,
        master_port=port,
    )
    return Agent(spec, DefaultLogsSpecs(log_dir=log_dir), shutdown_timeout=SHUTDOWN_S)


class Agent(LocalElasticAgent):
    """Remembers whom it stopped, and gives them SHUTDOWN_S when a rank has failed, where torch's own gives 30 s."""

    stopped: frozenset[int] = frozenset()  # process ids

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, int]:
        started, context = super()._start_workers(worker_group), self._pcontext
        assert isinstance(context, SubprocessContext)
        close = context._close

        def stop(death_sig: signal.Signals, timeout: int = SHUTDOWN_S) -> None:
            ranks = [handler.proc for handler in context.subprocess_handlers.values()]
            self.stopped |= {rank.pid for rank in ranks if rank.poll() is None}
            close(death_sig, SHUTDOWN_S)

        context._close = stop  # type: ignore[method-assign]
        return started


@contextmanager
def forward_interrupts(agent: LocalElasticAgent) -> Iterator[None]:
    """Pass Ctrl-C on to the ranks, which live in sessions of their own and do not hear the terminal.

    Pressed three times within two seconds it ends the job, whatever the ranks are doing.
    """
    pressed = [float("-inf")] * 3

    def forward(signum: int, frame: object) -> None:
        pressed.append(time.monotonic())
        if pressed[-1] - pressed[-3] < 2:
            raise KeyboardInterrupt
        for worker in agent.get_worker_group().workers:
            with suppress(ProcessLookupError, TypeError):  # it has ended, or has not begun
                os.kill(worker.id, signum)

    before = signal.signal(signal.SIGINT, forward)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def forward_terminations(agent: LocalElasticAgent, ends_itself: bool) -> Iterator[list[int]]:
    """Pass SIGTERM on to rank 0 alone, which finishes what it has begun and sends the others home; gives a list of the
    signals passed on. Nothing where the job does not end itself."""
    asked: list[int] = []
    if not ends_itself:
        yield asked
        return

    def forward(signum: int, frame: object) -> None:
        asked.append(signum)
        agent._remaining_restarts = 0  # what fails from now on is not started again
        with suppress(ProcessLookupError, TypeError, IndexError):
            os.kill(agent.get_worker_group().workers[0].id, signum)

    before = signal.signal(signal.SIGTERM, forward)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def stopped_early(failures: dict[int, ProcessFailure]) -> bool:
    """Rank 0 was asked to end before it could answer the signal itself."""
    return 0 in failures and failures[0].exitcode == -signal.SIGTERM


def report(failures: dict[int, ProcessFailure], stopped: Collection[int] = ()) -> int:
    """Print the cause: a user's mistake, else a rank killed by a signal, else the first exception.

    stopped: process ids of the ranks that the agent ended.
    """
    rank, failure = min(failures.items(), key=lambda item: order(item[1], item[1].pid in stopped))
    message = failure.message
    if failure.exitcode == -signal.SIGINT:  # Ctrl-C before the rank was ready to hear it
        return EXIT_INTERRUPTED
    if failure.exitcode < 0:
        print(f"error: rank {rank} was killed by {failure.signal_name()} (pid {failure.pid})", file=sys.stderr)
        return EXIT_FAILED
    if isinstance(message, str):  # no error file: the rank chose its exit code and has said why
        return failure.exitcode
    text = message["message"]
    if failure.exitcode == EXIT_USER_ERROR:
        print(f"error: {text.removeprefix('UserError: ')}", file=sys.stderr)
    else:
        print(f"error: rank {rank} failed: {text}\n{message['extraInfo']['py_callstack']}", file=sys.stderr)
    return failure.exitcode


def order(failure: ProcessFailure, stopped: bool) -> tuple:
    """Causes before consequences: a lost connection to a rank that died says nothing of its own, whether gloo, shm or
    HCCL (EI0006 and the like) reports it, nor does a rank that the agent ended by a signal."""
    by_signal = failure.exitcode < 0
    lost_peer = any(word in str(failure.message) for word in LOST_PEER)
    return (
        failure.exitcode != EXIT_USER_ERROR,
        stopped and by_signal,
        not by_signal,
        lost_peer,
        failure.timestamp,
    )


@contextmanager
def take_port(config: LauncherConfig) -> Iterator[int]:
    """launcher.master_port, else MASTER_PORT, else the first of PORTS that no one uses, locked against other jobs."""
    asked = str(config.master_port or os.environ.get("MASTER_PORT", ""))
    if asked and not asked.isdigit():
        raise UserError(f"MASTER_PORT={asked}: expected a port number; unset it, or give launcher.master_port=PORT")
    for port in [int(asked)] if asked else PORTS:
        lock = lock_ports([port])
        if lock is not None:
            with lock:
                yield port
            return
    what = f"port {asked} is" if asked else f"ports {PORTS[0]}-{PORTS[-1]} are all"
    raise UserError(f"{what} in use; choose a free one with launcher.master_port=PORT")
