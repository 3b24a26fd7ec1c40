"""TGI's format, by Hugging Face's own client and by hand."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from format_cases import MARKDOWN, NUM_LONG, PARTS, QUESTION, SECOND, leave_midway, sse_events, wait_for_requests
from huggingface_hub import InferenceClient
from huggingface_hub.errors import ValidationError as TgiValidationError
from serve_cases import SQUARE, Server, base64_of, data_url


@pytest.fixture(scope="module")
def hub(server: Server) -> InferenceClient:
    return InferenceClient(model=server.url)


def test_the_hubs_client_asks_about_a_picture(hub: InferenceClient, offline: dict[str, Any]) -> None:
    assert hub.text_generation(MARKDOWN) == offline["raw"]["text"]
    whole = hub.text_generation(MARKDOWN, details=True, decoder_input_details=True, top_n_tokens=2, max_new_tokens=20)
    details = whole.details
    assert [token.id for token in details.tokens] == offline["raw"]["token_ids"]
    assert [token.id for token in details.prefill] == offline["raw"]["prompt_token_ids"]
    assert details.finish_reason == "eos_token" and details.generated_tokens == len(details.tokens)
    assert "".join(token.text for token in details.tokens if not token.special) == whole.generated_text
    assert details.tokens[-1].special and details.tokens[-1].text == "</s>"
    assert [best[0]["id"] for best in details.top_tokens] == offline["raw"]["token_ids"]
    assert [best[0]["logprob"] for best in details.top_tokens] == [token.logprob for token in details.tokens]


def test_the_hubs_client_streams(hub: InferenceClient, offline: dict[str, Any]) -> None:
    events = list(hub.text_generation(MARKDOWN, stream=True, details=True))
    assert [event.token.id for event in events] == offline["raw"]["token_ids"]
    assert [event.index for event in events] == list(range(1, len(events) + 1))
    assert all(event.generated_text is None and event.details is None for event in events[:-1])
    assert events[-1].generated_text == offline["raw"]["text"]
    assert events[-1].details.finish_reason == "eos_token"
    assert events[-1].details.input_length == len(offline["raw"]["prompt_token_ids"])
    assert events[-1].details.generated_tokens == len(events)
    texts = hub.text_generation(MARKDOWN, stream=True, max_new_tokens=1)
    assert list(texts) == [events[0].token.text]


def test_a_conversation_in_the_hubs_client(hub: InferenceClient, offline: dict[str, Any]) -> None:
    """The second question stands behind the first answer."""
    first = hub.text_generation(MARKDOWN)
    answer = hub.text_generation(f"{MARKDOWN}{first}{SECOND}", details=True)
    assert [token.id for token in answer.details.tokens] == offline["second"]["token_ids"]


def test_the_hubs_client_is_told_what_is_wrong(hub: InferenceClient) -> None:
    with pytest.raises(TgiValidationError, match="2 <image> in the prompt, 1 pictures given"):
        hub.text_generation(f"<image>{MARKDOWN}")
    with pytest.raises(TgiValidationError, match="adapters"):
        hub.text_generation("hi", adapter_id="mine")


def test_parts_as_mindie_has_them(server: Server, offline: dict[str, Any]) -> None:
    sources = [data_url(SQUARE), base64_of(SQUARE), {"url": data_url(SQUARE)}]
    with server.client() as client:
        for source in sources:
            parts = [{"type": "image_url", "image_url": source}, PARTS[1]]
            body = {"inputs": parts, "parameters": {"details": True}}
            answer = client.post("/generate", json=body).json()
            assert [token["id"] for token in answer["details"]["tokens"]] == offline["chat"]["token_ids"]


def test_the_compatible_route(server: Server, offline: dict[str, Any]) -> None:
    with server.client() as client:
        whole = client.post("/", json={"inputs": MARKDOWN})
        assert whole.json() == [{"generated_text": offline["raw"]["text"]}]
        streamed = client.post("/", json={"inputs": MARKDOWN, "stream": True})
        assert sse_events(streamed.text, "data:")[-1]["generated_text"] == offline["raw"]["text"]


def test_best_of_and_seeds(hub: InferenceClient) -> None:
    asked: dict[str, Any] = {"details": True, "temperature": 3.0, "max_new_tokens": 6}
    best = hub.text_generation(QUESTION, best_of=3, **asked)
    mean = [
        sum(token.logprob for token in one.tokens) / len(one.tokens)
        for one in (best.details, *best.details.best_of_sequences)
    ]
    assert len(mean) == 3 and mean == sorted(mean, reverse=True)
    again = hub.text_generation(QUESTION, seed=best.details.seed, **asked)
    assert again.generated_text == best.generated_text and again.details.seed == best.details.seed
    greedy = hub.text_generation(QUESTION, details=True)
    assert greedy.details.seed is None


def test_texts_that_stop_and_texts_that_are_cut(server: Server, hub: InferenceClient, offline: dict[str, Any]) -> None:
    words = offline["chat"]["text"].split()
    with server.client() as client:
        parameters = {"stop": [words[-1]], "return_full_text": True, "details": True}
        stopped = client.post("/generate", json={"inputs": PARTS, "parameters": parameters}).json()
        assert stopped["generated_text"] == QUESTION + offline["chat"]["text"]  # the stop sequence stays
        assert stopped["details"]["finish_reason"] == "stop_sequence"
        cut = client.post("/generate", json={"inputs": PARTS, "parameters": {"max_new_tokens": 1, "details": True}})
        assert cut.json()["details"]["finish_reason"] == "length"
    details = hub.text_generation("one two three", truncate=2, decoder_input_details=True, details=True).details
    whole = hub.text_generation("one two three", decoder_input_details=True, details=True).details
    assert [token.id for token in details.prefill] == [token.id for token in whole.prefill[-2:]]


def test_a_grammar(endless: httpx.Client) -> None:
    hub = InferenceClient(model=str(endless.base_url))
    answer = hub.text_generation(QUESTION, grammar={"type": "regex", "value": "(green|blue) square"})
    assert answer in ("green square", "blue square")


def test_info(server: Server) -> None:
    with server.client() as client:
        info = client.get("/info").json()
    assert info["model_id"] == "llava_next" and info["model_device_type"] == "cpu"
    assert info["max_input_length"] == info["max_total_tokens"] - 1 and info["max_best_of"] == 16


def test_a_client_that_leaves_is_forgotten(endless: httpx.Client) -> None:
    leave_midway(endless, "/generate_stream", {"inputs": QUESTION, "parameters": {"max_new_tokens": NUM_LONG}})
    wait_for_requests(endless, 0)
