"""examples/bm1684x: the static files answer as the engine does, and what the published runner gets wrong is right."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Case, answers, config_for, run_engine
from pipeline import Pipeline, build_parser, main
from static_cases import GOLDEN_LENGTH, SHAPES_LENGTH
from static_model import Network, Sampling, StaticModel

from mmdist.config import SamplingParams, UserError
from mmdist.engine.engine import Engine
from mmdist.engine.logits_processors import LogitsProcessors
from mmdist.engine.request import Request
from mmdist.engine.sampler import likeliest, probabilities
from mmdist.media import load_image
from mmdist.models.base import Prompt
from mmdist.tasks.requests import user_message

REPOSITORY = Path(__file__).parents[1]
PICTURES = REPOSITORY / "assets" / "pictures"
ONE_PICTURE = ["banner", "ladder", "strip", "stamp", "postcard", "text_first", "no_image"]
QUESTIONS = ["What is in the picture?", "How many objects are there?", "What color is the circle?"]


@pytest.fixture(scope="module")
def golden() -> Case:
    return Case("mllama")


@pytest.fixture(scope="module")
def prompts(golden: Case) -> dict[str, Prompt]:
    def work(engine: Engine) -> dict[str, Prompt]:
        return {name: golden.request(engine, name).prompt for name in golden.items}

    return run_engine(1, config_for(golden, max_model_len=GOLDEN_LENGTH), work)


@pytest.fixture(scope="module")
def model(static_golden: Path) -> StaticModel:
    return StaticModel(static_golden)


class Noted:
    """A network and what it is given."""

    def __init__(self, network: Network):
        self.network, self.shapes = network, network.shapes
        self.given: list[dict[str, np.ndarray]] = []

    def __call__(self, **inputs: np.ndarray) -> list[np.ndarray]:
        self.given.append({name: x.copy() for name, x in inputs.items()})
        return self.network(**inputs)


@contextmanager
def noted(networks: list[Any], number: int) -> Iterator[list[dict[str, np.ndarray]]]:
    network = networks[number]
    networks[number] = Noted(network)
    yield networks[number].given
    networks[number] = network


def generate(model: StaticModel, prompt: Prompt, **sampling: Any) -> list[int]:
    return list(model.generate(prompt, Sampling(**sampling)))


@pytest.mark.parametrize("name", ONE_PICTURE)
def test_greedy_tokens_are_the_references(model: StaticModel, golden: Case, prompts: dict, name: str) -> None:
    wanted = golden.reference()[f"{name}/greedy_ids"].ravel().tolist()
    assert generate(model, prompts[name], max_new_tokens=12) == wanted


def test_two_pictures_have_no_room(model: StaticModel, prompts: dict) -> None:
    with pytest.raises(UserError, match="2 pictures: these files have room for one"):
        generate(model, prompts["pair"])


def test_the_row_mask_is_one_where_the_picture_is_seen(model: StaticModel, prompts: dict) -> None:
    """The published runner writes float16's 1 where bfloat16 is read and the other way round: 0.0078 and 1.875. And it
    takes the sixth token for the picture's place whatever the prompt."""
    places = {name: prompts[name].memory[0].start for name in ONE_PICTURE if prompts[name].memory}
    assert len(set(places.values())) > 1 and places["text_first"] != 6
    cross, image_token = model.crosses.index(True), 336  # of golden's config.json
    for name, start in places.items():
        assert prompts[name].token_ids[start] == image_token
        with noted(model.blocks, cross) as given:
            generate(model, prompts[name], max_new_tokens=1)
        rows = given[0]["text_row_mask"].ravel()
        assert rows.dtype == np.float32
        assert rows[:start].tolist() == [0.0] * start and rows[start:].tolist() == [1.0] * (GOLDEN_LENGTH - start)


def test_a_token_sees_the_tiles_its_picture_has(model: StaticModel, prompts: dict) -> None:
    """The published runner shows every token of the answer two tiles, of whatever picture."""
    tiles = {name: prompts[name].memory[0].num_tiles for name in ONE_PICTURE if prompts[name].memory}
    assert len(set(tiles.values())) >= 3
    cross = model.crosses.index(True)
    for name, num_tiles in tiles.items():
        with noted(model.cached, cross) as given:
            generate(model, prompts[name], max_new_tokens=3)
        assert len(given) == 2
        for inputs in given:
            mask = inputs["attention_mask"].reshape(model.num_tiles, model.num_patches)
            assert (mask[:num_tiles] == 0).all() and (mask[num_tiles:] < -9000).all()


