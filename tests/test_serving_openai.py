"""OpenAI's format with OpenAI's own client, against servers started as a user does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CPU, Case, config_for
from openai import APIStatusError, APITimeoutError, AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from serve_cases import PICTURES, REPOSITORY, SQUARE, Server, data_url, picture_message, serve_config, served

from mmdist.config import Config, SamplingParams
from mmdist.engine.load import load_engine
from mmdist.engine.request import Request
from mmdist.media import load_image
from mmdist.tasks.requests import user_message
from mmdist.tp import TP

QUESTION = "What is in the picture?"
SHAPES = REPOSITORY / "assets" / "llava_next-shapes"
RANDOM = Case("llava_next_mistral")
BOAT = RANDOM.folder / "inputs" / "panorama.png"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
LOGPROBS: dict[str, Any] = {"logprobs": True, "top_logprobs": 3}
WILD: dict[str, Any] = {"temperature": 2, "max_tokens": 24, "extra_body": {"ignore_eos": True}}


def client_of(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def client(server: Server) -> OpenAI:
    return client_of(server)


def ask(client: OpenAI, *paths: Path, text: str = QUESTION, **options: Any) -> Any:
    messages: list[Any] = [picture_message(text, *paths)]
    return client.chat.completions.create(model="llava_next", messages=messages, **{**GREEDY, **options})


def text_of(answer: Any, index: int = 0) -> str:
    return answer.choices[index].message.content


def offline_answers(path: Path, params: list[dict[str, Any]], config: Config) -> list[Any]:
    """The engine's last outputs, without any server; each request alone."""
    engine = load_engine(config, TP(), CPU)
    prompt = engine.prompts.prompt(messages=[user_message(QUESTION, 1)], images=[load_image(path)])
    requests = [Request("0", prompt, SamplingParams(**{"max_new_tokens": 24, **one})) for one in params]
    return [list(engine.generate([request]))[-1] for request in requests]


def test_tokens_are_those_of_the_engine(client: OpenAI) -> None:
    (wanted,) = offline_answers(SQUARE, [{"logprobs": 3}], config_for(SHAPES))
    answer = ask(client, SQUARE, **LOGPROBS, extra_body={"return_token_ids": True})
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (wanted.text, wanted.finish_reason)
    assert (choice.token_ids, answer.prompt_token_ids) == (wanted.token_ids, wanted.prompt_token_ids)
    told = [entry.logprob for entry in choice.logprobs.content]
    assert told == pytest.approx([entry["logprob"] for entry in wanted.logprobs], abs=1e-4)
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(wanted.prompt_token_ids), len(wanted.token_ids))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_conversation(client: OpenAI) -> None:
    """The second turn has the picture of the first, and a picture of its own."""
    first = picture_message(QUESTION, SQUARE)
    answer = text_of(ask(client, SQUARE))
    second = picture_message("And in this one?", PICTURES / "shapes_tall.png")
    messages: list[Any] = [first, {"role": "assistant", "content": answer}, second]
    both = client.chat.completions.create(model="llava_next", messages=messages, **GREEDY)
    without = client.chat.completions.create(model="llava_next", messages=[*messages[:2], second], **GREEDY)
    assert text_of(both) == text_of(without) and both.usage.prompt_tokens > 100
    assert both.choices[0].message.role == "assistant"


def collect(stream: Any) -> tuple[dict[int, str], list[Any]]:
    """The text of each choice, and all chunks."""
    texts: dict[int, str] = {}
    chunks = list(stream)
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    return texts, chunks


