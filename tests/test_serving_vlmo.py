"""VLMo over HTTP: /v1/vqa, /v1/retrieval, questions through the chat route, and what each checkpoint refuses."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from openai import OpenAI
from serve_cases import Server, data_url, picture_message, serve_config, served
from vlmo_cases import golden, inputs, plain

PICTURE = data_url(inputs("vlmo_vqa") / "panorama.png")


@pytest.fixture(scope="module")
def vqa() -> Iterator[str]:
    with served(serve_config(plain("vlmo_vqa"), "vlmo", max_pictures=9), 2) as url:
        yield url


@pytest.fixture(scope="module")
def retrieval() -> Iterator[str]:
    with served(serve_config(plain("vlmo_retrieval"), "vlmo", max_pictures=9)) as url:
        yield url


def post(url: str, path: str, **body: Any) -> dict[str, Any]:
    response = httpx.post(f"{url}{path}", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def error_of(url: str, path: str, **body: Any) -> tuple[int, str, str | None]:
    response = httpx.post(f"{url}{path}", json=body, timeout=60)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["message"], error["param"]


def test_answers_with_their_scores(vqa: str) -> None:
    items, want = golden("vlmo_vqa")
    answer = post(vqa, "/v1/vqa", question=items[0]["question"], image=PICTURE, top_k=3)
    assert (answer["object"], answer["model"]) == ("vqa", "vlmo")
    (data,) = answer["data"]
    best = np.argsort(-want["vqa_logits"][0])[:3]
    assert [one["label"] for one in data["answers"]] == best.tolist() and data["truncated"] is False
    first = data["answers"][0]
    assert (first["answer"], first["logit"]) == (
        items[0]["answer"],
        pytest.approx(want["vqa_logits"][0, best[0]], abs=1e-4),
    )
    assert first["score"] == pytest.approx(1 / (1 + np.exp(-first["logit"])))


def test_a_batch_of_questions(vqa: str) -> None:
    items, _ = golden("vlmo_vqa")
    questions = [
        {"question": item["question"], "image": {"url": data_url(inputs("vlmo_vqa") / item["image"])}} for item in items
    ]
    answer = post(vqa, "/v1/vqa", inputs=questions, model="vlmo", top_k=1)
    assert [data["answers"][0]["answer"] for data in answer["data"]] == [item["answer"] for item in items]
    assert [data["index"] for data in answer["data"]] == list(range(len(items)))
    assert any(data["truncated"] for data in answer["data"])


def test_the_chat_route(vqa: str) -> None:
    items, _ = golden("vlmo_vqa")
    client = OpenAI(base_url=f"{vqa}/v1", api_key="none", max_retries=0)
    messages: Any = [picture_message(items[0]["question"], inputs("vlmo_vqa") / "panorama.png")]
    whole = client.chat.completions.create(model="vlmo", messages=messages)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (items[0]["answer"], "stop")
    stream = client.chat.completions.create(model="vlmo", messages=messages, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == items[0]["answer"]
    blind = error_of(vqa, "/v1/chat/completions", messages=[{"role": "user", "content": "Where?"}])
    assert blind == (400, "VLMo answers a question about a picture; give both", None)
    turns = [*messages, {"role": "assistant", "content": "there"}, *messages]
    assert error_of(vqa, "/v1/chat/completions", messages=turns)[0] == 400
    assert error_of(vqa, "/v1/chat/completions", messages=messages, logprobs=True)[2] == "logprobs"
    assert error_of(vqa, "/v1/completions", prompt="Where?")[0] == 404


def test_retrieval(retrieval: str) -> None:
    _, want = golden("vlmo_retrieval")
    listed = json.loads((inputs("vlmo_retrieval") / "items.json").read_text())
    images = [data_url(inputs("vlmo_retrieval") / name) for name in listed["images"]]
    texts = [item["caption"] for item in golden("vlmo_retrieval")[0]]
    answer = post(retrieval, "/v1/retrieval", images=images, texts=texts)
    np.testing.assert_allclose(answer["logits_per_image"], want["logits_per_image"], atol=1e-3)


BAD = [
    ({"question": "Where?"}, "image"),
    ({"image": PICTURE}, "question"),
    ({"question": "Where?", "image": PICTURE, "inputs": [{"question": "Where?", "image": PICTURE}]}, "inputs"),
    ({"inputs": []}, "inputs"),
    ({"inputs": [{"question": "Where?", "image": PICTURE}] * 10}, None),
    ({"inputs": [{"question": "Where?"}]}, "inputs.0.image"),
    ({"question": "", "image": PICTURE}, "question"),
    ({"question": 3, "image": PICTURE}, "question"),
    ({"question": "Where?", "image": 3}, "image"),
    ({"question": "Where?", "image": {"url": 3}}, "image.url"),
    ({"question": "Where?", "image": "none"}, None),
    ({"question": "Where?", "image": PICTURE, "top_k": 0}, "top_k"),
    ({"question": "Where?", "image": PICTURE, "top_k": "3"}, "top_k"),
    ({"question": "Where?", "image": PICTURE, "colour": 1}, "colour"),
]
BAD_RETRIEVAL = [
    ({"images": [], "texts": ["a"]}, "images"),
    ({"images": [PICTURE], "texts": []}, "texts"),
    ({"images": [PICTURE], "texts": ["a", ""]}, "texts.1"),
    ({"images": [PICTURE], "texts": ["a"] * 1001}, "texts"),
    ({"images": [PICTURE] * 10, "texts": ["a"]}, None),
    ({"images": PICTURE, "texts": ["a"]}, "images"),
    ({"images": ["none"], "texts": ["a"]}, None),
    ({"images": [PICTURE], "texts": ["a"], "top_k": 3}, "top_k"),
]


@pytest.mark.parametrize(("body", "param"), BAD, ids=str)
def test_wrong_questions(vqa: str, body: dict[str, Any], param: str | None) -> None:
    status, _, named = error_of(vqa, "/v1/vqa", **body)
    assert (status, named) == (400, param)


@pytest.mark.parametrize(("body", "param"), BAD_RETRIEVAL, ids=str)
def test_wrong_comparisons(retrieval: str, body: dict[str, Any], param: str | None) -> None:
    status, _, named = error_of(retrieval, "/v1/retrieval", **body)
    assert (status, named) == (400, param)


def test_routes_of_other_checkpoints(vqa: str, retrieval: str, server: Server) -> None:
    question: dict[str, Any] = {"question": "Where?", "image": PICTURE}
    pairs: dict[str, Any] = {"images": [PICTURE], "texts": ["a boat"]}
    messages = [{"role": "user", "content": "Where?"}]
    found = [
        error_of(vqa, "/v1/retrieval", **pairs),
        error_of(retrieval, "/v1/vqa", **question),
        error_of(retrieval, "/v1/chat/completions", messages=messages),
        error_of(server.url, "/v1/vqa", **question),
        error_of(server.url, "/v1/retrieval", **pairs),
        error_of(vqa, "/v1/vqa", **question, model="other"),
    ]
    assert [status for status, _, _ in found] == [404] * 6
    wanted = ["/v1/vqa", "/v1/retrieval", "/v1/retrieval", "/v1/chat"]
    assert all(path in message for path, (_, message, _) in zip(wanted, found, strict=False))


def test_a_probe_asks_each(vqa: str, retrieval: str) -> None:
    for url in (vqa, retrieval):
        assert httpx.get(f"{url}/health?probe=true", timeout=60).status_code == 200


def test_comparisons_wait_between_each_other(retrieval: str) -> None:
    """A large one lets a small one through: each step of theirs is a batch."""
    done: list[str] = []

    def compare(name: str, count: int) -> None:
        post(retrieval, "/v1/retrieval", images=[PICTURE], texts=["a boat"] * count)
        done.append(name)

    large = threading.Thread(target=compare, args=("large", 1000))
    large.start()
    while large.is_alive():
        compare("small", 1)
    assert done.index("large") > 3
