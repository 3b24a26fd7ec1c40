"""KServe's v2 tensors: JSON, or with the binary extension the bytes of a body behind its JSON, as tritonclient sends
them by default.

Reference: triton-inference-server/server, docs/protocol/extension_binary_data.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from math import prod
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import Field
from starlette.datastructures import MutableHeaders
from starlette.responses import Response

from mmdist.serving.errors import ServeError
from mmdist.serving.messages import Body

JSON_SIZE = "Inference-Header-Content-Length"  # bytes of the JSON in front of the tensors
KINDS = {"UINT32": int, "BOOL": bool, "BYTES": str}
Size = Annotated[int, Field(ge=0)]


class InputParameters(Body):
    binary_data_size: Size | None = None


class InputTensor(Body):
    """Its numbers, texts or booleans stand in data (row by row, nested or not) or behind the JSON."""

    name: str
    shape: Annotated[list[Size], Field(min_length=1)]
    datatype: Literal["UINT32", "BOOL", "BYTES"]
    data: list[Any] | None = None
    parameters: InputParameters = InputParameters()


class OutputParameters(Body):
    binary_data: bool | None = None
    classification: Literal[0] = 0


class OutputName(Body):
    name: str
    parameters: OutputParameters = OutputParameters()


class TensorRequest(Request):
    """Its body is the JSON alone; what follows it is state.tensors."""

    async def body(self) -> bytes:
        if not hasattr(self.state, "tensors"):
            body = await super().body()
            size = self.headers.get(JSON_SIZE, f"{len(body)}")
            if not size.isdecimal() or int(size) > len(body):
                raise ServeError(422, f"{JSON_SIZE}: {size} of {len(body)} bytes")
            self._body, self.state.tensors = body[: int(size)], body[int(size) :]
        return self._body


class JsonRoute(APIRoute):
    """tritonclient does not say that it sends JSON, and Triton's own examples for curl neither."""

    request_class: type[Request] = Request

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if "content-encoding" in request.headers:
                raise ServeError(415, "compressed bodies are not read; send it without request_compression_algorithm")
            MutableHeaders(scope=request.scope)["Content-Type"] = "application/json"
            request = self.request_class(request.scope, request.receive)
            await request.body()
            return await handler(request)

        return handle


class TensorRoute(JsonRoute):
    request_class = TensorRequest


def read_tensors(inputs: list[InputTensor], binary: bytes) -> dict[str, list[Any]]:
    """-> the elements of each, by name; ServeError 422."""
    found: dict[str, list[Any]] = {}
    for tensor in inputs:
        if tensor.name in found:
            raise ServeError(422, f"input {tensor.name} is given twice")
        size = tensor.parameters.binary_data_size
        if (size is None) == (tensor.data is None):
            raise ServeError(422, f"input {tensor.name}: expected one of data and parameters.binary_data_size")
        if size is not None:
            raw, binary = binary[:size], binary[size:]
            if len(raw) < size:
                raise ServeError(422, f"input {tensor.name}: {size} bytes are announced, {len(raw)} are left")
        values = flatten(tensor.data) if size is None else from_bytes(tensor, raw)
        check_values(tensor, values)
        found[tensor.name] = values
    if binary:
        raise ServeError(422, f"{len(binary)} bytes behind the last input")
    return found


def flatten(data: Any) -> list[Any]:
    """Rows are lists, of any depth."""
    values: list[Any] = []
    rest = [data]
    while rest:
        value = rest.pop()
        if isinstance(value, list):
            rest.extend(reversed(value))
        else:
            values.append(value)
    return values


def check_values(tensor: InputTensor, values: list[Any]) -> None:
    wanted = prod(tensor.shape)
    if len(values) != wanted:
        raise ServeError(422, f"input {tensor.name}: shape {tensor.shape} has {wanted} elements, found {len(values)}")
    wrong = [value for value in values if type(value) is not KINDS[tensor.datatype]]
    if tensor.datatype == "BYTES" and not wrong and not is_encodable("".join(values)):
        raise ServeError(422, f"input {tensor.name}: halves of surrogate pairs are no text")
    if wrong:
        raise ServeError(422, f"input {tensor.name}: found {wrong[0]!r:.40} in a tensor of {tensor.datatype}")


def is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def from_bytes(tensor: InputTensor, raw: bytes) -> list[Any]:
    """UINT32: little-endian. BYTES: each text behind its length, a UINT32."""
    try:
        if tensor.datatype == "UINT32":
            return np.frombuffer(raw, "<u4").tolist()
        if tensor.datatype == "BOOL":
            return np.frombuffer(raw, "?").tolist()
        return split_texts(raw)
    except (ValueError, UnicodeDecodeError) as error:
        raise ServeError(422, f"input {tensor.name}: not {tensor.datatype} ({error})") from error


def split_texts(raw: bytes) -> list[str]:
    texts, start = [], 0
    while start < len(raw):
        stop = start + 4 + int.from_bytes(raw[start : start + 4], "little")
        if stop > len(raw):
            raise ValueError("the last text is cut off")
        texts.append(raw[start + 4 : stop].decode())
        start = stop
    return texts


def write_tensors(found: dict[str, Any], outputs: dict[str, list[Any]], binary: set[str]) -> Response:
    """found: the reply's other fields. outputs: tensors of one row, by name; binary: those that go behind the JSON."""
    described, behind = [], b""
    for name, values in outputs.items():
        is_text = isinstance(values[0], str) if values else False
        tensor: dict[str, Any] = {
            "name": name,
            "shape": [len(values)] if is_text else [1, len(values)],
            "datatype": "BYTES" if is_text else "UINT32",
        }
        if name in binary:
            raw = join_texts(values) if is_text else np.array(values, "<u4").tobytes()
            tensor["parameters"] = {"binary_data_size": len(raw)}
            behind += raw
        else:
            tensor["data"] = values
        described.append(tensor)
    text = json.dumps(found | {"outputs": described}, ensure_ascii=False).encode()
    if not binary:
        return Response(text, media_type="application/json")
    return Response(text + behind, media_type="application/octet-stream", headers={JSON_SIZE: f"{len(text)}"})


def join_texts(texts: list[str]) -> bytes:
    encoded = [text.encode() for text in texts]
    return b"".join(len(text).to_bytes(4, "little") + text for text in encoded)
