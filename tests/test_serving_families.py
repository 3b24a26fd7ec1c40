"""The formats beside OpenAI's, asked of families with other placeholders, and of one that answers at once."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from typing import Any

import httpx
import pytest
from conftest import Case
from format_cases import wait_for_requests
from serve_cases import base64_of, data_url, serve_config, served
from vlmo_cases import golden, inputs, plain

from mmdist.shipped import SHIPPED

TOKENS = {"name": "input0", "shape": [1], "datatype": "UINT32", "data": [3]}
FAMILIES = {
    "minigpt4": ("panorama", "<Img><ImageHere></Img>"),
    "llama_adapter_bias": ("bias/panorama", ""),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_and_pictures_in_a_text(name: str) -> None:
    """Parts give the reference's tokens; a Markdown picture is what the family's placeholder is in Triton's text."""
    case, (item, placeholder) = Case(name), FAMILIES[name]
    (picture,) = case.image_paths(item)
    question = case.items[item]["messages"][0]["content"][-1]["text"]
    with served(serve_config(case, case.model)) as url, httpx.Client(base_url=url, timeout=60) as client:
        parts = [{"type": "image_url", "image_url": data_url(picture)}, {"type": "text", "text": question}]
        parameters = {"max_new_tokens": 4, "details": True}
        answer = client.post("/infer", json={"inputs": parts, "parameters": parameters}).json()
        markdown = {"inputs": f"![]({data_url(picture)}) {question}", "parameters": {"max_new_tokens": 4}}
        text = client.post("/generate", json=markdown).json()["generated_text"]
        body = {"text_input": f"{placeholder} {question}", "image": base64_of(picture), "parameters": {"max_tokens": 4}}
        same = client.post(f"/v2/models/{case.model}/generate", json=body).json()["text_output"]
    assert answer["details"]["generated_token_ids"] == case.reference()[f"{item}/greedy_ids"].ravel()[:4].tolist()
    assert text == same


def test_vlmo_answers_in_every_format_and_refuses_what_takes_a_text() -> None:
    question = golden("vlmo_vqa")[0][0]
    picture = inputs("vlmo_vqa") / question["image"]
    parts = [{"type": "image_url", "image_url": data_url(picture)}, {"type": "text", "text": question["question"]}]
    markdown = f"![]({data_url(picture)}){question['question']}"
    refused: tuple[tuple[str, Any, int], ...] = (
        ("/v1/tokenizer", {"inputs": "a"}, 422),
        ("/infer", {"input_id": [1]}, 422),
        ("/infer_token", {"input_id": [1]}, 422),
        ("/generate", {"inputs": parts, "parameters": {"decoder_input_details": True}}, 422),
        ("/generate", {"inputs": parts, "parameters": {"grammar": {"type": "regex", "value": "a"}}}, 422),
        ("/generate", {"prompt": parts, "structured_outputs": {"json_object": True}}, 422),
        ("/generate", {"inputs": parts * 2}, 422),
        (
            "/v2/models/vlmo/infer",
            {"inputs": [{"name": "input0", "shape": [1], "datatype": "UINT32", "data": [3]}]},
            400,
        ),
    )
    config = serve_config(plain("vlmo_vqa"), "vlmo")
    with served(config) as url, httpx.Client(base_url=url, timeout=60) as client:
        whole = client.post("/generate", json={"inputs": parts, "parameters": {"details": True}}).json()
        assert client.post("/generate", json={"inputs": markdown}).json()["generated_text"] == question["answer"]
        (text,) = client.post("/generate", json={"prompt": parts}).json()["text"]
        triton = client.post("/v2/models/vlmo/generate", json={"text_input": parts}).json()
        for path, body, status in refused:
            answer = client.post(path, json=body)
            assert answer.status_code == status and answer.json()["error"], (path, answer.text)
    assert whole["generated_text"] == triton["text_output"] == question["answer"]
    assert text == question["question"] + question["answer"]
    (token,) = whole["details"]["tokens"]
    assert token["text"] == question["answer"] and whole["details"]["finish_reason"] == "eos_token"


def test_urgent_requests_are_begun_first() -> None:
    """One place: while it is taken, two requests queue up, and a third that is urgent."""
    config = serve_config(SHIPPED / "assets" / "llava-shapes", "llava", max_queue=9)
    config = replace(config, engine=replace(config.engine, max_num_seqs=1))
    ended: dict[str, float] = {}

    def ask(client: httpx.Client, name: str, priority: int, max_new_tokens: int) -> None:
        parameters = {"max_new_tokens": max_new_tokens, "priority": priority}
        answer = client.post("/infer_token", json={"input_id": [3, 4, 5, 6, 7], "parameters": parameters})
        ended[name] = time.monotonic() if answer.status_code == 200 else 0.0

    with served(config) as url, httpx.Client(base_url=url, timeout=60) as client:
        threads = []
        for number, (name, *order) in enumerate([("running", 5, 200), ("a", 5, 40), ("b", 4, 40), ("urgent", 1, 40)]):
            threads.append(threading.Thread(target=ask, args=(client, name, *order)))
            threads[-1].start()
            wait_for_requests(client, number + 1)
        for thread in threads:
            thread.join(60)
    assert sorted(ended, key=lambda name: ended[name]) == ["running", "urgent", "b", "a"]


def test_time_is_up_in_every_format() -> None:
    """As an error while nothing has been sent, else as the stream's last event."""
    config = serve_config(Case("llava_next_mistral"), "llava_next", request_timeout_s=0.2)
    parameters = {"max_new_tokens": 450}
    asked: tuple[tuple[str, dict[str, Any], str, tuple[int, str | None]], ...] = (
        ("/generate", {"inputs": "a"}, "/generate_stream", (424, "generation")),
        ("/infer", {"inputs": "a"}, "/infer", (424, "Generation Error")),
        ("/v2/models/llava_next/generate", {"text_input": "a"}, "/v2/models/llava_next/generate_stream", (504, None)),
    )
    with served(config) as url, httpx.Client(base_url=url, timeout=60) as client:
        for path, body, stream_path, (status, kind) in asked:
            body["parameters"] = parameters
            late = client.post(path, json=body)
            assert (late.status_code, late.json().get("error_type")) == (status, kind)
            more = {"stream": True} if path == stream_path else {}
            *_, last = [line for line in client.post(stream_path, json={**body, **more}).iter_lines() if line]
            assert '"error": "not finished in 0.2 s"' in last
        vllm = {"prompt": "a", "max_tokens": 450, "ignore_eos": True}
        assert client.post("/generate", json=vllm).json()["error_type"] == "Generation Error"
        last = client.post("/generate", json={**vllm, "stream": True}).text.splitlines()[-1]
        assert json.loads(last) == {"error": "not finished in 0.2 s", "error_type": "Generation Error"}
