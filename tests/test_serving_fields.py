"""TGI's, vLLM's, Triton's and MindIE's bodies with each field wrong once: the format's own error, and it goes on."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from format_cases import PARTS, QUESTION, RAW, replaced
from pydantic import BaseModel
from serve_cases import SQUARE, Server, base64_of

from mmdist.serving.formats import mindie, tgi_body, triton, triton_infer, vllm

HALF_A_PICTURE = base64.b64encode(SQUARE.read_bytes()[:200]).decode()
TEXT = ({"type": "text", "text": QUESTION},)
CONTENTS: tuple[Any, ...] = (
    3,
    "",
    [],
    {"type": "text", "text": "a"},
    ["a"],
    [{"type": "text"}],
    [{"type": "audio_url", "audio_url": "a"}],
    [{"type": "text", "text": "a", "more": 1}],
    [{"type": "image_url", "image_url": "bm8gcGljdHVyZQ=="}, *TEXT],
    [{"type": "image_url", "image_url": HALF_A_PICTURE}, *TEXT],
    [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}, *TEXT],
    [{"type": "image_url", "image_url": "file:///etc/passwd"}, *TEXT],
    [{"type": "image_url", "image_url": 3}],
    [{"type": "video_url", "video_url": base64_of(SQUARE)}, *TEXT],
    [*PARTS[:1] * 21, *TEXT],
    [{"type": "text", "text": "<image> in words"}],
    "<image> and no picture",
    "word " * 600,
)
SHARED: dict[str, tuple[Any, ...]] = {
    "max_new_tokens": (0, -1, "20", 2.5, True),
    "do_sample": ("yes", 1),
    "temperature": (-1, "hot", True, 1e400),
    "top_k": (-1, 2.5, "10"),
    "top_p": (0, 1.5, -1, "0.9"),
    "typical_p": (0, 1.5, "0.9"),
    "repetition_penalty": (0, -1, "1", 1000),
    "seed": (-1, 2**64, "1", 0.5),
    "details": ("true", 1),
    "watermark": ("no", 0),
    "unknown": (1,),
}
MINDIE = SHARED | {
    "priority": (0, 6, "5"),
    "timeout": (0, 65536, -1, 1.5, "10"),
    "batch_size": (0, "1"),
}
TGI = SHARED | {
    "temperature": (0, *SHARED["temperature"]),
    "best_of": (0, 17, "1", 2),
    "frequency_penalty": (-3, 3, "0"),
    "stop": ("text", [""], [1], ["a"] * 17),
    "truncate": (0, -1, "5"),
    "return_full_text": ("no",),
    "decoder_input_details": ("no",),
    "top_n_tokens": (-1, 6, "1"),
    "grammar": (
        "json",
        {"type": "xml", "value": "a"},
        {"type": "regex"},
        {"type": "regex", "value": {}},
        {"type": "regex", "value": "("},
        {"type": "json", "value": "{"},
        {"type": "json", "value": {"type": "nothing"}},
    ),
    "adapter_id": ("mine", 3),
    "watermark": (True, "no"),
}
TRITON = MINDIE | {
    "max_tokens": (0, "5", True),
    "exclude_input_in_output": ("no",),
    "stream": (True, "no"),
}
VLLM: dict[str, tuple[Any, ...]] = {
    "prompt": CONTENTS,
    "n": (0, 17, "1", True),
    "best_of": (0, 2, "1"),
    "max_tokens": (0, -1, "16"),
    "min_tokens": (-1, 17, "1"),
    "temperature": (-1, "hot"),
    "top_p": (0, 1.5, "1"),
    "top_k": (-2, 1.5, "1"),
    "min_p": (-1, 2, "0"),
    "seed": (-(2**63) - 1, 2**63, "1"),
    "repetition_penalty": (0, 1000, "1"),
    "frequency_penalty": (-3, 3, "0"),
    "presence_penalty": (-3, 3, "0"),
    "logit_bias": ([], {"a": 1}, {"1": "a"}, {"1": 1000}, {"-1": 1}, {"100000": 1}),
    "stop": (3, [3], [""]),
    "stop_token_ids": (3, ["a"], [-1]),
    "include_stop_str_in_output": ("no", 1),
    "skip_special_tokens": ("no", 1),
    "ignore_eos": ("no", 1),
    "structured_outputs": (
        "json",
        {"xml": "a"},
        {"json": "{"},
        {"regex": "("},
        {"regex": "a", "json": {}},
        {"json": 3},
    ),
    "stream": ("no", 1),
    "model": (3,),
    "truncate_prompt_tokens": (0, "1"),
    "unknown": (1,),
}
TENSOR = {"name": "input0", "shape": [1, 2], "datatype": "UINT32", "data": [3, 4]}
ROUTE = "/v2/models/llava_next"


@dataclass(frozen=True)
class Format:
    """path: where `body`, which is right, goes. wrong: by field. models: whose fields must all be in it."""

    path: str
    body: dict[str, Any]
    wrong: dict[str, tuple[Any, ...]]
    models: tuple[tuple[str, type[BaseModel]], ...]
    error_type: str | None
    status: int = 422
    extra: tuple[dict[str, Any], ...] = field(default=())


def below(name: str, wrong: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    return {name: ("a", [], 3)} | {f"{name}.{inner}": values for inner, values in wrong.items()}


FORMATS = {
    "tgi": Format(
        "/generate",
        {"inputs": PARTS, "parameters": {"max_new_tokens": 2, "do_sample": False}},
        {"inputs": CONTENTS, "unknown": (1,), "stream": (True,)} | below("parameters", TGI),
        (("", tgi_body.TgiRequest), ("parameters.", tgi_body.TgiParameters)),
        "validation",
        extra=(
            {"inputs": PARTS, "parameters": {"truncate": 3}},
            {"inputs": QUESTION, "parameters": {"best_of": 2, "temperature": 2.0, "seed": 1}},
            {"inputs": f"![]({base64_of(SQUARE)}) <image>"},
            {"inputs": "![](bm8gcGljdHVyZQ==)"},
            {"parameters": {}},
        ),
    ),
    "tgi_stream": Format(
        "/generate_stream",
        {"inputs": QUESTION, "parameters": {"max_new_tokens": 2}},
        {
            "inputs": CONTENTS,
            "parameters.decoder_input_details": (True,),
            "parameters.best_of": (2,),
        },
        (),
        "validation",
    ),
    "tgi_compat": Format(
        "/",
        {"inputs": QUESTION, "parameters": {"max_new_tokens": 2}},
        {"stream": ("yes", 1), "inputs": (3,)},
        (),
        "validation",
    ),
    "vllm": Format(
        "/generate",
        {"prompt": PARTS, "max_tokens": 2, "temperature": 0},
        VLLM,
        (("", vllm.VllmRequest),),
        "Input Validation Error",
        extra=({"prompt": PARTS, "truncate_prompt_tokens": 3},),
    ),
    "triton": Format(
        f"{ROUTE}/generate",
        {"id": "a", "text_input": PARTS, "parameters": {"max_new_tokens": 2}},
        {
            "id": ("", "a b", "a" * 257, "a\n", 3),
            "text_input": CONTENTS,
            "image": (3, [3], base64_of(SQUARE)),
            "unknown": (1,),
        }
        | below("parameters", TRITON),
        (("", triton.GenerateRequest), ("parameters.", triton_infer.TritonParameters)),
        None,
        400,
        extra=(
            {"text_input": RAW},
            {"text_input": RAW, "image": [base64_of(SQUARE)] * 2},
            {"text_input": RAW, "image": "bm8gcGljdHVyZQ=="},
            {"text_input": RAW.replace("<image>", "<image>" * 21), "image": [base64_of(SQUARE)] * 21},
        ),
    ),
    "tensors": Format(
        f"{ROUTE}/infer",
        {"id": "a", "inputs": [TENSOR], "outputs": [{"name": "output0"}], "parameters": {"max_new_tokens": 2}},
        {
            "id": ("", "a b", 3),
            "inputs": (
                [],
                TENSOR,
                [TENSOR, TENSOR],
                *([{**TENSOR, "name": name}] for name in ("input1", "text_input", 3)),
                *([{**TENSOR, "shape": shape}] for shape in ([], [3], [-1], [2, 2], "2", [2**70])),
                *([{**TENSOR, "datatype": kind}] for kind in ("INT64", "BYTES", 3)),
                *([{**TENSOR, "data": data}] for data in (["a", "b"], [3], [3, -1], [3, 10**6], [3, True], "ab", None)),
                [{**TENSOR, "parameters": {"binary_data_size": 8}}],
                [{**TENSOR, "parameters": {"binary_data_size": -1}}],
                [{**TENSOR, "parameters": 3}],
                [{**TENSOR, "unknown": 3}],
                [{**TENSOR, "name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["\ud800"]}],
                [{**TENSOR, "shape": [1], "data": [[[[3, 4]]]]}],
            ),
            "outputs": (
                [],
                [{}],
                [{"name": "output1"}],
                [{"name": "output0", "parameters": {"classification": 3}}],
                "output0",
            ),
            "unknown": (1,),
        }
        | below("parameters", {**TRITON, "stream": ("no",), "binary_data_output": ("no",)}),
        (("", triton_infer.InferRequest), ("parameters.", triton_infer.InferParameters)),
        None,
        400,
    ),
    "stop": Format(f"{ROUTE}/stopInfer", {}, {"id": (3, "", "a b")}, (("", triton.StopRequest),), None, 400),
    "mindie": Format(
        "/infer",
        {"inputs": PARTS, "parameters": {"max_new_tokens": 2}},
        {"inputs": CONTENTS, "input_id": ([3],), "stream": ("yes", 1), "unknown": (1,)} | below("parameters", MINDIE),
        (("", mindie.InferRequest), ("parameters.", mindie.MindieParameters)),
        "Input Validation Error",
        extra=({}, {"inputs": None}),
    ),
    "mindie_tokens": Format(
        "/infer_token",
        {"input_id": [3, 4], "parameters": {"max_new_tokens": 2}},
        {
            "input_id": ([], "3", [-1], [10**6], ["a"], [1.5], [True], [3] * 600),
            "stream": ("yes",),
            "parameters": (3,),
        },
        (("", mindie.InferTokenRequest),),
        "Input Validation Error",
    ),
    "tokenizer": Format(
        "/v1/tokenizer",
        {"inputs": QUESTION},
        {"inputs": CONTENTS, "unknown": (1,)},
        (("", mindie.TokenizerRequest),),
        "Input Validation Error",
    ),
}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.mark.parametrize("name", FORMATS)
def test_each_field_wrong_once(name: str, client: httpx.Client) -> None:
    case = FORMATS[name]
    for start, model in case.models:
        assert {f"{start}{field}" for field in model.model_fields} <= case.wrong.keys()
    bodies = [replaced(case.body, place, value) for place, values in case.wrong.items() for value in values]
    for body in (*bodies, *case.extra, [], 3, "text", None):
        answer = client.post(case.path, content=json.dumps(body), headers={"Content-Type": "application/json"})
        assert is_refusal(case, answer), (body, answer.status_code, answer.text)
    if name != "stop":
        assert client.post(case.path, json=case.body).status_code == 200


def is_refusal(case: Format, answer: httpx.Response) -> bool:
    found = answer.json()
    types = {case.error_type} | ({"validation"} if case.path == "/generate" else set())  # of bodies of neither format
    return answer.status_code == case.status and found["error"] and found.get("error_type") in types


def test_bodies_that_are_no_json(client: httpx.Client) -> None:
    expected = {
        "/generate": 422,
        "/": 422,
        "/infer": 400,
        "/v1/tokenizer": 400,
        f"{ROUTE}/generate": 400,
        f"{ROUTE}/infer": 400,
    }
    for path, status in expected.items():
        for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": NaN', b'{"inputs": "\\ud800"}'):
            answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code in (status, 422, 400), (path, content[:9], answer.text)
            assert answer.json()["error"]


def test_unknown_models_and_methods(client: httpx.Client) -> None:
    for path in ("/v2/models/other", f"{ROUTE}/versions/2", "/v2/models/other/ready"):
        assert client.get(path).status_code == 404 and client.get(path).json().keys() == {"error"}
    found = client.post("/generate", json={"prompt": QUESTION, "model": "other"})
    assert found.status_code == 404 and found.json()["error_type"] == "validation"
    for path in ("/generate", "/infer", f"{ROUTE}/infer"):
        assert client.delete(path).status_code == 405 and client.delete(path).json()["error"]


def test_a_body_of_another_type_is_still_answered(client: httpx.Client) -> None:
    for path in ("/generate", "/infer", f"{ROUTE}/generate"):
        answer = client.post(path, content=b"{", headers={"Content-Type": "text/plain"})
        assert answer.status_code in (400, 422) and answer.json()["error"]