@pytest.mark.parametrize("options", [{}, WILD | {"seed": 5}, WILD | {"seed": 5, "n": 2}], ids=["greedy", "wild", "two"])
def test_streamed_is_whole(client: OpenAI, options: dict[str, Any]) -> None:
    whole = ask(client, SQUARE, **LOGPROBS, **options)
    texts, chunks = collect(ask(client, SQUARE, stream=True, **LOGPROBS, **options))
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    ends = {c.index: c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason}
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    for choice in whole.choices:
        parts = [
            c.logprobs.content for chunk in chunks for c in chunk.choices if c.index == choice.index and c.logprobs
        ]
        entries, wanted = [entry for part in parts for entry in part], choice.logprobs.content
        assert [entry.token for entry in entries] == [entry.token for entry in wanted]
        # Not bit by bit: what is computed together with others is summed in another order.
        assert [e.logprob for e in entries] == pytest.approx([e.logprob for e in wanted], abs=1e-3)
    assert len({(c.id, c.created, c.model, c.system_fingerprint) for c in chunks}) == 1
    firsts = {c.index: c.delta.role for chunk in reversed(chunks) for c in chunk.choices}
    assert set(firsts.values()) == {"assistant"} and {c.object for c in chunks} == {"chat.completion.chunk"}


def test_the_stream_as_it_goes_over_the_wire(server: Server) -> None:
    body = {"messages": [picture_message(QUESTION, SQUARE)], "stream": True, **GREEDY}
    with server.client() as client:
        plain = client.post("/v1/chat/completions", json=body)
        counted = client.post("/v1/chat/completions", json=body | {"stream_options": {"include_usage": True}})
    assert plain.headers["content-type"].startswith("text/event-stream")
    lines = plain.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""] and all(line.startswith("data: {") for line in lines[:-2])
    first = json.loads(lines[0].removeprefix("data: "))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""} and "usage" not in first
    *chunks, last = [json.loads(line.removeprefix("data: ")) for line in counted.text.split("\n\n")[:-2]]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] > 2


def test_seeds(client: OpenAI) -> None:
    """Each answer has a seed of its own; the same seed gives the same answers."""
    first, again, other = (ask(client, SQUARE, n=3, seed=seed, **WILD) for seed in (7, 7, 70))
    texts = [[text_of(answer, index) for index in range(3)] for answer in (first, again, other)]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) == 3
    assert first.usage.prompt_tokens == ask(client, SQUARE).usage.prompt_tokens
    assert first.usage.completion_tokens == 3 * 24


def test_stop(client: OpenAI) -> None:
    whole = text_of(ask(client, PICTURES / "shapes.png"))
    word = whole.split()[3]
    answer = ask(client, PICTURES / "shapes.png", stop=["nowhere", word])
    assert (text_of(answer), answer.choices[0].finish_reason) == (whole[: whole.index(word)], "stop")
    assert answer.choices[0].stop_reason == word
    kept = ask(client, PICTURES / "shapes.png", stop=word, extra_body={"include_stop_str_in_output": True})
    assert text_of(kept) == whole[: whole.index(word) + len(word)]
    texts, _ = collect(ask(client, PICTURES / "shapes.png", stop=word, stream=True))
    assert texts == {0: text_of(answer)}
    cut = ask(client, PICTURES / "shapes.png", max_tokens=3)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 3


def test_logprobs(client: OpenAI) -> None:
    answer = ask(client, SQUARE, **LOGPROBS)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert "".join(entry.token for entry in content[:-1]) == text_of(answer)  # the last ends the answer
    for entry in content:
        assert bytes(entry.bytes).decode() == entry.token
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].logprob >= entry.logprob
    bare = ask(client, SQUARE, logprobs=True)
    assert [entry.top_logprobs for entry in bare.choices[0].logprobs.content] == [[]] * len(content)


