"""OpenAI's format with OpenAI's own client, against servers started as a user does."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CPU
from openai import APIStatusError, AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from serve_cases import PICTURES, SQUARE, Server, data_url, picture_message

from mmdist.config import Config, ModelConfig, SamplingParams
from mmdist.engine.load import load_engine
from mmdist.engine.request import Request
from mmdist.media import load_image
from mmdist.tasks.requests import user_message
from mmdist.tp import TP

QUESTION = "What is in the picture?"
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


def offline_answer(path: Path, **params: Any) -> Any:
    """The engine's last output, without any server."""
    config = Config(model=ModelConfig(name="llava_next", demo_checkpoint="assets/llava_next-shapes"), dtype="float32")
    engine = load_engine(config, TP(), CPU)
    prompt = engine.prompts.prompt(messages=[user_message(QUESTION, 1)], images=[load_image(path)])
    return list(engine.generate([Request("0", prompt, SamplingParams(**params))]))[-1]


def test_tokens_are_those_of_the_engine(client: OpenAI) -> None:
    wanted = offline_answer(SQUARE, max_new_tokens=24, logprobs=3)
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


def test_a_client_that_leaves_frees_the_engine(server: Server, client: OpenAI) -> None:
    before = server.metric("generation_tokens_total")
    stream = ask(client, SQUARE, stream=True, max_tokens=400, extra_body={"ignore_eos": True})
    for _, _ in zip(range(3), stream, strict=False):
        pass
    stream.close()
    assert server.wait_for_metric("num_requests_running", 0)
    assert server.metric("generation_tokens_total") - before < 300
    whole = ask(client, SQUARE)
    assert whole.choices[0].finish_reason == "stop"


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
