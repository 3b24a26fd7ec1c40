"""How a token is chosen and an answer ended: parity with transformers, and every key in the running engine."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from conftest import Case, answers, config_for, run_engine
from transformers.generation import logits_process as theirs

from mmdist.config import ModelConfig, SamplingParams, UserError
from mmdist.engine.detokenizer import Detokenizer, build_detokenizer
from mmdist.engine.engine import Engine
from mmdist.engine.logits_processors import LogitsProcessors, Penalties
from mmdist.engine.request import Request, Sequence
from mmdist.engine.sampler import Scores, likeliest, num_candidates, probabilities, sample
from mmdist.models.base import Processor, Prompt
from mmdist.models.family import find_model, load_model_config

VOCAB = 100
WARPERS: dict[str, Any] = {
    "top_k": lambda value: theirs.TopKLogitsWarper(value),
    "top_p": lambda value: theirs.TopPLogitsWarper(value),
    "min_p": lambda value: theirs.MinPLogitsWarper(value),
    "typical_p": lambda value: theirs.TypicalLogitsWarper(value),
}
CHOICES: list[dict[str, Any]] = [
    {"top_p": 0.7},
    {"top_k": 5},
    {"top_k": 20, "top_p": 0.5},
    {"top_k": 3, "top_p": 0.99},
    {"min_p": 0.05},
    {"top_k": 10, "min_p": 0.2},
    {"typical_p": 0.3},
    {"typical_p": 0.95},
    {"top_k": 12, "top_p": 0.9, "typical_p": 0.5},
    {},
]


@pytest.mark.parametrize("choice", CHOICES)
def test_what_is_left_to_choose_from_is_transformers(choice: dict[str, Any]) -> None:
    torch.manual_seed(0)
    seen = torch.randint(0, VOCAB, (10,))
    for _ in range(20):
        logits = torch.randn(VOCAB) * 3
        params = SamplingParams(temperature=0.7, repetition_penalty=1.3, **choice)
        values, ids = likeliest(LogitsProcessors(params, seen.tolist()).apply(logits, []), params)
        ours = torch.zeros(VOCAB).index_copy(0, ids, probabilities(values, params))
        wanted = theirs.RepetitionPenaltyLogitsProcessor(1.3)(seen[None], logits[None].clone())
        wanted = theirs.TemperatureLogitsWarper(0.7)(seen[None], wanted)
        for name, value in choice.items():
            wanted = WARPERS[name](value)(seen[None], wanted)
        torch.testing.assert_close(ours, wanted[0].softmax(-1))


def test_something_is_left_to_choose_from_however_little_is_asked_for() -> None:
    logits = torch.where(torch.arange(64) % 3 == 0, torch.randn(64), -torch.inf)
    for choice in ({"top_p": 5e-324}, {"typical_p": 5e-324}, {"min_p": 1.0}, {"temperature": 1000.0}):
        params = SamplingParams(**{"temperature": 1.0, **choice})
        assert probabilities(logits, params).sum() == pytest.approx(1), choice


def test_penalties_are_openais_and_kept_up() -> None:
    """logit - count * frequency - (count > 0) * presence, over the answer alone, token by token as all at once."""
    torch.manual_seed(0)
    prompt, output = torch.randint(0, VOCAB + 5, (50,)).tolist(), torch.randint(0, VOCAB, (400,)).tolist()
    params = SamplingParams(frequency_penalty=0.4, presence_penalty=-0.7, repetition_penalty=1.2)
    kept = Penalties(params, prompt)
    for length in (0, 1, 2, 70, 71, 400):
        logits = torch.randn(VOCAB)
        ours = logits.clone()
        kept.apply(ours, output[:length])
        seen = torch.tensor([[t for t in prompt + output[:length] if t < VOCAB]])
        counts = torch.bincount(torch.tensor(output[:length], dtype=torch.long), minlength=VOCAB)
        wanted = theirs.RepetitionPenaltyLogitsProcessor(1.2)(seen, logits[None].clone())[0]
        torch.testing.assert_close(ours, wanted - 0.4 * counts + 0.7 * (counts > 0))


def test_bias_and_suppressed_ends_are_transformers() -> None:
    torch.manual_seed(0)
    logits, ends, bias = torch.randn(VOCAB), {3, 7}, {5: 4.0, 9: -100.0}
    params = SamplingParams(min_new_tokens=2, logit_bias=bias)
    processors = LogitsProcessors(params, [1], ends)
    ids = torch.tensor([[1, 4]])
    wanted = theirs.SequenceBiasLogitsProcessor([[[i], b] for i, b in bias.items()])(ids, logits[None].clone())
    held = theirs.MinNewTokensLengthLogitsProcessor(1, 2, sorted(ends), device="cpu")(ids, wanted.clone())
    before = logits.clone()
    assert torch.equal(processors.apply(logits, [4]), held[0]) and torch.equal(logits, before)
    assert torch.equal(processors.apply(logits, [4, 4]), wanted[0])
    plain = LogitsProcessors(SamplingParams(), [1], ends)
    assert plain.apply(logits, [4]) is logits  # nothing as long as the vocabulary is made for nothing


def sequence(**params: Any) -> Sequence:
    request = Request("r", Prompt([1, 2]), SamplingParams(**params))
    return Sequence(request, Detokenizer(str, []), 1000, end_ids=frozenset({2}))


@pytest.mark.parametrize(
    ("params", "count"),
    [
        ({}, 1),
        ({"temperature": 1.0, "top_k": 7, "min_p": 0.1, "typical_p": 0.5}, 7),
        ({"temperature": 1.0, "min_p": 0.1}, 0),
        ({"frequency_penalty": 0.1}, 0),
        ({"presence_penalty": 0.1}, 0),
        ({"logit_bias": {1: 1.0}}, 0),
        ({"min_new_tokens": 1}, 0),
        ({"logprobs": 0}, 0),
    ],
)
def test_the_vocabulary_is_gathered_where_it_is_needed(params: dict[str, Any], count: int) -> None:
    state = sequence(**params)
    assert num_candidates(state) == count
    if "min_new_tokens" in params:
        state.output_ids.append(5)
        assert num_candidates(state) == 1  # from the second token on


def test_equal_logits_are_taken_by_rising_id() -> None:
    assert sample(Scores(torch.zeros(VOCAB)), sequence(logit_bias={4: -1.0, 0: -1.0})) == 1
    assert sample(Scores(torch.zeros(VOCAB)), sequence(min_new_tokens=1, logit_bias={2: 9.0})) == 0


KINDS: list[dict[str, Any]] = [
    {"frequency_penalty": 2.0},
    {"presence_penalty": -2.0},
    {"frequency_penalty": -2.0, "temperature": 1.0},
    {"min_p": 0.1, "temperature": 1.0},
    {"min_p": 0.1, "temperature": 1.0, "top_k": 20},
    {"typical_p": 0.4, "temperature": 1.0},
    {"logit_bias": {40: 100.0}},
    {"min_new_tokens": 9, "temperature": 1.0},
    {"regex": "[a-z]{3,9}"},
    {"regex": "[0-9]{40}", "temperature": 1.0, "top_k": 3},
]


def test_neighbours_and_world_size_change_nothing(mistral: Case) -> None:
    """Each kind alone, beside all the others, and on two ranks; and each does something."""
    item_id = next(iter(mistral.items))

    def work(engine: Engine) -> Any:
        requests = [mistral.request(engine, item_id, max_new_tokens=12, seed=3, **kind) for kind in KINDS]
        for number, request in enumerate(requests):
            request.id = str(number)
        return {i: output.token_ids for i, output in answers(engine, requests).items()}

    alone = run_engine(1, config_for(mistral, max_num_seqs=1), work)
    assert run_engine(1, config_for(mistral, max_num_seqs=len(KINDS)), work) == alone
    assert run_engine(2, config_for(mistral, max_num_seqs=len(KINDS)), work) == alone
    assert len(set(map(tuple, alone.values()))) == len(KINDS)
    assert alone["6"] == [40] * 12


def test_stop_tokens_and_reasons(mistral: Case) -> None:
    """What ended an answer is said; the ending token's text is left out unless it is asked for."""
    ids = mistral.reference()["panorama/greedy_ids"].ravel().tolist()
    kinds: dict[str, dict[str, Any]] = {
        "token": {"stop_token_ids": [ids[9], VOCAB]},
        "kept": {"stop_token_ids": [ids[9]], "include_stop_str_in_output": True},
        "later": {"stop_token_ids": [ids[9]], "min_new_tokens": 11},
        "text": {"stop": ["5Y", "Y"]},
        "text kept": {"stop": ["5Y"], "include_stop_str_in_output": True},
        "length": {"max_new_tokens": 3},
        "eos": {},
    }

    def work(engine: Engine) -> Any:
        engine.eos_token_ids = {ids[10]}
        requests = []
        for name, kind in kinds.items():
            requests.append(mistral.request(engine, "panorama", **{"max_new_tokens": 12, **kind}))
            requests[-1].id = name
        return answers(engine, requests), [engine.prompts.decode(ids[:length]) for length in (9, 10, 12)]

    found, (text, longer, whole) = run_engine(1, config_for(mistral, max_num_seqs=8), work)
    reasons = {name: (output.finish_reason, output.stop_reason) for name, output in found.items()}
    assert reasons == {
        "token": ("stop", ids[9]), "kept": ("stop", ids[9]), "later": ("length", None), "text": ("stop", "Y"),
        "text kept": ("stop", "5Y"), "length": ("length", None), "eos": ("stop", None),
    }  # fmt: skip
    assert found["token"].text == text != longer == found["kept"].text == found["eos"].text
    assert found["token"].token_ids == found["kept"].token_ids == ids[:10]
    assert found["later"].token_ids[:9] == ids[:9] and not {ids[9], ids[10]} & set(found["later"].token_ids[:11])
    assert found["text"].text == whole.partition("Y")[0] and found["text kept"].text == whole.partition("5Y")[0] + "5Y"
    assert found["eos"].num_tokens == 11 and found["eos"].token_id == ids[10]


