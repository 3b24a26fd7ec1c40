"""vLLM's /generate, both ways of streaming; and a server that is busy, as each format says it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import httpx
import pytest
from format_cases import NUM_LONG, PARTS, QUESTION, leave_midway
from serve_cases import Server, serve_config, served

from mmdist.config import UserError
from mmdist.shipped import SHIPPED
from mmdist.task_config import ServerConfig

GREEDY: dict[str, Any] = {"prompt": QUESTION, "temperature": 0}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def small() -> Iterator[httpx.Client]:
    """Of a server with one place, no queue, and MindIE's way to stream."""
    config = serve_config(SHIPPED / "assets" / "llava-shapes", "llava", max_queue=0, vllm_stream="nul_delta")
    config = replace(config, engine=replace(config.engine, max_num_seqs=1))
    with served(config) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def test_prompt_and_answer_are_one_text(client: httpx.Client, offline: dict[str, Any]) -> None:
    answer = client.post("/generate", json=GREEDY)
    assert answer.json() == {"text": [QUESTION + offline["text"]["text"]]}
    answer = client.post("/generate", json={"prompt": PARTS, "temperature": 0})
    assert answer.json() == {"text": [QUESTION + offline["chat"]["text"]]}


def test_lines_of_everything_so_far(client: httpx.Client) -> None:
    asked = {**GREEDY, "temperature": 0.8, "seed": 5, "n": 2, "max_tokens": 4, "ignore_eos": True, "min_p": 0.01}
    whole = client.post("/generate", json=asked).json()["text"]
    streamed = client.post("/generate", json={**asked, "stream": True})
    assert streamed.text.endswith("\n")
    lines = [json.loads(line)["text"] for line in streamed.text.splitlines()]
    assert len(lines) == 8 and lines[-1] == whole
    for before, after in pairwise(lines):
        assert all(new.startswith(old) for old, new in zip(before, after, strict=True))


def test_chunks_of_what_is_new(small: httpx.Client) -> None:
    asked = {**GREEDY, "max_tokens": 4, "ignore_eos": True}
    (whole,) = small.post("/generate", json=asked).json()["text"]
    streamed = small.post("/generate", json={**asked, "stream": True})
    *chunks, rest = streamed.text.split("\0")
    texts = [json.loads(chunk)["text"] for chunk in chunks]
    assert rest == "" and len(texts) == 4 and all(len(text) == 1 for text in texts)
    assert QUESTION + "".join(text[0] for text in texts) == whole


def test_stop_words(client: httpx.Client, offline: dict[str, Any]) -> None:
    words = offline["chat"]["text"].split()
    asked = {"prompt": PARTS, "temperature": 0, "stop": words[-1]}
    (text,) = client.post("/generate", json=asked).json()["text"]
    assert text.rstrip() == f"{QUESTION}{offline['chat']['text'].removesuffix(words[-1])}".rstrip()
    (text,) = client.post("/generate", json={**asked, "include_stop_str_in_output": True}).json()["text"]
    assert text == QUESTION + offline["chat"]["text"]


def test_structured_outputs(endless: httpx.Client) -> None:
    asked = {**GREEDY, "structured_outputs": {"regex": "(green|blue) square"}}
    (text,) = endless.post("/generate", json=asked).json()["text"]
    assert text in (f"{QUESTION}green square", f"{QUESTION}blue square")


def test_a_client_that_leaves_is_forgotten(server: Server, client: httpx.Client) -> None:
    leave_midway(client, "/generate", {**GREEDY, "max_tokens": NUM_LONG, "ignore_eos": True, "stream": True})
    assert server.wait_for_metric("num_requests_running", 0)


def test_a_busy_server_says_so_in_every_format(small: httpx.Client) -> None:
    running = {**GREEDY, "max_tokens": NUM_LONG, "ignore_eos": True, "stream": True}
    with small.stream("POST", "/generate", json=running) as stream:
        chunks = stream.iter_bytes()  # held: without it the stream would end
        next(chunks)
        found = {
            path: small.post(path, json=body)
            for path, body in {
                "/generate": {"inputs": QUESTION},
                "/infer": {"inputs": QUESTION},
                "/v2/models/llava/generate": {"text_input": QUESTION},
            }.items()
        }
        found["vllm"] = small.post("/generate", json=GREEDY)
        states = {name: small.get(f"/v2/health/{name}").status_code for name in ("live", "ready")}
        ready = small.get("/v2/models/llava/ready").status_code
        slots = small.get("/v2/models/llava/getSlotCount").json()
    assert {path: answer.status_code for path, answer in found.items()} == dict.fromkeys(found, 429)
    assert all(answer.headers["retry-after"] == "1" for answer in found.values())
    assert found["/generate"].json()["error_type"] == "overloaded"
    assert found["/infer"].json()["error_type"] == found["vllm"].json()["error_type"] == "validation"
    assert found["/v2/models/llava/generate"].json().keys() == {"error"}
    assert states == {"live": 200, "ready": 503} and ready == 503
    assert slots == {"total_slots": 1, "free_slots": 0}


def test_vllm_stream_is_checked() -> None:
    with pytest.raises(UserError, match=r"server\.vllm_stream=sse"):
        ServerConfig(vllm_stream="sse")