def test_kv_heads_are_stored_once(model: StaticModel, golden: Case, prompts: dict) -> None:
    """The published files keep a picture's keys and values for every query head."""
    generate(model, prompts["ladder"], max_new_tokens=1)
    config = golden.checkpoint / "config.json"
    assert '"num_key_value_heads": 4' in config.read_text() and '"num_attention_heads": 8' in config.read_text()
    for crosses, past in zip(model.crosses, model.past, strict=True):
        rows = model.num_tiles * model.num_patches
        assert {x.shape for x in past} == {(1, 4, rows, 10) if crosses else (1, GOLDEN_LENGTH, 4, 10)}


def test_max_new_tokens_and_the_end_of_the_files(model: StaticModel, prompts: dict) -> None:
    """The published runner stops at the end of a sentence or of its memory only."""
    for count in (1, 5):
        assert len(generate(model, prompts["stamp"], max_new_tokens=count)) == count
    room = GOLDEN_LENGTH - len(prompts["postcard"].token_ids)
    assert len(generate(model, prompts["postcard"], max_new_tokens=1000)) == room


def test_text_past_the_sequence_length_is_refused(model: StaticModel) -> None:
    for length, fits in ((GOLDEN_LENGTH - 1, True), (GOLDEN_LENGTH, False), (GOLDEN_LENGTH + 9, False)):
        if fits:
            assert len(generate(model, Prompt([5] * length))) == 1
            continue
        with pytest.raises(UserError, match=f"has {length} tokens, and with an answer it must fit the {GOLDEN_LENGTH}"):
            generate(model, Prompt([5] * length))


@pytest.mark.parametrize(
    ("temperature", "top_p", "penalty", "last_n"),
    [(0.6, 0.9, 1.0, 32), (1.7, 0.5, 1.3, 8), (0.2, 1.0, 0.8, 0), (1.0, 0.01, 1.0, 32)],
)
def test_temperature_top_p_and_penalty_do_what_they_say(
    model: StaticModel, prompts: dict, temperature: float, top_p: float, penalty: float, last_n: int
) -> None:
    """The probabilities the next token is drawn by are the engine's, with its top_k at 50."""
    logits = model.prefill(prompts["strip"])
    drawn = []

    class Draw:
        def choice(self, tokens: np.ndarray, p: np.ndarray) -> int:
            drawn.append(dict(zip(tokens.tolist(), p.tolist(), strict=True)))
            return int(tokens[0])

    sampling = Sampling("penalty_sample", temperature, top_p, penalty, last_n)
    model.choose(logits, sampling, Draw())  # type: ignore[arg-type]
    scores = torch.from_numpy(logits[0])
    recent = model.tokens[-last_n:] if last_n else []
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=50, repetition_penalty=penalty)
    best, ids = likeliest(LogitsProcessors(params, recent).apply(scores, []), params)
    wanted = dict(zip(ids.tolist(), probabilities(best, params).tolist(), strict=True))
    assert drawn[0].keys() == wanted.keys()
    assert [drawn[0][i] for i in wanted] == pytest.approx([wanted[i] for i in wanted], abs=1e-6)
    assert (sum(p > 0 for p in drawn[0].values()) == 1) == (top_p == 0.01)


def test_samples_are_drawn_and_seeded(model: StaticModel, prompts: dict) -> None:
    def draw(seed: int) -> list[int]:
        return generate(
            model, prompts["stamp"], mode="penalty_sample", temperature=5.0, top_p=1.0, max_new_tokens=6, seed=seed
        )

    assert draw(1) == draw(1) and len({tuple(draw(seed)) for seed in range(4)}) > 2


def pipeline(folder: Path, *argv: str) -> Pipeline:
    return Pipeline(build_parser().parse_args(["-m", str(folder), "--max_new_tokens", "40", *argv]))