def test_completions(client: OpenAI) -> None:
    prompts: list[Any] = ["red and", [5, 6, 7]]
    options: dict[str, Any] = {
        "model": "llava_next",
        "temperature": 0,
        "max_tokens": 6,
        "extra_body": {"ignore_eos": True},
    }
    alone = [client.completions.create(prompt=prompt, **options).choices[0].text for prompt in prompts]
    both = client.completions.create(prompt=prompts, n=2, **options)
    assert [(choice.index, choice.text) for choice in both.choices] == [
        (index, alone[index // 2]) for index in range(4)
    ]
    echoed = client.completions.create(prompt="red and", echo=True, stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in echoed) == "red and" + alone[0]
    told = client.completions.create(prompt="red and", logprobs=2, **options).choices[0].logprobs
    assert len(told.tokens) == 6 and told.text_offset[0] == 0
    for token, offset in zip(told.tokens, told.text_offset, strict=True):
        assert "</s>" in token or alone[0][offset:].startswith(token)
    assert all(token in top for token, top in zip(told.tokens, told.top_logprobs, strict=True))
    counted = client.completions.create(prompt="red", model="llava_next", extra_body={"ignore_eos": True}).usage
    assert counted.completion_tokens == 16


def test_models(client: OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, model.object) == ("llava_next", "model") and client.models.retrieve("llava_next") == model
    with pytest.raises(NotFoundError) as error:
        client.models.retrieve("org/other")
    assert error.value.code == "model_not_found"
    with pytest.raises(NotFoundError) as error:
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "Hi"}])
    assert (error.value.code, error.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_frees_the_engine(server: Server, client: OpenAI, streams: bool) -> None:
    before = server.metric("generation_tokens_total")
    long: dict[str, Any] = {"max_tokens": 400, "n": 4, "extra_body": {"ignore_eos": True}}
    if streams:
        stream = ask(client, SQUARE, stream=True, **long)
        assert len([chunk for _, chunk in zip(range(3), stream, strict=False)]) == 3
        stream.close()
    else:
        with pytest.raises(APITimeoutError):
            ask(client, SQUARE, timeout=0.5, **long)
    assert server.wait_for_metric("num_requests_running", 0)
    assert server.metric("generation_tokens_total") - before < 1200
    assert ask(client, SQUARE).choices[0].finish_reason == "stop"


def test_another_request_cancels_one(server: Server, client: OpenAI) -> None:
    long: dict[str, Any] = {"max_tokens": 400, "extra_body": {"ignore_eos": True, "request_id": "mine"}}
    stream = ask(client, SQUARE, stream=True, n=2, **long)
    assert next(iter(stream)).id == "chatcmpl-mine"
    with server.client() as other:
        assert other.post("/v2/models/llava_next/stopInfer", json={"id": "mine"}).status_code == 200
    ends = [choice.finish_reason for chunk in stream for choice in chunk.choices if choice.finish_reason]
    assert ends == ["abort", "abort"]


def mixed_requests() -> list[dict[str, Any]]:
    pictures = sorted(PICTURES.glob("*.png"))
    requests: list[dict[str, Any]] = []
    for number in range(16):
        path = pictures[number % len(pictures)]
        text = f"{QUESTION} {'Say more. ' * (number % 5)}"
        messages = [picture_message(text, path)] if number % 4 else [{"role": "user", "content": text}]
        options = {**WILD, "seed": number} if number % 2 else GREEDY
        requests.append({"messages": messages, "stop": ["triangle"] if number % 3 else None, **options})
    return requests


def test_sixteen_at_once_answer_as_each_alone(server: Server) -> None:
    client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    async def text(request: dict[str, Any], stream: bool) -> str:
        if not stream:
            return text_of(await client.chat.completions.create(model="llava_next", **request))
        chunks = await client.chat.completions.create(model="llava_next", stream=True, **request)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async def run() -> None:
        requests = mixed_requests()
        alone = [await text(request, False) for request in requests]
        together = await asyncio.gather(*(text(request, bool(i % 2)) for i, request in enumerate(requests)))
        assert together == alone and len(set(alone)) > 8

    asyncio.run(run())


def test_one_rank_and_another_family(llava_server: Server) -> None:
    client = client_of(llava_server)
    messages: list[Any] = [picture_message(QUESTION, SQUARE)]
    whole = client.chat.completions.create(model="llava", messages=messages, **GREEDY)
    texts, _ = collect(client.chat.completions.create(model="llava", messages=messages, stream=True, **GREEDY))
    assert "circle" in text_of(whole) and texts == {0: text_of(whole)}


def test_pictures_and_placeholders(client: OpenAI) -> None:
    bare = {"type": "image_url", "image_url": data_url(SQUARE)}
    coded = {"type": "image", "image": data_url(SQUARE).partition(",")[2]}
    want = text_of(ask(client, SQUARE))
    for part in (bare, coded):
        messages: Any = [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}]
        assert text_of(client.chat.completions.create(model="llava_next", messages=messages, **GREEDY)) == want
    with pytest.raises(BadRequestError, match="2 <image> in the prompt, 1 pictures given"):
        ask(client, SQUARE, text="<image> " + QUESTION)
    with pytest.raises(BadRequestError, match="21 pictures and videos; at most 20"):
        ask(client, *[SQUARE] * 21)
    with pytest.raises(BadRequestError, match="picture: not a picture"):
        ask(client, Path(__file__))
    with pytest.raises(BadRequestError) as error:
        ask(client, SQUARE, text="red " * 3000)
    assert error.value.code == "context_length_exceeded"


