"""MindIE's native format, and what each format beside OpenAI's says to every field that is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from format_cases import LONG, NUM_LONG, PARTS, QUESTION, leave_midway, sse_events
from serve_cases import Server

PARAMETERS = {
    "temperature": 0.5,
    "top_k": 10,
    "top_p": 0.95,
    "typical_p": 0.9,
    "do_sample": True,
    "seed": 1,
    "repetition_penalty": 1.03,
    "watermark": True,
    "priority": 5,
    "max_new_tokens": 20,
    "timeout": 600,
    "details": True,
}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def test_texts_and_parts(client: httpx.Client, offline: dict[str, Any]) -> None:
    for inputs, name in ((PARTS, "chat"), (QUESTION, "text")):
        answer = client.post("/infer", json={"inputs": inputs, "parameters": {"details": True}}).json()
        assert answer == {
            "generated_text": offline[name]["text"],
            "details": {
                "finish_reason": "eos_token",
                "generated_tokens": len(offline[name]["token_ids"]),
                "generated_token_ids": offline[name]["token_ids"],
                "seed": None,
            },
        }
    assert client.post("/infer", json={"inputs": QUESTION}).json() == {"generated_text": offline["text"]["text"]}


def test_tokens(client: httpx.Client, offline: dict[str, Any]) -> None:
    body = {"input_id": offline["text"]["prompt_token_ids"], "parameters": {"details": True}}
    for path in ("/infer", "/infer_token"):
        answer = client.post(path, json=body).json()
        assert answer["details"]["generated_token_ids"] == offline["text"]["token_ids"]


def test_sampling_is_repeated_with_its_seed(client: httpx.Client) -> None:
    """MindIE's own example; do_sample=false is greedy whatever else is given."""
    body = {"inputs": QUESTION, "stream": False, "parameters": PARAMETERS}
    first, second = (client.post("/infer", json=body).json() for _ in range(2))
    assert first == second and first["details"]["seed"] == 1
    drawn = client.post("/infer", json={"inputs": QUESTION, "parameters": {"details": True, "temperature": 0.5}})
    assert drawn.json()["details"]["seed"] is not None
    greedy = client.post("/infer", json={"inputs": QUESTION, "parameters": {**PARAMETERS, "do_sample": False}})
    assert greedy.json()["details"]["seed"] == 1 or greedy.json()["details"]["seed"] is None


def test_a_stream(client: httpx.Client, offline: dict[str, Any]) -> None:
    streamed = client.post("/infer", json={"inputs": PARTS, "stream": True, "parameters": {"details": True}})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = sse_events(streamed.text, "data: ")
    assert [event["token"]["id"] for event in events] == [[token_id] for token_id in offline["chat"]["token_ids"]]
    assert events[0]["prefill_time"] > 0 and events[0]["decode_time"] is None
    assert all(event["prefill_time"] is None and event["decode_time"] > 0 for event in events[1:])
    assert all("generated_text" not in event for event in events[:-1])
    assert events[-1]["token"]["text"] is None and events[-1]["generated_text"] == offline["chat"]["text"]
    assert events[-1]["details"]["generated_token_ids"] == offline["chat"]["token_ids"]


def test_tokens_are_counted(client: httpx.Client, offline: dict[str, Any]) -> None:
    counted = client.post("/v1/tokenizer", json={"inputs": QUESTION}).json()
    assert counted["token_number"] == len(offline["text"]["prompt_token_ids"])
    assert len(counted["tokens"]) == counted["token_number"] and counted["tokens"][0] == "<s>"
    with_picture = client.post("/v1/tokenizer", json={"inputs": PARTS}).json()
    assert with_picture["token_number"] == len(offline["chat"]["prompt_token_ids"])
    long = client.post("/v1/tokenizer", json={"inputs": "a " * 600})
    assert long.status_code == 422 and "601 tokens" in long.json()["error"]


def test_a_client_that_leaves_is_forgotten(server: Server, client: httpx.Client) -> None:
    body = {"input_id": LONG, "stream": True, "parameters": {"max_new_tokens": NUM_LONG}}
    leave_midway(client, "/infer_token", body)
    assert server.wait_for_metric("num_requests_running", 0)
