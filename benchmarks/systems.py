"""The systems that vs_peers.py compares: how each is started, and what it can do."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Any

from random_checkpoint import REPOSITORY
from worker import Worker

WORKERS = REPOSITORY / "benchmarks" / "peers"
LOGS = REPOSITORY / "build" / "peers"
TCMALLOC = "/usr/lib/*/libtcmalloc_minimal.so.4"
NOT_INHERITED = ("OMP_", "GOMP_", "KMP_", "PYTHONPATH", "LD_PRELOAD")


@dataclass(frozen=True)
class Peer:
    """pairs: (our kind of weights, the peer's) that are compared."""

    pairs: tuple[tuple[str, str], ...] = (("bf16", "bf16"),)
    takes_pictures: bool = True


PEERS = {
    "transformers": Peer(),
    "vllm": Peer(),
    "llamacpp": Peer((("bf16", "bf16"), ("w8a16", "q8_0"), ("w4a16", "q4_0")), takes_pictures=False),
    "mmdist": Peer((("bf16", "bf16"), ("w8a16", "w8a16"))),
}


@dataclass
class System:
    """kind: of its weights. Its worker is started by the first question."""

    kind: str
    command: list[str]
    environment: dict[str, str]
    log: Path

    @cached_property
    def worker(self) -> Worker:
        return self.start()

    def start(self) -> Worker:
        return Worker(self.command, self.environment, self.log)

    def ask(self, **request: Any) -> dict[str, Any]:
        return self.worker.ask(**request)

    def close(self) -> None:
        if "worker" in self.__dict__:
            self.worker.close()


def our_system(kind: str, checkpoint: Path, ranks: int, threads: int, overrides: list[str]) -> System:
    """threads: of each rank. overrides: more of launch.py's keys."""
    keys = {
        "model": "llava_next", "checkpoint": checkpoint, "quant": "none" if kind == "bf16" else kind,
        "world_size": ranks, "hardware.threads_per_rank": threads,
        "engine.max_num_seqs": 10, "engine.max_model_len": 4096,
    }  # fmt: skip
    arguments = [f"{key}={value}" for key, value in keys.items()]
    environment = {"PYTHONPATH": str(REPOSITORY)}
    return build_system(f"mmdist-{ranks}", "mmdist", kind, sys.executable, [*arguments, *overrides], environment)


def peer_system(name: str, kind: str, checkpoint: Path, python: str, threads: int) -> System:
    if name == "mmdist":
        return our_system(kind, checkpoint, ranks=threads, threads=1, overrides=[])
    source = f"file={find_gguf(checkpoint, kind, python)}" if name == "llamacpp" else f"checkpoint={checkpoint}"
    environment = {"LD_PRELOAD": ":".join(vllm_libraries(python))} if name == "vllm" else {}
    return build_system(name, name, kind, python, [source, f"threads={threads}"], environment)


def build_system(
    log: str, worker: str, kind: str, python: str, arguments: list[str], environment: dict[str, str]
) -> System:
    """Each system has its own defaults for threads that wait: ours must not inherit a caller's, nor must theirs."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(NOT_INHERITED)}
    command = [python, str(WORKERS / f"{worker}_worker.py"), *arguments]
    return System(kind, command, inherited | environment, LOGS / f"{log}-{kind}.log")


def find_gguf(checkpoint: Path, kind: str, python: str) -> Path:
    """Beside the checkpoint, written when it is not there."""
    file = checkpoint.with_name(f"{checkpoint.name}-{kind}.gguf")
    if not file.exists():
        subprocess.run([python, str(WORKERS / "write_gguf.py"), str(checkpoint), str(file), kind], check=True)
    return file


def vllm_libraries(python: str) -> list[str]:
    """What vLLM's manual says to preload on a CPU, as far as it is installed: Intel's OpenMP and tcmalloc."""
    return [*glob(str(Path(python).parents[1] / "lib" / "libiomp5.so")), *glob(TCMALLOC)]