def test_errors_are_openais(client: OpenAI) -> None:
    with pytest.raises(APIStatusError) as error:
        ask(client, SQUARE, extra_body={"no_such": 1})
    assert error.value.status_code == 400
    body: Any = error.value.body
    assert set(body) == {"message", "type", "param", "code"} and body["param"] == "no_such"


def test_usage_says_what_was_cached(client: OpenAI) -> None:
    text = "Tell me about this one, which nobody has asked about before."
    usages = [ask(client, SQUARE, text=text, n=2).usage for _ in range(2)]
    first, again = (usage.prompt_tokens_details.cached_tokens for usage in usages)
    assert first < again < usages[0].prompt_tokens and again >= usages[0].prompt_tokens - 16  # all but the last block


PENALTIES: list[dict[str, Any]] = [
    {"frequency_penalty": 1.5},
    {"presence_penalty": 2.0},
    {"repetition_penalty": 1.8},
    {"logit_bias": {"5": 6.0}},
    {"min_p": 0.2, "temperature": 1.5, "seed": 3},
    {"top_p": 0.5, "top_k": 7, "temperature": 1.9, "seed": 3},
    {"min_tokens": 20},
    {"stop_token_ids": [5, 17]},
    {"skip_special_tokens": False},
]


@pytest.fixture(scope="module")
def golden() -> Iterator[OpenAI]:
    """A checkpoint of random weights, which is never certain and knows every byte."""
    with served(serve_config(RANDOM, "llava_next")) as url:
        yield OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_sampling_is_the_engines(golden: OpenAI) -> None:
    """Each field does what the engine's does; names differ where OpenAI's or vLLM's do."""
    ours = {"min_tokens": "min_new_tokens"}
    params = [{ours.get(name, name): value for name, value in fields.items()} for fields in PENALTIES]
    plain, *wanted = offline_answers(BOAT, [{}, *params], config_for(RANDOM))
    found = [ask(golden, BOAT, extra_body={"return_token_ids": True, **fields}).choices[0] for fields in PENALTIES]
    assert [choice.token_ids for choice in found] == [output.token_ids for output in wanted]
    assert [choice.message.content for choice in found] == [output.text for output in wanted]
    assert sum(output.token_ids != plain.token_ids for output in wanted) >= 5  # they do something


def test_json_follows_its_schema(golden: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"shape": {"enum": ["circle", "square"]}, "count": {"type": "integer", "maximum": 99}},
        "required": ["shape", "count"],
        "additionalProperties": False,
    }
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "shapes", "schema": schema}}
    whole = ask(golden, BOAT, response_format=wanted, max_tokens=100)
    texts, _ = collect(ask(golden, BOAT, response_format=wanted, max_tokens=100, stream=True))
    anything = ask(golden, BOAT, response_format={"type": "json_object"}, max_tokens=3)
    broken: Any = {"name": "shapes", "schema": {"type": "nothing"}}
    with pytest.raises(BadRequestError):
        ask(golden, BOAT, response_format={"type": "json_schema", "json_schema": broken})
    answer = json.loads(text_of(whole))
    assert set(answer) == {"shape", "count"} and texts == {0: text_of(whole)}
    assert text_of(anything).startswith("{")
