"""A system under measurement: its own process, stopped dead whenever it is not asked anything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

STOP_S = 20


class Worker:
    """Starts a command that speaks peers/serve.py's protocol; what it prints beside that goes to `log`.

    Between questions all its processes are stopped by SIGSTOP: threads that spin while they wait would take the cores
    from whoever is measured.
    """

    def __init__(self, command: list[str], environment: dict[str, str], log: Path):
        self.log, self.started = log, time.perf_counter()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as stderr:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
            )

    def ask(self, **request: Any) -> dict[str, Any]:
        """{"seconds", "tokens"} of a generate or picture command."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.process.args} ended; the last of {self.log}:\n{self.log.read_text()[-2000:]}")
        self.signal(signal.SIGSTOP)
        return json.loads(answer)

    def age(self) -> float:
        """Seconds since the process was started."""
        return time.perf_counter() - self.started

    def signal(self, number: signal.Signals) -> None:
        for pid in family(self.process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def close(self) -> None:
        assert self.process.stdin is not None
        processes = family(self.process.pid)
        self.signal(signal.SIGCONT)
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_S)
        for pid in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def family(pid: int) -> list[int]:
    """A process and all that descend from it (Linux)."""
    found = [pid]
    for parent in found:  # grows while it is walked
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            with suppress(OSError):
                found += [int(child) for child in children.read_text().split()]
    return found
