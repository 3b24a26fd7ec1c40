"""What the tests of the formats beside OpenAI's share: questions, and what task=generate answers to them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from conftest import CPU, Case
from serve_cases import SQUARE, data_url, serve_config, served

from mmdist.config import ModelConfig
from mmdist.engine.load import load_engine
from mmdist.shipped import SHIPPED
from mmdist.task_config import GenerateConfig
from mmdist.tasks import generate
from mmdist.tp import TP

QUESTION = "What shape is it?"
RAW = f"[INST] <image>\n{QUESTION} [/INST]"
FIRST, SECOND = "green circle", "</s>[INST] What color is it? [/INST]"  # the answer to RAW, and what follows it
MARKDOWN = RAW.replace("<image>", f"![]({data_url(SQUARE)})")
PARTS = [{"type": "image_url", "image_url": {"url": data_url(SQUARE)}}, {"type": "text", "text": QUESTION}]
LONG = [17]  # a prompt to which the demo model answers until it is stopped
NUM_LONG = 400


@pytest.fixture(scope="session")
def endless() -> Iterator[httpx.Client]:
    """Of a server whose model, of random weights, does not come to an end by itself, and spells any word."""
    config = serve_config(Case("llava_next_mistral"), "llava_next")
    with served(config) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def offline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Lines of task=generate, on one rank: chat (PARTS), raw (RAW), second (a turn later), text (without a picture)."""
    folder = tmp_path_factory.mktemp("offline")
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    entries = [
        {"id": "chat", "messages": [message], "images": [str(SQUARE)]},
        {"id": "raw", "prompt": RAW, "images": [str(SQUARE)]},
        {"id": "second", "prompt": RAW + FIRST + SECOND, "images": [str(SQUARE)]},
        {"id": "text", "prompt": QUESTION},
    ]
    (folder / "in.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    config = GenerateConfig(
        task="generate",
        checkpoint=str(SHIPPED / "assets" / "llava_next-shapes"),
        model=ModelConfig(name="llava_next"),
        dtype="float32",
        max_new_tokens=20,
        input=str(folder / "in.jsonl"),
        output=str(folder / "out.jsonl"),
    )
    assert generate.run(config, load_engine(config, TP(), CPU)) == 0
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    found = {line["id"]: line for line in lines}
    assert found["raw"]["text"] == FIRST
    return found


def wait_for_requests(client: httpx.Client, count: int) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        lines = client.get("/metrics").text.splitlines()
        found = [float(line.split()[-1]) for line in lines if line.startswith("mmdist:num_requests_")]
        if sum(found) == count:
            return
    raise AssertionError(f"{found} requests, expected {count}")


def sse_events(text: str, start: str) -> list[Any]:
    """The JSON of each event; every event is one line of `start`, then JSON, and an empty line."""
    *lines, rest = text.split("\n\n")
    assert rest == "" and all(line.startswith(f"{start}{{") for line in lines), text
    return [json.loads(line.removeprefix(start)) for line in lines]


def replaced(body: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """A copy with the field at a.b set to `value`."""
    copied = json.loads(json.dumps(body))
    *parents, last = place.split(".")
    inner = copied
    for name in parents:
        inner = inner.setdefault(name, {})
    inner[last] = value
    return copied


def leave_midway(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    """Read the beginning of a stream, and close the connection."""
    with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        assert next(response.iter_bytes())