@pytest.mark.parametrize("key", ["stop_token_ids", "logit_bias"])
def test_tokens_outside_the_vocabulary_are_refused(mistral: Case, key: str) -> None:
    def work(engine: Engine) -> None:
        size = engine.vocab_size
        engine.check_params(SamplingParams(stop_token_ids=[size - 1]))
        params = SamplingParams(**{key: [size] if key == "stop_token_ids" else {size: 1.0}})
        with pytest.raises(UserError, match=f"{key}.*token {size}"):
            engine.add(Request("a", engine.prompts.prompt(text="hi"), params))
        assert not engine.sequences

    run_engine(1, config_for(mistral), work)


def load_processor(case: Case) -> Processor:
    family = find_model(case.model)
    return family.load_processor(
        case.checkpoint, load_model_config(family, case.checkpoint), ModelConfig(name=case.model)
    )


DECODED = ["llava_15", "mllama", "llava_next_34b", "minigpt4", "llama_adapter_bias"]


@pytest.mark.parametrize("name", DECODED)
def test_deltas_make_the_text(name: str) -> None:
    """Random tokens (bytes of broken characters, special ones, words) and stop texts that cross them."""
    processor, rng = load_processor(Case(name)), random.Random(0)
    num_tokens = 300
    for _ in range(400):
        ids = [rng.randrange(num_tokens) for _ in range(rng.randrange(1, 12))]
        if rng.random() < 0.5:
            ids = processor.tokenizer.encode(rng.choice(["über 🙂🙂 ok", "日本語\n\n", "a  b", "€##§"])) + ids
        params = SamplingParams(
            stop=stops(rng, processor.decode(ids)),
            skip_special_tokens=rng.random() < 0.7,
            include_stop_str_in_output=rng.random() < 0.5,
        )
        check_stream(processor, params, ids)


