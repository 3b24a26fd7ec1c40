"""Operations of task=serve, seen from outside: keys, limits, probes, a graceful stop, a rank that dies under load."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve_cases import Server, running_server

from mmdist.config import UserError
from mmdist.task_config import ServeConfig, ServerConfig
from mmdist.tasks.serve import check, read_api_keys

KEY = "correct horse"
CHAT = "/v1/chat/completions"


def question(max_tokens: int, **more: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "Count, please."}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        **more,
    }


class Stream(threading.Thread):
    """A streamed question; lines: what came, status: 0 until there is one."""

    def __init__(self, server: Server, body: dict[str, Any], headers: dict[str, str] | None = None):
        super().__init__(daemon=True)
        self.server, self.body, self.headers = server, {**body, "stream": True}, headers or {}
        self.lines: list[str] = []
        self.status, self.ended = 0, 0.0
        self.start()

    def run(self) -> None:
        with self.server.client(headers=self.headers, verify=False) as client:
            try:
                with client.stream("POST", CHAT, json=self.body) as response:
                    self.status = response.status_code
                    self.lines.extend(line for line in response.iter_lines() if line)
            except httpx.HTTPError as error:
                self.lines.append(repr(error))
        self.ended = time.monotonic()

    def wait_until_answering(self) -> None:
        end = time.monotonic() + 60
        while self.status == 0 and time.monotonic() < end:
            time.sleep(0.01)
        assert self.status == 200, self.lines


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One place and no queue, a key, TLS, and little patience."""
    folder = tmp_path_factory.mktemp("strict")
    (folder / "keys").write_text(f"another\n{KEY}\n")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run(
        [*command, "-keyout", folder / "key.pem", "-out", folder / "cert.pem"], check=True, capture_output=True
    )
    words = {
        "server.api_key_file": folder / "keys",
        "server.ssl_certfile": folder / "cert.pem",
        "server.ssl_keyfile": folder / "key.pem",
        "server.max_queue": 0,
        "server.max_body_mb": 0.5,
        "server.body_timeout_s": 1,
        "server.request_timeout_s": 3,
        "server.cors_origins": "[https://page.example]",
        "engine.max_num_seqs": 1,
        "launcher.max_restarts": 1,
    }
    arguments = [f"{name}={value}" for name, value in words.items()]
    with running_server(folder, "model=llava", "world_size=1", *arguments) as server:
        yield server
    assert server.process.returncode == 0, server.log.read_text()


@pytest.fixture()
def client(strict: Server) -> Iterator[httpx.Client]:
    with strict.client(verify=False, headers={"Authorization": f"Bearer {KEY}"}) as client:
        yield client


def test_a_key_is_asked_for_except_by_probes(strict: Server, client: httpx.Client) -> None:
    with strict.client(verify=False) as stranger:
        for path in ("/health", "/health/live", "/health/ready", "/metrics"):
            assert stranger.get(path).status_code == 200, path
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"X-Api-Key": f"{KEY}s"}):
            refused = stranger.post(CHAT, json=question(1), headers=headers)
            assert refused.status_code == 401
            assert "Authorization: Bearer" in refused.json()["error"]["message"]
    assert client.post(CHAT, json=question(1)).status_code == 200


def test_keys_are_in_no_file_of_the_job(strict: Server) -> None:
    for path in strict.log.parent.rglob("*"):
        if path.is_file() and path.name != "keys":
            assert KEY not in path.read_text(errors="replace"), path


def test_an_oversized_body_is_refused_before_it_is_read(strict: Server, client: httpx.Client) -> None:
    large = client.post(CHAT, content=b"x" * 600_000)
    assert large.status_code == 413 and "server.max_body_mb" in large.json()["error"]["message"]
    chunked = client.post(CHAT, content=(b"x" * 100_000 for _ in range(6)))
    assert chunked.status_code == 413
    with tls_connection(strict) as announced:
        announced.sendall(request_head(200 * 10**6))
        assert b" 413 " in announced.recv(4096)


@contextmanager
def tls_connection(server: Server) -> Iterator[ssl.SSLSocket]:
    url = httpx.URL(server.url)
    context = ssl._create_unverified_context()
    with socket.create_connection((url.host, url.port), timeout=10) as plain, context.wrap_socket(plain) as wrapped:
        yield wrapped


