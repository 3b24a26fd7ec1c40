"""Every field of OpenAI's format wrong once: always a 4xx in OpenAI's shape, and the server goes on."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from serve_cases import SQUARE, Server, base64_of, data_url

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
TEXT: dict[str, Any] = {"prompt": "Hi", "max_tokens": 2}
SCHEMA = {"name": "answer", "schema": {"type": "object"}}
NO_INTEGERS = ("3", 1.5, True, [1], {})
NO_NUMBERS = ("1", True, [1], {})
NO_FLAGS = ("true", 1, [])

# What both routes take: field, then wrong values.
SHARED: list[tuple[str, tuple[Any, ...]]] = [
    ("temperature", (-0.1, 2.1, 1e999, *NO_NUMBERS)),
    ("top_p", (0, 1.1, -1, *NO_NUMBERS)),
    ("n", (0, -1, 17, 10**30, *NO_INTEGERS)),
    ("stop", ("", [""], ["a", 3], 3, {}, ["a"] * 65)),
    ("seed", (2**63, -(2**63) - 1, *NO_INTEGERS)),
    ("frequency_penalty", (-2.1, 2.1, *NO_NUMBERS)),
    ("presence_penalty", (-2.1, 2.1, *NO_NUMBERS)),
    ("logit_bias", ({"x": 1}, {"-1": 1}, {"5": 101}, {"5": "1"}, {"99999999": 1}, [1], "5")),
    ("response_format", ("json", {}, {"type": "xml"}, {"type": "json_schema"}, {"type": "text", "x": 1},
                         {"type": "json_schema", "json_schema": {"name": "a"}},
                         {"type": "json_schema", "json_schema": {**SCHEMA, "name": "a b"}},
                         {"type": "json_schema", "json_schema": {**SCHEMA, "schema": "x"}},
                         {"type": "json_schema", "json_schema": {**SCHEMA, "schema": {"type": "nothing"}}})),
    ("stream", NO_FLAGS),
    ("stream_options", ({"include_usage": True}, 1)),
    ("top_k", (-2, *NO_INTEGERS)),
    ("min_p", (-0.1, 1.1, *NO_NUMBERS)),
    ("repetition_penalty", (0, -1, 101, *NO_NUMBERS)),
    ("min_tokens", (-1, 3, *NO_INTEGERS)),
    ("stop_token_ids", ([-1], ["5"], 5, [1.5])),
    ("include_stop_str_in_output", NO_FLAGS),
    ("ignore_eos", NO_FLAGS),
    ("skip_special_tokens", NO_FLAGS),
    ("return_token_ids", NO_FLAGS),
    ("request_id", ("", "a b", "x" * 257, 5)),
    ("user", (5,)),
    ("metadata", ("x", 5)),
    ("store", ("x",)),
    ("priority", ("x",)),
    ("model", (5, "other", "", ["llava_next"])),
    ("max_tokens", (0, -1, *NO_INTEGERS)),
    ("no_such_field", (1, "x", False)),
    ("suffix", ("end",)),
    ("best_of", (2,)),
    ("tools", ([{"type": "function"}],)),
    ("tool_choice", ("auto",)),
    ("functions", ([{}],)),
    ("audio", ({"voice": "x"},)),
    ("modalities", (["audio"],)),
    ("guided_json", ({},)),
    ("prompt_logprobs", (1,)),
    ("use_beam_search", (True,)),
]  # fmt: skip


def parts(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


WORDS = {"type": "text", "text": "Hi"}
PICTURE = {"type": "image_url", "image_url": data_url(SQUARE)}
OF_CHAT: list[tuple[str, tuple[Any, ...]]] = [
    ("messages", ([], "Hi", {}, [{}], ["Hi"], [{"role": "user"}], [{"role": "robot", "content": "Hi"}],
                  [{"role": "tool", "content": "Hi"}], [{"role": "user", "content": 5}], [{"content": "Hi"}],
                  [{"role": "user", "content": "Hi", "colour": 1}], [{"role": "user", "content": None}],
                  parts("Hi"), parts({}), parts({"type": "audio_url"}), parts({"type": "text"}),
                  parts({"type": "text", "text": 5}), parts({**WORDS, "x": 1}),
                  parts({"type": "image_url"}), parts({"type": "image_url", "image_url": 5}),
                  parts({"type": "image_url", "image_url": {}}), parts({"type": "image_url", "image_url": {"url": 5}}),
                  parts({"type": "image_url", "image_url": {"url": data_url(SQUARE), "detail": "most"}}),
                  parts({"type": "image", "image": 5}))),
    ("max_completion_tokens", (0, 5, *NO_INTEGERS)),
    ("logprobs", (1, "true", [])),
    ("top_logprobs", (3, -1, 21, *NO_INTEGERS)),
]  # fmt: skip
OF_TEXT: list[tuple[str, tuple[Any, ...]]] = [
    ("prompt", (5, [], [[]], {}, ["Hi", 5], [[5, "x"]], [[5, -1]], [10**6], [5, True])),
    ("logprobs", (-1, 21, *NO_INTEGERS)),
    ("echo", NO_FLAGS),
    ("messages", (CHAT["messages"],)),
]
CASES = [
    pytest.param(path, {**body, field: value}, field, id=f"{path}-{field}-{str(value)[:60]}")
    for path, body, table in (
        ("chat/completions", CHAT, SHARED + OF_CHAT),
        ("completions", TEXT, SHARED + OF_TEXT),
    )
    for field, values in table
    for value in values
]
# (path, body, what the message says): pairs that exclude each other, and what only the model can refuse.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("chat/completions", CHAT | {"max_completion_tokens": 3}, "give one of them"),
    ("chat/completions", CHAT | {"top_logprobs": 1}, "only with logprobs=true"),
    ("completions", TEXT | {"echo": True, "logprobs": 1}, "not with logprobs"),
    ("completions", TEXT | {"stream_options": {}}, "only with stream=true"),
    ("completions", TEXT | {"prompt": ["Hi"] * 6, "n": 3}, "18 answers; at most 16 to a request"),
    ("completions", {"max_tokens": 2}, "prompt: Field required"),
    ("chat/completions", {"max_tokens": 2}, "messages: Field required"),
    ("completions", TEXT | {"prompt": "red <image>"}, "1 <image> in the prompt, 0 pictures given"),
    ("completions", TEXT | {"prompt": "red " * 4000}, "maximum context length"),
    ("completions", TEXT | {"prompt": [5] * 4000}, "maximum context length"),
    ("chat/completions", {"messages": parts({"type": "text", "text": "<image>"})}, "1 <image> in the prompt, 0"),
    ("chat/completions", {"messages": parts({"type": "image", "image": "no picture"})}, "expected data:TYPE;base64"),
    ("chat/completions", {"messages": parts(PICTURE | {"image_url": "data:image/png,x"})}, "expected data:TYPE;base64"),
    ("chat/completions", {"messages": parts(PICTURE | {"image_url": base64_of(SQUARE)[:400]})}, "damaged picture"),
    ("chat/completions", {"messages": parts(PICTURE | {"image_url": "http://localhost/x.png"})}, "localhost"),
    ("chat/completions", {"messages": parts(PICTURE | {"image_url": "file:///etc/passwd"})}, "reads no files"),
    ("chat/completions", {"messages": parts({"type": "video_url", "video_url": data_url(SQUARE)}, WORDS)}, "no videos"),
]  # fmt: skip


@pytest.fixture(scope="module")
def connection(server: Server) -> Any:
    with server.client() as client:
        yield client


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize(("path", "body", "field"), CASES)
def test_a_wrong_field(connection: httpx.Client, path: str, body: dict[str, Any], field: str) -> None:
    error = error_of(connection.post(f"/v1/{path}", content=dumps(body), headers={"Content-Type": "application/json"}))
    assert error["message"]
    if error["param"] is not None:
        named = error["param"].partition(".")[0]
        assert named == field or field in error["message"] or {named, field} <= {"max_tokens", "max_completion_tokens"}


def dumps(body: dict[str, Any]) -> str:
    """With numbers that are none of JSON's."""
    return json.dumps(body)