@pytest.fixture(scope="module")
def engines_answers() -> dict[tuple[str, ...], str]:
    """(picture or nothing, questions so far) -> the engine's answer to the last one, in the pipeline's turns."""

    def work(engine: Engine) -> dict[tuple[str, ...], str]:
        found: dict[tuple[str, ...], str] = {}
        for name in ("", "shapes.png", "shapes_wide.png", "shapes_tall.png"):
            images = [load_image(PICTURES / name)] if name else []
            messages: list[dict] = [{"role": "user", "content": [{"type": "image"}]}] if name else []
            for number, question in enumerate(QUESTIONS):
                messages = [*messages, user_message(question, 0)]
                prompt = engine.prompts.prompt(messages=messages, images=images)
                request = Request("chat", prompt, SamplingParams(max_new_tokens=40))
                output = answers(engine, [request])["chat"]
                assert output.error is None
                found[name, *QUESTIONS[: number + 1]] = output.text
                messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": output.text}]}]
        return found

    folder = REPOSITORY / "assets" / "mllama-shapes"
    return run_engine(1, config_for(folder, model="mllama", max_model_len=SHAPES_LENGTH), work)


@pytest.mark.parametrize("name", ["", "shapes.png", "shapes_wide.png", "shapes_tall.png"])
def test_a_conversation_is_the_engines(
    static_shapes: Path, engines_answers: dict, name: str, capsys: pytest.CaptureFixture
) -> None:
    chat = pipeline(static_shapes, *(["-i", str(PICTURES / name)] if name else []))
    for number, question in enumerate(QUESTIONS):
        wanted = engines_answers[name, *QUESTIONS[: number + 1]]
        assert chat.ask(question) == wanted
        assert f"\nAnswer: {wanted}\n" in capsys.readouterr().out


def test_without_history_each_question_stands_alone(static_shapes: Path, engines_answers: dict) -> None:
    chat = pipeline(static_shapes, "-i", str(PICTURES / "shapes.png"), "--no-enable_history")
    chat.ask(QUESTIONS[1])
    assert chat.ask(QUESTIONS[0]) == engines_answers["shapes.png", QUESTIONS[0]]


def test_unprompted_is_the_question_alone(static_shapes: Path) -> None:
    chat = pipeline(static_shapes, "-i", str(PICTURES / "shapes.png"), "--prompt_mode", "unprompted")
    chat.ask(QUESTIONS[0])
    plain = chat.processor.prompt(text=f"<|image|>{QUESTIONS[0]}", images=[chat.image]).token_ids
    assert chat.model.tokens[: len(plain)] == plain


def test_a_whole_chat(static_shapes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """What is too long is refused and the conversation goes on as it was."""
    lines = [QUESTIONS[0], "color " * 200, QUESTIONS[1], "new", str(PICTURES / "shapes_wide.png"), QUESTIONS[0], "",
             "clear", "no_such.png", "quit"]  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    assert main(["-m", str(static_shapes), "-i", str(PICTURES / "shapes.png")]) == 0
    out = capsys.readouterr().out
    told = [line.partition("Answer: ")[2] for line in out.splitlines() if "Answer: " in line]
    assert len(told) == 3 and "yellow cross" in told[2]
    assert "error: the prompt has" in out and "must fit the 128 of these files" in out
    assert "Sorry: your question is empty!!" in out and "no_such.png" in out
    assert out.count("FTL: ") == 3 and out.count(" token/s") == 3


def test_a_full_conversation_begins_anew(static_shapes: Path, capsys: pytest.CaptureFixture) -> None:
    chat = pipeline(static_shapes, "--max_new_tokens", "1000")
    chat.model.eos_token_ids = set()
    chat.ask(QUESTIONS[0])
    assert len(chat.model.tokens) == SHAPES_LENGTH and chat.history == []
    assert "... (reach the maximal length)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--temperature", "0"], "--temperature 0.0: expected a number above 0; for the likeliest token: --generation"),
        (["--top_p", "0"], "--top_p 0.0: expected a number above 0, at most 1"),
        (["--repeat_penalty", "0"], "--repeat_penalty 0.0: expected a number above 0"),
        (["--repeat_last_n", "-1"], "--repeat_last_n -1: expected a number 0 or above"),
        (["--max_new_tokens", "0"], "--max_new_tokens 0: expected a number above 0"),
        (["--devid", "1"], "--devid 1: onnxruntime runs on the CPU here"),
        (["-i", "no_such.png"], "no_such.png"),
        (["-m", str(Case("mllama").checkpoint)], "embedding.onnx: missing; give a folder made by weights_tools export"),
        (["-m", "no_such", "-t", "."], "no_such/embedding.onnx: missing; give a folder"),
        (["-t", "no_such"], "no_such: no such folder; give one of tokenizer"),
    ],
)
def test_mistakes_are_one_line(static_golden: Path, argv: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["-m", str(static_golden), *argv]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
