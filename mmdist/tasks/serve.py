"""task=serve: requests over HTTP. The engine steps in rank 0's main thread, the HTTP server in another."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

from mmdist.config import UserError
from mmdist.engine.load import AnyEngine
from mmdist.engine.loop import EngineLoop
from mmdist.task_config import ServeConfig

if HAS_FASTAPI := find_spec("fastapi") is not None and find_spec("uvicorn") is not None:
    from mmdist.serving.access import init_access_log
    from mmdist.serving.app import create_app
    from mmdist.serving.http import HttpThread, listen
    from mmdist.serving.metrics import Metrics
    from mmdist.serving.peers import PeerWatch, exchange_pids
    from mmdist.serving.service import Service

ON_RANKS = True
ENDS_ITSELF = True  # SIGTERM is rank 0's to answer
API_KEYS = "MMDIST_API_KEYS"
SWITCH_S = 2e-4  # Python's own 5 ms would let the engine's thread hold up every single write to a client
FAREWELL_S = 2  # that clients get to hear of a failure
log = logging.getLogger("mmdist.serve")


def check(config: ServeConfig) -> None:
    if not HAS_FASTAPI:
        raise UserError("task=serve takes FastAPI and uvicorn: pip install 'mmdist[serve]'")
    server = config.server
    read_api_keys(server.api_key_file)
    for name in ("ssl_certfile", "ssl_keyfile"):
        path = getattr(server, name)
        if path is not None and not Path(path).is_file():
            raise UserError(f"server.{name}={path}: no such file")
    if server.allowed_media_path is not None and not Path(server.allowed_media_path).is_dir():
        raise UserError(f"server.allowed_media_path={server.allowed_media_path}: no such folder")
    if "RANK" not in os.environ:
        listen(server).close()


def read_api_keys(file: str | None) -> list[str]:
    """Those of MMDIST_API_KEYS and of the file; they are in no config."""
    keys = os.environ.get(API_KEYS, "").split(",")
    if file is not None:
        try:
            keys += Path(file).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"server.api_key_file={file}: cannot be read ({error})") from error
    keys = [key.strip() for key in keys if key.strip()]
    if file is not None and not keys:
        raise UserError(f"server.api_key_file={file}: no key in it; one a line")
    return keys


def run(config: ServeConfig, engine: AnyEngine) -> int:
    metrics = Metrics(engine, config.server.model_name or config.model.name)
    engine_loop = EngineLoop(engine, lambda outputs: service.deliver(outputs))
    service = Service(engine_loop, engine.prompts, config, metrics)
    watch = PeerWatch(exchange_pids(engine.tp.size), lambda problem: give_up(service, problem))
    init_access_log()
    listener = listen(config.server)
    http = HttpThread(create_app(service, read_api_keys(config.server.api_key_file)), listener, config.server)
    sys.setswitchinterval(SWITCH_S)
    http.start()
    scheme = "https" if config.server.ssl_certfile else "http"
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if restarts:
        log.warning("the ranks were started again: restart %d of %d", restarts, config.launcher.max_restarts)
    log.info("%s answers at %s://%s:%d", service.model_name, scheme, config.server.host, listener.getsockname()[1])
    stop = GracefulStop(service, config.server.shutdown_timeout)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop)
    try:
        engine_loop.run()
    except Exception as error:
        service.fail(f"the engine has failed: {error}")
        wait_until_idle(service, FAREWELL_S)
        raise
    finally:
        watch.close()
        http.close()
    if service.problem is not None:
        raise RuntimeError(service.problem)
    return 0


def give_up(service: Service, problem: str) -> None:
    """From any thread: tell all clients, then end the engine's loop."""
    log.error("%s: running requests end with this error", problem)
    service.fail(problem)
    wait_until_idle(service, FAREWELL_S)
    service.engine_loop.stop()


def follow(config: ServeConfig, engine: AnyEngine) -> int:
    """The other ranks' part. Rank 0 answers SIGTERM for all of them; our agent spares them, torchrun does not."""
    if "MMDIST_AGENT" not in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    exchange_pids(engine.tp.size)
    return engine.follow()


class GracefulStop:
    """A signal handler: no new requests, running ones finish, then the engine stops; a second signal stops at once."""

    def __init__(self, service: Service, timeout_s: float):
        self.service, self.timeout_s = service, timeout_s
        self.signals = 0

    def __call__(self, signum: int, frame: object) -> None:
        self.signals += 1
        self.service.stopping = True
        if self.signals == 1:
            threading.Thread(target=self._finish, name="stop", daemon=True).start()
        else:
            self.service.engine_loop.stop()

    def _finish(self) -> None:
        log.info("stopping: %d requests have %g s to finish", self.service.num_active, self.timeout_s)
        wait_until_idle(self.service, self.timeout_s)
        self.service.end_all("the server is stopping")
        self.service.engine_loop.stop()


def wait_until_idle(service: Service, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while service.num_active and time.monotonic() < deadline:
        time.sleep(0.02)