@pytest.mark.parametrize(("path", "body", "words"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_wrong_request(connection: httpx.Client, path: str, body: dict[str, Any], words: str) -> None:
    assert words in error_of(connection.post(f"/v1/{path}", json=body))["message"]


BODIES = [b"", b"[]", b"{", b"null", b"5", b"\xff\xfe", b"[" * 100_000, b'{"prompt": "\\ud800"}']
BODIES += [b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}"]


@pytest.mark.parametrize("content", BODIES, ids=lambda content: repr(content[:20]))
def test_a_wrong_body(connection: httpx.Client, content: bytes) -> None:
    for path in ("chat/completions", "completions"):
        error_of(connection.post(f"/v1/{path}", content=content, headers={"Content-Type": "application/json"}))


def test_wrong_paths_and_methods(connection: httpx.Client) -> None:
    assert error_of(connection.get("/v1/nothing"))["message"] == "Not Found"
    assert connection.get("/v1/chat/completions").status_code == 405
    assert error_of(connection.post("/v1/completions", content="prompt=Hi"))["message"]


def test_nulls_are_as_good_as_left_out(connection: httpx.Client) -> None:
    fields = [field for field, _ in SHARED + OF_CHAT if field not in ("messages", "max_tokens")]
    whole = connection.post("/v1/chat/completions", json=CHAT | dict.fromkeys(fields))
    assert whole.status_code == 200, whole.text


def test_the_server_goes_on(connection: httpx.Client) -> None:
    for path, body in (("chat/completions", CHAT), ("completions", TEXT)):
        response = connection.post(f"/v1/{path}", json=body | {"ignore_eos": True})
        assert response.status_code == 200 and response.json()["usage"]["completion_tokens"] == 2