def request_head(length: int) -> bytes:
    lines = [f"POST {CHAT} HTTP/1.1", "Host: a", f"Authorization: Bearer {KEY}", f"Content-Length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


def test_slow_clients_are_sent_away(strict: Server, client: httpx.Client) -> None:
    with tls_connection(strict) as slow:
        slow.sendall(request_head(100) + b"{")  # the body never ends
        assert b" 408 " in slow.recv(4096)
    with tls_connection(strict) as slow:
        slow.sendall(b"POST / HTTP/1.1\r\nHost:")  # nor do these headers
        assert slow.recv(4096) == b""
    assert client.get("/health").status_code == 200


def test_one_request_too_many_is_told_when_to_come_again(strict: Server, client: httpx.Client) -> None:
    running = Stream(strict, question(400), {"Authorization": f"Bearer {KEY}"})
    running.wait_until_answering()
    refused = client.post(CHAT, json=question(1))
    assert refused.status_code == 429 and refused.headers["Retry-After"] == "1"
    assert client.get("/health/ready").status_code == 503
    assert client.get("/health").status_code == 200
    running.join(60)


def test_a_request_that_takes_too_long_is_ended(strict: Server, client: httpx.Client) -> None:
    rank = find_rank(strict, 0)
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(client.post, CHAT, json=question(400))
        time.sleep(0.2)
        os.kill(rank, signal.SIGSTOP)
        time.sleep(3.2)
        os.kill(rank, signal.SIGCONT)
        response = late.result(30)
    assert response.status_code == 504 and "3 s" in response.json()["error"]["message"]
    assert client.post(CHAT, json=question(1)).status_code == 200


def test_request_ids_and_the_access_log(strict: Server, client: httpx.Client) -> None:
    assert client.get("/health/live", headers={"X-Request-Id": "mine-1"}).headers["X-Request-Id"] == "mine-1"
    given = client.get("/health/live", headers={"X-Request-Id": "no\tthanks"}).headers["X-Request-Id"]
    assert given != "no\tthanks" and len(given) == 32
    lines = [json.loads(line) for line in (strict.log.parent / "stdout.txt").read_text().splitlines()]
    (mine,) = [line for line in lines if line["request_id"] == "mine-1"]
    assert (mine["method"], mine["path"], mine["status"]) == ("GET", "/health/live", 200)


def test_only_named_origins_may_ask(client: httpx.Client) -> None:
    allowed = client.get("/health", headers={"Origin": "https://page.example"})
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    other = client.get("/health", headers={"Origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers


def test_a_probe_generates_a_token(strict: Server, client: httpx.Client) -> None:
    before = token_count(client)
    assert client.get("/health", params={"probe": "true"}).status_code == 200
    assert token_count(client) == before + 1


def token_count(client: httpx.Client) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith("mmdist:generation_tokens_total")).split()[-1])


def test_unknown_paths_and_methods(client: httpx.Client) -> None:
    assert client.get("/nothing/here").status_code == 404
    assert client.get(CHAT).status_code == 405


def test_a_killed_rank_is_told_to_the_clients_and_started_again(tmp_path: Path) -> None:
    with running_server(tmp_path, "model=llava", "world_size=2", "launcher.max_restarts=1") as server:
        running = Stream(server, question(2000) | {"max_tokens": None})
        running.wait_until_answering()
        killed = time.monotonic()
        os.kill(find_rank(server, 1), signal.SIGKILL)
        assert is_unhealthy_within(server, 2)
        running.join(30)
        assert running.ended - killed < 10
        assert "rank 1 has died" in " ".join(running.lines), running.lines[-3:]
        again = wait_for_second_start(server)
        with httpx.Client(base_url=again, timeout=60) as client:
            assert client.post(CHAT, json=question(4)).status_code == 200
        os.kill(find_rank(server, 1), signal.SIGKILL)
        assert server.process.wait(30) == 1
        assert "rank 1 was killed by SIGKILL" in server.log.read_text()


def is_unhealthy_within(server: Server, seconds: float) -> bool:
    """GET /health says no, or there is nobody left to ask."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if httpx.get(f"{server.url}/health", timeout=end - time.monotonic() + 0.1).status_code != 200:
                return True
        except httpx.HTTPError:
            return True
    return False


def find_rank(server: Server, rank: int) -> int:
    """The process id of a rank, by its environment."""
    found = subprocess.run(["pgrep", "-P", str(server.process.pid)], capture_output=True, text=True, check=True)
    for pid in map(int, found.stdout.split()):
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return pid
    raise AssertionError(f"no rank {rank} among {found.stdout.split()}")


def wait_for_second_start(server: Server) -> str:
    end = time.monotonic() + 90
    while server.log.read_text().count("answers at") < 2 and time.monotonic() < end:
        time.sleep(0.1)
    text = server.log.read_text()
    assert "restart 1 of 1" in text, text
    rest = text.rpartition("answers at ")[2]
    return rest.split()[0]


def test_sigterm_lets_running_answers_finish(tmp_path: Path) -> None:
    with running_server(tmp_path, "model=llava", "world_size=2") as server:
        running = Stream(server, question(300))
        running.wait_until_answering()
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with server.client() as client:
            refused = client.post(CHAT, json=question(1))
            assert refused.status_code == 503 and "stopping" in refused.json()["error"]["message"]
            assert client.get("/health").status_code == 503
        running.join(60)
        assert running.lines[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in "".join(running.lines).replace(" ", "")
        assert server.process.wait(30) == 0


def test_settings_are_checked_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UserError, match="no key in it"):
        read_api_keys(str(tmp_path / "empty"))
    monkeypatch.setenv("MMDIST_API_KEYS", "a, b,")
    assert read_api_keys(None) == ["a", "b"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"server.port={port}: cannot listen there"):
            check(ServeConfig(server=ServerConfig(port=port)))
    with pytest.raises(UserError, match="no such file"):
        check(ServeConfig(server=ServerConfig(port=0, ssl_certfile="none.pem", ssl_keyfile="none.pem")))
    with pytest.raises(UserError, match=r"server\.ssl_keyfile"):
        ServerConfig(ssl_certfile="a.pem")
    with pytest.raises(UserError, match=r"server\.port"):
        ServerConfig(port=70_000)
