"""Triton's format (KServe v2), by NVIDIA's own client and by hand."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from format_cases import NUM_LONG, PARTS, QUESTION, RAW, SECOND, leave_midway, sse_events, wait_for_requests
from serve_cases import SQUARE, Server, base64_of
from tritonclient.utils import InferenceServerException

MODEL = "llava_next"
ROUTE = f"/v2/models/{MODEL}"
GREEDY = {"max_tokens": 20, "temperature": 0}


@pytest.fixture()
def nvidia(server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        yield client


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def tensor(name: str, kind: str, values: Any, *, binary: bool = True) -> triton.InferInput:
    array = np.array(values, dtype={"UINT32": np.uint32, "BOOL": bool, "BYTES": object}[kind])
    found = triton.InferInput(name, list(array.shape), kind)
    found.set_data_from_numpy(array, binary_data=binary)
    return found


def test_health_and_metadata(nvidia: triton.InferenceServerClient) -> None:
    assert nvidia.is_server_live() and nvidia.is_server_ready()
    assert nvidia.is_model_ready(MODEL) and nvidia.is_model_ready(MODEL, "1")
    assert not nvidia.is_model_ready("other") and not nvidia.is_model_ready(MODEL, "2")
    assert nvidia.get_server_metadata()["name"] == "mmdist"
    metadata = nvidia.get_model_metadata(MODEL)
    assert metadata["name"] == MODEL and metadata["versions"] == ["1"]
    assert {"name": "input0", "datatype": "UINT32", "shape": [-1]} in metadata["inputs"]
    config = nvidia.get_model_config(MODEL, "1")
    assert config["maxSeqLen"] == 512 and config["worldSize"] == 2
    assert {"name": "text_output", "data_type": "TYPE_STRING", "dims": [-1]} in config["output"]


@pytest.mark.parametrize("binary", [True, False])
def test_the_client_sends_tokens(nvidia: Any, offline: dict[str, Any], binary: bool) -> None:
    ids = offline["text"]["prompt_token_ids"]
    asked = triton.InferRequestedOutput("output0", binary_data=binary)
    result = nvidia.infer(MODEL, [tensor("input0", "UINT32", [ids], binary=binary)], outputs=[asked], request_id="42")
    assert result.as_numpy("output0").tolist() == [offline["text"]["token_ids"]]
    assert result.get_response()["id"] == "42"


@pytest.mark.parametrize("binary", [True, False])
def test_the_client_asks_about_a_picture(nvidia: Any, offline: dict[str, Any], binary: bool) -> None:
    """Whatever the outputs are asked for as; parameters in either form."""
    inputs = [
        tensor("text_input", "BYTES", [RAW.encode()], binary=binary),
        tensor("image", "BYTES", [base64_of(SQUARE).encode()], binary=binary),
    ]
    result = nvidia.infer(MODEL, inputs, model_version="1", parameters={"max_tokens": 20})
    assert result.as_numpy("text_output").tolist() == [offline["raw"]["text"].encode()]
    more = [
        tensor("sampling_parameters", "BYTES", [json.dumps(GREEDY).encode()]),
        tensor("exclude_input_in_output", "BOOL", [False]),
        tensor("stream", "BOOL", [False]),
    ]
    outputs = [triton.InferRequestedOutput(name) for name in ("text_output", "output0")]
    result = nvidia.infer(MODEL, [*inputs, *more], outputs=outputs)
    assert result.as_numpy("text_output").tolist() == [(RAW + offline["raw"]["text"]).encode()]
    assert result.as_numpy("output0").tolist() == [offline["raw"]["token_ids"]]


def test_a_conversation_in_the_client(nvidia: Any, offline: dict[str, Any]) -> None:
    """The second question stands behind the first answer."""
    picture = tensor("image", "BYTES", [base64_of(SQUARE).encode()])
    first = nvidia.infer(MODEL, [tensor("text_input", "BYTES", [RAW.encode()]), picture]).as_numpy("text_output")
    text = RAW.encode() + first[0] + SECOND.encode()
    asked = triton.InferRequestedOutput("output0")
    answer = nvidia.infer(MODEL, [tensor("text_input", "BYTES", [text]), picture], outputs=[asked])
    assert answer.as_numpy("output0").tolist() == [offline["second"]["token_ids"]]


def test_the_client_is_told_what_is_wrong(nvidia: Any) -> None:
    with pytest.raises(InferenceServerException, match="other") as found:
        nvidia.infer("other", [tensor("input0", "UINT32", [[3]])])
    assert found.value.status() == "404"
    for inputs, words in (
        ([tensor("input1", "UINT32", [[3]])], "expected input0"),
        ([tensor("input0", "BYTES", [b"3"])], "expected input0"),
        ([tensor("image", "BYTES", [b"3"])], "one of input0 and text_input"),
        ([tensor("input0", "UINT32", [[3, 10**6]])], "token ids of 0 to"),
        ([tensor("input0", "UINT32", [[3]]), tensor("image", "BYTES", [b"3"])], "give text_input"),
        ([tensor("text_input", "BYTES", [b"a", b"b"])], "expected one text"),
        ([tensor("text_input", "BYTES", [b"\xff"])], "not BYTES"),
        ([tensor("text_input", "BYTES", [RAW.encode()])], "0 pictures given"),
        ([tensor("text_input", "BYTES", [b"a"]), tensor("stream", "BOOL", [True])], "generate_stream"),
        ([tensor("text_input", "BYTES", [b"a"]), tensor("sampling_parameters", "BYTES", [b"{"])], "not one text"),
        ([tensor("text_input", "BYTES", [b"a"]), tensor("sampling_parameters", "BYTES", [b'{"n": 2}'])], "one answer"),
        ([tensor("text_input", "BYTES", [b"a"]), tensor("sampling_parameters", "BYTES", [b'{"top_p": 2}'])], "top_p"),
    ):
        with pytest.raises(InferenceServerException, match=words) as found:
            nvidia.infer(MODEL, inputs)
        assert found.value.status() == "400"


def test_bodies_that_do_not_hold_their_tensors(client: httpx.Client) -> None:
    def ask(shape: list[int], size: int | None, behind: bytes, announced: int | str | None = None) -> httpx.Response:
        about: dict[str, Any] = {"name": "input0", "datatype": "UINT32", "shape": shape}
        about |= {"data": [3]} if size is None else {"parameters": {"binary_data_size": size}}
        text = json.dumps({"inputs": [about]}).encode()
        header = {"Inference-Header-Content-Length": f"{len(text) if announced is None else announced}"}
        return client.post(f"{ROUTE}/infer", content=text + behind, headers=header)

    assert ask([1, 2], 8, bytes(8)).status_code == 200
    refused = [
        ask([1, 3], 8, bytes(8)),
        ask([1, 2], 9, bytes(9)),
        ask([1, 2], 8, bytes(7)),
        ask([1, 2], 8, bytes(9)),
        ask([1], None, bytes(4)),
        ask([1, 2], 8, bytes(8), 10**6),
        ask([1, 2], 8, bytes(8), "x"),
        ask([1, 2], 8, bytes(8), 5),
    ]
    assert [(answer.status_code, answer.json().keys()) for answer in refused] == [(400, {"error"})] * len(refused)
    packed = client.post(f"{ROUTE}/infer", content=b"x", headers={"Content-Encoding": "gzip"})
    assert packed.status_code == 415 and "request_compression_algorithm" in packed.json()["error"]


def test_texts_as_mindie_has_them(client: httpx.Client, offline: dict[str, Any]) -> None:
    parameters = {"details": True, "batch_size": 100, "priority": 5, "timeout": 10, "watermark": True}
    body = {"id": "a-1_B", "text_input": PARTS, "parameters": parameters}
    answer = client.post(f"{ROUTE}/generate", json=body).json()
    details = answer.pop("details")
    assert answer == {
        "id": "a-1_B",
        "model_name": MODEL,
        "model_version": None,
        "text_output": offline["chat"]["text"],
    }
    assert details["finish_reason"] == "eos_token" and details["batch_size"] == 1
    assert details["generated_tokens"] == len(offline["chat"]["token_ids"])
    assert details["first_token_cost"] > 0 and details["decode_cost"] > 0


def test_texts_as_triton_has_them(client: httpx.Client, offline: dict[str, Any]) -> None:
    parameters = {**GREEDY, "stream": False, "exclude_input_in_output": False}
    body = {"text_input": RAW, "image": base64_of(SQUARE), "parameters": parameters}
    answer = client.post(f"{ROUTE}/versions/1/generate", json=body).json()
    assert answer["text_output"] == RAW + offline["raw"]["text"] and answer["model_version"] == "1"
    streamed = client.post(f"{ROUTE}/generate_stream", json={**body, "image": [base64_of(SQUARE)]})
    events = sse_events(streamed.text, "data:")
    assert "".join(event["text_output"] for event in events) == answer["text_output"]
    assert len(events) == len(offline["raw"]["token_ids"])
    assert events[0]["prefill_time"] > 0 and events[0]["decode_time"] is None
    assert all(event["prefill_time"] is None and event["decode_time"] > 0 for event in events[1:])


def test_requests_are_stopped_by_their_ids(endless: httpx.Client) -> None:
    """A whole answer has what there was until then; a stream ends with abort; then there is nothing to stop."""
    body = {"text_input": QUESTION, "parameters": {"max_new_tokens": NUM_LONG, "details": True}}
    found: dict[str, Any] = {}

    def ask() -> None:
        found.update(endless.post(f"{ROUTE}/generate", json={"id": "whole", **body}).json()["details"])

    asking = threading.Thread(target=ask)
    asking.start()
    wait_for_requests(endless, 1)
    assert endless.post(f"{ROUTE}/stopInfer", json={"id": "whole"}).json() == {"id": "whole"}
    asking.join(30)
    assert found["finish_reason"] == "abort" and found["generated_tokens"] < NUM_LONG
    with endless.stream("POST", f"{ROUTE}/generate_stream", json={"id": "s", **body}) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert endless.post(f"{ROUTE}/versions/1/stopInfer", json={"id": "s"}).json() == {"id": "s"}
        last = json.loads([line for line in lines if line][-1].removeprefix("data:"))
    assert last["details"]["finish_reason"] == "abort" and last["details"]["generated_tokens"] < NUM_LONG
    wait_for_requests(endless, 0)
    gone = endless.post(f"{ROUTE}/stopInfer", json={"id": "s"})
    assert gone.status_code == 404 and "'s'" in gone.json()["error"]


def test_a_request_has_its_own_time(endless: httpx.Client) -> None:
    """Behind sixteen answers, of which four are computed at once."""
    running = {"prompt": QUESTION, "n": 16, "max_tokens": NUM_LONG, "ignore_eos": True, "stream": True}
    with endless.stream("POST", "/generate", json=running) as stream:
        chunks = stream.iter_bytes()  # held: without it the stream would end
        next(chunks)
        wait_for_requests(endless, 16)
        body = {"text_input": QUESTION, "parameters": {"max_new_tokens": NUM_LONG, "timeout": 1}}
        late = endless.post(f"{ROUTE}/generate", json=body)
    assert late.status_code == 504 and late.json() == {"error": "not finished in 1 s"}


def test_a_client_that_leaves_is_forgotten(endless: httpx.Client) -> None:
    body = {"text_input": QUESTION, "parameters": {"max_new_tokens": NUM_LONG}}
    leave_midway(endless, f"{ROUTE}/generate_stream", body)
    wait_for_requests(endless, 0)
