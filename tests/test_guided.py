"""json_schema and regex: an answer that ends has its form, in each family and at each world size."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import torch
from conftest import Case, answers, config_for, run_engine
from serve_cases import serve_config, served

from mmdist.config import SamplingParams, UserError
from mmdist.engine.engine import Engine
from mmdist.engine.grammar import CACHED, Grammars
from mmdist.engine.request import Output, Request

SHAPES = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "square", "\u00e9toile \U0001f642"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "sure": {"type": "boolean"},
        "words": {"type": "array", "items": {"type": "string", "maxLength": 6}, "minItems": 1, "maxItems": 2},
    },
    "required": ["shape", "count", "sure", "words"],
    "additionalProperties": False,
}
WORDS = "(red|green) (circle|square)s?|[0-9]{2,4}\u20ac"


def ask(case: Case, size: int, kinds: dict[str, dict[str, Any]]) -> dict[str, Output]:
    """Each kind's answer about the case's first item, all in one batch."""
    item_id = next(iter(case.items))

    def work(engine: Engine) -> Any:
        requests = []
        for name, kind in kinds.items():
            requests.append(case.request(engine, item_id, **{"max_new_tokens": 200, **kind}))
            requests[-1].id = name
        return answers(engine, requests)

    return run_engine(size, config_for(case, max_num_seqs=len(kinds)), work)


KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"json_schema": json.dumps(SHAPES)},
    "sampled": {"json_schema": json.dumps(SHAPES), "temperature": 1.5, "seed": 1},
    "top_k": {"json_schema": json.dumps(SHAPES), "temperature": 1.5, "top_k": 40, "seed": 2, "logprobs": 1},
    "penalized": {"json_schema": json.dumps(SHAPES), "frequency_penalty": 2.0, "temperature": 1.0, "seed": 3},
    "regex": {"regex": WORDS, "temperature": 2.0, "seed": 4},
    "free": {"max_new_tokens": 20},
}


@pytest.mark.parametrize("name", ["llava_15", "llava_next_34b", "mllama", "minigpt4", "llama_adapter_bias"])
def test_answers_have_their_form(name: str) -> None:
    """Random weights: nothing but the grammar keeps the form. Sentencepiece and byte vocabularies, padded ones too."""
    one, two = (ask(Case(name), size, KINDS) for size in (1, 2))
    for kind, output in one.items():
        assert two[kind].token_ids == output.token_ids
        if kind == "free":
            continue
        assert (output.finish_reason, output.stop_reason) == ("stop", None), (kind, output.text)
        if kind == "regex":
            assert re.fullmatch(WORDS, output.text)
        else:
            jsonschema.validate(json.loads(output.text), SHAPES)
    assert one["free"].token_ids == ask(Case(name), 1, {"free": KINDS["free"]})["free"].token_ids


def test_any_object_and_an_early_end(mistral: Case) -> None:
    """{} is any object. An answer cut short is the beginning of one, and says so."""
    brief = {3 + ord(mark): 8.0 for mark in '"}'}  # the byte pieces begin at 3
    params = {"json_schema": "{}", "temperature": 1.0, "max_new_tokens": 60}
    kinds = {str(seed): {**params, "seed": seed, "logit_bias": brief if seed else {}} for seed in range(8)}
    found = ask(mistral, 1, kinds)
    assert {output.finish_reason for output in found.values()} == {"stop", "length"}
    for output in found.values():
        assert output.text.startswith("{")
        if output.finish_reason == "stop":
            assert isinstance(json.loads(output.text), dict)
        else:
            assert output.num_tokens == 60


def test_a_grammar_that_may_end_ends_with_eos(mistral: Case) -> None:
    """Where more could follow, the model's own end-of-sequence is one of the choices, and no other special token is."""
    found = ask(mistral, 1, {"a": {"regex": "a*", "max_new_tokens": 30, "logit_bias": {2: 100.0}}})["a"]
    assert (found.text, found.token_ids, found.finish_reason, found.stop_reason) == ("", [2], "stop", None)
    found = ask(mistral, 1, {"a": {"regex": "[^z]*", "max_new_tokens": 30, "logit_bias": {1: 100.0, 2: -100.0}}})["a"]
    assert found.finish_reason == "length" and 1 not in found.token_ids


