"""What /infer's tensors ask for: input0 (tokens, as MindIE has it), or text_input and image, as Triton's vllm_backend
has them."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import Field, ValidationError

from mmdist.config import SamplingParams
from mmdist.models.base import Prompt
from mmdist.serving.errors import ServeError
from mmdist.serving.formats.answers import Answer
from mmdist.serving.formats.inputs import check_generates, read_prompt
from mmdist.serving.formats.parameters import MindieParameters
from mmdist.serving.formats.triton_tensors import InputTensor, OutputName
from mmdist.serving.formats.vllm import VllmParameters
from mmdist.serving.messages import Body
from mmdist.serving.service import Service

RequestName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,256}$")]
INPUTS = {
    "input0": "UINT32",
    "text_input": "BYTES",
    "image": "BYTES",
    "sampling_parameters": "BYTES",
    "exclude_input_in_output": "BOOL",
    "stream": "BOOL",
}
OUTPUTS = {"output0": "UINT32", "text_output": "BYTES"}


class TritonParameters(MindieParameters):
    """max_tokens is another name of max_new_tokens. temperature=0 is greedy."""

    temperature: Annotated[float, Field(ge=0)] | None = None
    max_tokens: Annotated[int, Field(gt=0)] | None = None
    exclude_input_in_output: bool = True
    stream: bool | None = None

    def triton_sampling(self) -> SamplingParams:
        """ServeError 422, UserError."""
        if self.max_tokens is not None:
            if "max_new_tokens" in self.model_fields_set:
                raise ServeError(422, "parameters: max_tokens and max_new_tokens are one thing; give one of them")
            self.max_new_tokens = self.max_tokens
        return self.sampling()


class InferParameters(TritonParameters):
    binary_data_output: bool = False


class InferRequest(Body):
    id: RequestName | None = None
    inputs: Annotated[list[InputTensor], Field(min_length=1)]
    outputs: Annotated[list[OutputName], Field(min_length=1)] | None = None
    parameters: InferParameters = InferParameters()

    def check(self) -> None:
        """Names and kinds of the tensors; ServeError 422."""
        for tensor in self.inputs:
            if INPUTS.get(tensor.name) != tensor.datatype:
                expected = ", ".join(f"{name} ({kind})" for name, kind in INPUTS.items())
                raise ServeError(422, f"input {tensor.name} ({tensor.datatype}): expected {expected}")
        unknown = [output.name for output in self.outputs or () if output.name not in OUTPUTS]
        if unknown:
            raise ServeError(422, f"output {unknown[0]}: expected {' or '.join(OUTPUTS)}")

    def binary_outputs(self) -> dict[str, bool]:
        """The outputs asked for, and whether they go behind the JSON; without any, the input's counterpart."""
        by_default = self.parameters.binary_data_output
        if self.outputs is None:
            is_text = any(tensor.name == "text_input" for tensor in self.inputs)
            return {"text_output" if is_text else "output0": by_default}
        given = {output.name: output.parameters.binary_data for output in self.outputs}
        return {name: by_default if binary is None else binary for name, binary in given.items()}


async def read_inputs(service: Service, tensors: dict[str, list[Any]]) -> Prompt:
    """ServeError 422 and what read_prompt raises."""
    if ("input0" in tensors) == ("text_input" in tensors):
        raise ServeError(422, "inputs: expected one of input0 and text_input")
    if any(tensors.get("stream", [])):
        raise ServeError(422, "input stream: /infer answers once; ask /generate_stream")
    if "input0" in tensors:
        if "image" in tensors:
            raise ServeError(422, "input image: its placeholders stand in a text; give text_input")
        check_generates(service, "input0")
        return await service.prompt(token_ids=tensors["input0"])
    if len(tensors["text_input"]) != 1:
        raise ServeError(422, f"input text_input: expected one text, found {len(tensors['text_input'])}")
    return await read_prompt(service, "text_input", tensors["text_input"][0], tensors.get("image", ()))


def read_sampling(parameters: InferParameters, tensors: dict[str, list[Any]]) -> SamplingParams:
    """`sampling_parameters` is JSON with vLLM's names; without it, `parameters`. ServeError 422, UserError."""
    if "sampling_parameters" not in tensors:
        return parameters.triton_sampling()
    try:
        (text,) = tensors["sampling_parameters"]
        wanted = VllmParameters.model_validate(json.loads(text))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ServeError(422, f"sampling_parameters.{where}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise ServeError(422, f"sampling_parameters: not one text of JSON ({error})") from error
    if wanted.n > 1:
        raise ServeError(422, f"sampling_parameters.n={wanted.n}: /infer gives one answer")
    return wanted.sampling()


def write_answer(parameters: InferParameters, tensors: dict[str, list[Any]], answer: Answer) -> dict[str, list[Any]]:
    """-> every output's elements, by name."""
    excluded = tensors.get("exclude_input_in_output", [parameters.exclude_input_in_output])
    prefix = "" if all(excluded) else "".join(tensors.get("text_input", []))
    return {"output0": answer.token_ids, "text_output": [prefix + answer.text]}