def stops(rng: random.Random, text: str) -> list[str]:
    """Parts of the text, a few of which are not in it."""
    starts = [rng.randrange(len(text) + 1) for _ in range(rng.randrange(4))]
    return [cut + rng.choice(["", "", "x"]) for s in starts if (cut := text[s : s + rng.randrange(1, 5)])]


def check_stream(processor: Processor, params: SamplingParams, ids: list[int]) -> None:
    detokenizer = build_detokenizer(processor, params)
    deltas, stopped = [], False
    for place, token_id in enumerate(ids):
        last = place == len(ids) - 1
        stopped = detokenizer.push(token_id) or (last and detokenizer.finish())
        deltas.append(detokenizer.take(finished=stopped or last))
        if stopped:
            break
    text, whole = detokenizer.text, processor.decode(ids, params.skip_special_tokens)
    assert "".join(deltas) == text
    if not stopped:
        assert text == whole or "\ufffd" in whole
        return
    assert detokenizer.stop_reason is None or detokenizer.stop_reason in params.stop
    if detokenizer.stop_reason is not None and params.include_stop_str_in_output:
        assert text.endswith(detokenizer.stop_reason)
        text = text[: -len(detokenizer.stop_reason)]
    assert not any(stop in text for stop in params.stop)


@pytest.mark.parametrize("name", ["llava_15", "mllama", "minigpt4", "llama_adapter_bias"])
def test_special_tokens_are_named_where_asked(name: str) -> None:
    processor = load_processor(Case(name))
    words = processor.tokenizer.encode("one two")
    special = 321 if name == "mllama" else 2
    ids = [words[-1], special, *words]
    shown = processor.decode(ids, skip_special_tokens=False)
    assert ("<|end_of_text|>" if name == "mllama" else "</s>") in shown
    assert processor.decode(ids).replace(" ", "") == processor.decode([words[-1], *words]).replace(" ", "")
    assert "two" in shown and "<" not in processor.decode(ids)


def test_the_stop_text_complete_first_counts() -> None:
    """However the tokens fall: here one brings all of them."""
    detokenizer = Detokenizer(lambda ids: "abcd" * len(ids), ["bcd", "c"], ["d"])
    assert detokenizer.push(0) and detokenizer.text == "ab" and detokenizer.stop_reason == "c"
    own = Detokenizer(lambda ids: "abcd" * len(ids), [], ["b"], include_stop=True)
    assert own.push(0) and own.text == "a" and own.stop_reason is None
