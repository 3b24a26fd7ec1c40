"""What the tests of task=serve share: servers as a user starts them, one a session, and pictures to send."""

from __future__ import annotations

import base64
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import CPU, Case, config_for, run_ranks

from mmdist.engine.load import load_engine
from mmdist.engine.loop import EngineLoop
from mmdist.serving.app import create_app
from mmdist.serving.http import HttpThread, listen
from mmdist.serving.metrics import Metrics
from mmdist.serving.service import Service
from mmdist.task_config import ServeConfig, ServerConfig
from mmdist.tp import TP

REPOSITORY = Path(__file__).parents[1]
STARTS_S = 120
PICTURES = REPOSITORY / "assets" / "pictures"
SQUARE = PICTURES / "shapes_square.png"


@dataclass
class Server:
    """process: launch.py; log: what it writes to stderr. url: http://HOST:PORT"""

    process: subprocess.Popen
    log: Path
    url: str
    words: tuple[str, ...]

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def metric(self, name: str) -> float:
        """The value of mmdist:NAME at /metrics."""
        text = httpx.get(f"{self.url}/metrics").text
        (value,) = re.findall(rf"^mmdist:{name}(?:{{.*?}})? (\S+)$", text, re.MULTILINE)
        return float(value)

    def wait_for_metric(self, name: str, value: float, seconds: float = 20) -> bool:
        end = time.monotonic() + seconds
        while (found := self.metric(name)) != value and time.monotonic() < end:
            time.sleep(0.05)
        return found == value


@contextmanager
def running_server(folder: Path, *words: str, **env: str) -> Iterator[Server]:
    """python launch.py task=serve server.port=0 WORDS, from when it answers until SIGTERM has ended it."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "stderr.txt"
    command = [sys.executable, str(REPOSITORY / "launch.py"), "task=serve", "server.port=0", *words]
    with log.open("w") as stderr, (folder / "stdout.txt").open("w") as stdout:
        process = subprocess.Popen(command, cwd=folder, stdout=stdout, stderr=stderr, env={**os.environ, **env})
    try:
        yield Server(process, log, wait_for_address(process, log), words)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


@contextmanager
def served(config: ServeConfig, size: int = 1) -> Iterator[str]:
    """The same in this process, with ranks as threads; its address."""
    ready: queue.Queue[tuple[str, EngineLoop]] = queue.Queue()

    def rank_work(tp: TP) -> None:
        engine = load_engine(config, tp, CPU)
        if tp.rank > 0:
            engine.follow()
            return
        engine_loop = EngineLoop(engine, lambda outputs: service.deliver(outputs))
        service = Service(engine_loop, engine.prompts, config, Metrics(engine, config.model.name))
        listener = listen(config.server)
        http = HttpThread(create_app(service, []), listener, config.server)
        http.start()
        ready.put((f"http://127.0.0.1:{listener.getsockname()[1]}", engine_loop))
        engine_loop.run()
        http.close()
        engine.stop()

    thread = threading.Thread(target=run_ranks, args=(size, rank_work), daemon=True)
    thread.start()
    url, engine_loop = ready.get(timeout=60)
    try:
        yield url
    finally:
        engine_loop.stop()
        thread.join(60)


def serve_config(checkpoint: Path | Case, model: str, **server: Any) -> ServeConfig:
    plain = vars(config_for(checkpoint, model=model))
    return ServeConfig(**plain, server=ServerConfig(port=0, **server))


def wait_for_address(process: subprocess.Popen, log: Path) -> str:
    end = time.monotonic() + STARTS_S
    while time.monotonic() < end and process.poll() is None:
        found = re.search(r"answers at (https?://\S+)", log.read_text())
        if found:
            return found[1]
        time.sleep(0.05)
    raise AssertionError(f"the server did not start:\n{log.read_text()}")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """LLaVA-NeXT on two ranks."""
    folder = tmp_path_factory.mktemp("server")
    with running_server(folder, "model=llava_next", "world_size=2", "dtype=float32") as started:
        yield started
    assert started.process.returncode == 0, started.log.read_text()


@pytest.fixture(scope="session")
def llava_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """LLaVA-1.5 on one."""
    folder = tmp_path_factory.mktemp("llava_server")
    with running_server(folder, "model=llava", "world_size=1", "dtype=float32") as started:
        yield started
    assert started.process.returncode == 0, started.log.read_text()


def base64_of(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64_of(path)}"


def picture_message(text: str, *paths: Path) -> dict[str, Any]:
    """A user's message in OpenAI's format."""
    pictures = [{"type": "image_url", "image_url": {"url": data_url(path)}} for path in paths]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}