WRONG = {
    "json_schema: Invalid type: nope": {"json_schema": '{"type": "nope"}'},
    "json_schema: Unimplemented keys": {"json_schema": '{"not": {"type": "string"}}'},
    "json_schema: Resource 'http://x/y'": {"json_schema": '{"$ref": "http://x/y"}'},
    "regex: .*unclosed group": {"regex": "(a"},
    "regex: .*look-around": {"regex": "(?=a)b"},
}


@pytest.mark.parametrize("words", WRONG)
def test_what_is_no_grammar_is_refused_at_the_door(mistral: Case, words: str) -> None:
    def work(engine: Engine) -> None:
        request = Request("a", engine.prompts.prompt(text="hi"), SamplingParams(**WRONG[words]))
        with pytest.raises(UserError, match=words) as error:
            engine.add(request)
        assert "\n" not in str(error.value) and not engine.has_work

    run_engine(1, config_for(mistral), work)


def test_whole_words_spell_nothing() -> None:
    """The shipped checkpoints' tokenizers join words with blanks that no token has."""
    config = config_for(Path(__file__).parents[1] / "assets" / "llava-shapes", model="llava")

    def work(engine: Engine) -> None:
        with pytest.raises(UserError, match="tokens of this checkpoint are whole words"):
            engine.check_params(SamplingParams(json_schema="{}"))

    run_engine(1, config, work)


def test_without_the_extra_it_is_named(mistral: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)

    def work(engine: Engine) -> None:
        with pytest.raises(UserError, match=r"pip install 'mmdist\[guided\]'"):
            engine.check_params(SamplingParams(regex="a"))

    run_engine(1, config_for(mistral), work)


def test_grammars_are_compiled_once_and_states_are_apart(mistral: Case) -> None:
    def work(engine: Engine) -> None:
        grammars: Grammars = engine.grammars
        first, second = (grammars.begin(SamplingParams(regex="ab")) for _ in range(2))
        assert first is not None and second is not None and grammars._compile.cache_info().hits == 1
        first.accept(engine.prompts.tokenizer.convert_tokens_to_ids("a"))
        masks = [torch.zeros(engine.vocab_size) for _ in range(2)]
        first.mask(masks[0])
        second.mask(masks[1])
        assert not torch.equal(*masks)
        for number in range(CACHED + 1):
            grammars.begin(SamplingParams(regex=str(number)))
        assert grammars._compile.cache_info().currsize == CACHED

    run_engine(1, config_for(mistral), work)


def test_a_grammar_that_fails_ends_its_own_request_alone(mistral: Case) -> None:
    """llguidance gives up on a grammar that becomes too complex; the neighbours go on."""

    def work(engine: Engine) -> Any:
        item_id = next(iter(mistral.items))
        requests = [mistral.request(engine, item_id, max_new_tokens=8, **kind) for kind in ({"regex": "[a-z]{8}"}, {})]
        for number, request in enumerate(requests):
            request.id = str(number)
            engine.add(request)
        outputs = engine.step()
        grammar = engine.sequences["0"].grammar
        assert grammar is not None and grammar.error is None
        grammar.matcher.consume_token(5)  # what it does not allow: it is in its error state from now on
        while engine.has_work:
            outputs += engine.step()
        return {output.id: output for output in outputs}

    found = run_engine(1, config_for(mistral), work)
    assert found["0"].finish_reason == "error" and "grammar of the answer" in found["0"].error
    assert found["1"].finish_reason == "length" and found["1"].num_tokens == 8


def test_over_http(mistral: Case) -> None:
    """Compiled in the service's own thread: a bad form is the client's mistake, and the next request is answered."""
    with served(serve_config(mistral, mistral.model)) as url:
        forms = [{"type": "regex", "value": "(a"}, {"type": "regex", "value": "[a-z]{5}"}]
        bad, good = (
            httpx.post(f"{url}/generate", json={"inputs": "hi", "parameters": {"grammar": form}}, timeout=60)
            for form in forms
        )
    assert bad.status_code == 422 and "unclosed group" in bad.json()["error"]
    assert good.status_code == 200 and re.fullmatch("[a-z]{5}", good.json()["generated_text"])
