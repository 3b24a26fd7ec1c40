"""VLMo: numbers of upstream's code at every world size, questions and answers, retrieval, and what is refused."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, GOLDEN, answers, config_for, convert, run_engine
from convert_cases import FILE, Edit, edit, refused, run
from test_tasks import main, write

from mmdist.config import Config, GenerateConfig, SamplingParams, UserError
from mmdist.engine.encoder import Answer, EncoderEngine
from mmdist.engine.load import load_engine, open_model
from mmdist.engine.memory import rank_memory
from mmdist.engine.request import Request
from mmdist.models.base import Prompt
from mmdist.models.family import check_world_size, legal_world_sizes
from mmdist.models.vlmo import Vlmo, VlmoConfig
from mmdist.models.vlmo_processor import load_answers
from mmdist.tasks import generate
from mmdist.tasks.media import load_image
from mmdist.tp import TP
from weights_tools.cli import main as weights_tools

SETTINGS = {"vlmo_vqa": (), "vlmo_vqa_plus": ("num_heads=8",), "vlmo_retrieval": ()}
SIZES = [1, 2, 4, 8]
TEXT_LEN = 40


@cache
def plain(case: str) -> Path:
    """The converted checkpoint, made once."""
    return convert("vlmo", GOLDEN / case / "checkpoint", SETTINGS[case])


def config(case: str, **engine: Any) -> Config:
    return config_for(plain(case), model="vlmo", **{"max_num_seqs": 3, **engine})


def golden(case: str) -> tuple[list[dict[str, Any]], Any]:
    return json.loads((GOLDEN / case / "golden.json").read_text())["items"], np.load(GOLDEN / case / "golden.npz")


def inputs(case: str) -> Path:
    return GOLDEN / case / "inputs"


def questions(case: str, engine: EncoderEngine, **params: Any) -> list[Request]:
    """The golden questions; three of them make a batch, and the last one is too long."""
    items, _ = golden(case)
    pictures = {item["image"]: load_image(inputs(case) / item["image"]) for item in items}
    prompts = [engine.prompts.prompt(images=[pictures[item["image"]]], text=item["question"]) for item in items]
    return [Request(str(i), prompt, SamplingParams(**params)) for i, prompt in enumerate(prompts)]


def encode(engine: EncoderEngine, prompts: list[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, tokens, hidden) behind the blocks, and what the head makes of it."""
    hidden = []
    hook = engine.model.register_forward_hook(lambda module, args, output: hidden.append(output))
    kind = engine.model.kind(prompts[0])
    scores = [engine.encode(prompts[i : i + 3], kind) for i in range(0, len(prompts), 3)]
    hook.remove()
    return torch.cat(hidden), torch.cat(scores)


def close(got: torch.Tensor, want: np.ndarray) -> None:
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", ["vlmo_vqa", "vlmo_vqa_plus"])
def test_vqa_equals_the_reference(case: str, size: int) -> None:
    items, want = golden(case)

    @torch.inference_mode()
    def work(engine: EncoderEngine) -> list[Answer]:
        requests = questions(case, engine)
        hidden, logits = encode(engine, [request.prompt for request in requests])
        states = engine.model.output.norm(hidden)
        close(logits, want["vqa_logits"])
        close(engine.model.output.pool(hidden), want["cls_feats"])
        close(states[:, 0], want["raw_cls_feats"])
        close(states[:, :TEXT_LEN], want["text_feats"])
        close(states[:, TEXT_LEN:], want["image_feats"])
        return list(answers(engine, requests).values())

    got = run_engine(size, config(case), work)
    assert [(a.text, a.label) for a in got] == [(item["answer"], item["answer_label"]) for item in items]
    assert [a.truncated for a in got] == [False] * 6 + [True]


@pytest.mark.parametrize("size", SIZES)
def test_retrieval_equals_the_reference(size: int) -> None:
    case = "vlmo_retrieval"
    listed = json.loads((inputs(case) / "items.json").read_text())
    _, want = golden(case)

    @torch.inference_mode()
    def work(engine: EncoderEngine) -> None:
        images = [engine.prompts.prompt(images=[load_image(inputs(case) / name)]) for name in listed["images"]]
        texts = [engine.prompts.prompt(images=[], text=text) for text in listed["texts"]]
        hidden, image_features = encode(engine, images)
        close(engine.model.output.norm(hidden), want["image_feats"])
        hidden, text_features = encode(engine, texts)
        close(engine.model.output.norm(hidden), want["text_feats"])
        close(image_features, want["image_cls_feats"])
        close(text_features, want["text_cls_feats"])
        close(torch.cat(list(engine.features(images))), want["image_cls_feats"])
        close(engine.compare(image_features, text_features), want["logits_per_image"])

    run_engine(size, config(case), work)


@pytest.mark.parametrize("case", ["vlmo_vqa", "vlmo_retrieval"])
def test_words_and_pictures_equal_the_reference(case: str) -> None:
    items, want = golden(case)
    processor = Vlmo.load_processor(plain(case), VlmoConfig.from_pretrained(plain(case)), config(case).model)
    for item in items:
        ids = processor.text(item.get("question") or item["caption"]).token_ids
        assert ids == [token_id for token_id in item["text_ids"] if token_id != 0]
    listed = json.loads((inputs(case) / "items.json").read_text())["images"]
    pixels = [processor.pixel_values(load_image(inputs(case) / name)) for name in listed]
    assert np.array_equal(torch.cat(pixels).numpy(), want["pixel_values"])


def test_vlmo_base_in_eight_is_refused() -> None:
    assert legal_world_sizes(Vlmo, VlmoConfig()) == [1, 2, 3, 4, 6, 12]
    with pytest.raises(UserError, match=r"world_size=8: 12 attention heads .* legal sizes: 1, 2, 3, 4, 6, 12$"):
        check_world_size(Vlmo, VlmoConfig(), 8)


def test_relative_position_bias_is_cut_inside_each_layer() -> None:
    """Of 3 layers' 8 columns each, rank 1 of 4 holds columns 2 and 3 of every layer; the 87 answers are not cut."""
    for rank in range(4):
        _, plan, _, _ = open_model(config("vlmo_vqa"), TP(rank, 4), "cpu")
        columns = [list(range(first, last)) for first, last in plan["position_bias.table"].ranges(TP(rank, 4))]
        assert columns == [[8 * layer + 2 * rank, 8 * layer + 2 * rank + 1] for layer in range(3)]
        assert plan["output.classifier.3.weight"].kind == "rank0" and plan["blocks.0.attn.q_bias"].kind == "cut"
        assert plan["blocks.0.attn.proj.bias"].kind == "replicated"


@pytest.mark.parametrize("case", SETTINGS)
def test_split_verify_load(case: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The parts answer as the whole; ranks behind the first hold no words, patches or answers."""
    folder = tmp_path / "tp2"
    assert weights_tools(["split", "vlmo", "--ranks", "2", "--src", str(plain(case)), "--dst", str(folder)]) == 0
    assert weights_tools(["verify", str(folder), "--against", str(plain(case))]) == 0
    assert "all is well" in capsys.readouterr().out

    def work(engine: EncoderEngine) -> torch.Tensor:
        prompts = [engine.prompts.prompt(images=[], text="a boat")]
        if not engine.model.compares:
            prompts = [request.prompt for request in questions(case, engine)[:3]]
        return engine.encode(prompts, engine.model.kind(prompts[0]))

    whole = run_engine(2, config(case), work)
    parts = run_engine(2, config_for(folder, model="vlmo"), work)
    assert torch.equal(whole, parts)
    _, plan, _, _ = open_model(config_for(folder, model="vlmo"), TP(1, 2), "cpu")
    rank_zero = {name.partition(".")[0] for name, placement in plan.items() if placement.rank_zero_only}
    assert rank_zero == {"embeddings", "output"}


@pytest.mark.parametrize("wrapper", ["state_dict", "module", "model"])
def test_wrapped_checkpoints(wrapper: str, original: Path, tmp_path: Path) -> None:
    prefix = "module." if wrapper == "module" else ""
    index = {"relative_position_index": torch.zeros(26, 26), "text_imag_relative_position_index": torch.zeros(66, 66)}
    edit(original, lambda state: {wrapper: {prefix + k: v for k, v in {**state, **index}.items()}, "epoch": 3})
    assert run(original, tmp_path / "dst") == 0
    same = [
        (tmp_path / "dst" / "model.safetensors").read_bytes(),
        (plain("vlmo_vqa") / "model.safetensors").read_bytes(),
    ]
    assert same[0] == same[1]


def without(word: str) -> Edit:
    return lambda state: {name: tensor for name, tensor in state.items() if word not in name}


def with_zeros(name: str, *shape: int) -> Edit:
    return lambda state: {**state, name: torch.zeros(shape)}


SPOILED = {
    "no head": (without("vqa"), "no vqa_classifier and no itc_text_proj in it"),
    "no block": (without("blocks.1."), "missing (blocks.1."),
    "k bias": (with_zeros("transformer.blocks.0.attn.k_bias", 48), "1 unexpected (blocks.0.attn.k_bias)"),
    "no positions": (without("relative"), "do not tell the number of attention heads"),
    "wrong table": (with_zeros("relative_position_bias_table", 477, 24), "not those of a square of patches"),
    "other answers": (with_zeros("vqa_classifier.3.weight", 86, 96), "87 answers, the classifier has 86 classes"),
    "other words": (
        with_zeros("text_embeddings.word_embeddings.weight", 200, 48),
        "240 words, the model has embeddings of 200",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_checkpoints_are_one_line(
    name: str, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    change, words = SPOILED[name]
    edit(original, change)
    assert words in refused(original, tmp_path / "dst", capsys)


def test_heads_that_contradict_the_table(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    line = refused(original, tmp_path / "dst", capsys, "--set", "num_heads=4")
    assert f"--set num_heads=4: {original / FILE} has 8 heads in its relative_position_bias_table" in line
    plus = GOLDEN / "vlmo_vqa_plus" / "checkpoint"
    assert "add --set num_heads=N" in refused(plus, tmp_path / "dst", capsys)
    assert "the width 32 does not divide by it" in refused(plus, tmp_path / "dst", capsys, "--set", "num_heads=7")


def test_answers_are_counted_by_lines(tmp_path: Path) -> None:
    """Neither "label" nor characters that only look like the end of a line count."""
    path = tmp_path / "answer2label.txt"
    texts = ['"quoted"', "back\\slash", "smørrebrød", "one\u2028line"]
    path.write_text("".join(json.dumps({"answer": x, "label": 7}, ensure_ascii=False) + "\n" for x in texts))
    assert load_answers(path, 4) == texts
    with pytest.raises(UserError, match="4 answers, the classifier has 5 classes"):
        load_answers(path, 5)
    path.write_text('{"answer": "yes"}\nno\n')
    with pytest.raises(UserError, match="line 2: expected"):
        load_answers(path, 2)
    path.unlink()
    with pytest.raises(UserError, match="no such file; VLMo needs the list of its 2 answers"):
        load_answers(path, 2)


def run_generate(checkpoint: Path, **keys: Any) -> tuple[int, dict[str, dict[str, Any]]]:
    task = GenerateConfig(**{**vars(config_for(checkpoint, model="vlmo")), "output": "out.jsonl", **keys})
    generate.check(task)
    code = generate.run(task, load_engine(task, TP(), CPU))
    lines = map(json.loads, Path("out.jsonl").read_text().splitlines())
    return code, {line["id"]: line for line in lines}


def test_requests_and_answers(caplog: pytest.LogCaptureFixture) -> None:
    """Questions in both forms, a folder's picture, top_k, a text that is cut; one bad request stops no other."""
    items, want = golden("vlmo_vqa")
    shutil.copy(inputs("vlmo_vqa") / "panorama.png", "boat.png")
    column = str(inputs("vlmo_vqa") / "column.png")
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": items[0]["question"]}]}
    lines = [
        {"id": "short", "image": "boat.png", "question": items[0]["question"]},
        {"id": "chat", "messages": [message], "images": ["boat.png"], "top_k": 2},
        {"id": "long", "image": column, "question": items[6]["question"], "top_k": 1},
        {"id": "blind", "prompt": "Where is the boat?"},
        {"id": "half", "question": "Where is the boat?"},
        {"id": "both", "image": column, "question": "Where?", "prompt": "Where?"},
        {"id": "two", "messages": [{**message, "content": message["content"] * 2}], "images": [column, column]},
    ]
    code, got = run_generate(plain("vlmo_vqa"), input=write(lines))
    assert code == 1
    best = np.argsort(-want["vqa_logits"][0])[:5]
    assert set(got["short"]) == {"id", "answer", "label", "top"} and got["short"]["answer"] == items[0]["answer"]
    assert [entry["label"] for entry in got["short"]["top"]] == best.tolist()
    assert got["short"]["top"][0] == {
        "label": 38,
        "answer": "thing a26",
        "logit": pytest.approx(want["vqa_logits"][0, 38]),
    }
    assert [entry["answer"] for entry in got["chat"]["top"]] == [entry["answer"] for entry in got["short"]["top"][:2]]
    assert got["long"]["answer"] == items[6]["answer"] and got["long"]["truncated"] is True
    assert "request long: the question is too long for the model" in caplog.text
    errors = {name: line["error"] for name, line in got.items() if "error" in line}
    assert errors == {
        "blind": "VLMo answers a question about a picture; give both",
        "half": 'a "question" has an "image" and an "image" a "question", both text',
        "both": '"question" and "image" stand alone, without "messages", "prompt", "images" or "video"',
        "two": "VLMo looks at one picture, 2 are in the message",
    }


def test_chat_answers_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    arguments = ["model=vlmo", f"checkpoint={plain('vlmo_vqa')}", "world_size=1", "dtype=float32"]
    question = ["image=" + str(inputs("vlmo_vqa") / "mono.png"), "prompt=Where is the boat, near the bridge?"]
    assert main(monkeypatch, *arguments, *question) == 0
    assert capsys.readouterr().out == "thing a26\n"
    assert main(monkeypatch, *arguments, question[1]) == 2
    assert "VLMo answers a question about a picture" in error_line(capsys)


def test_pictures_and_texts_are_compared() -> None:
    """A folder or a list of pictures, one text a line; the same numbers in the same order."""
    _, want = golden("vlmo_retrieval")
    listed = json.loads((inputs("vlmo_retrieval") / "items.json").read_text())
    Path("texts.txt").write_text("".join(text + "\n" for text in listed["texts"]))
    Path("images.txt").write_text("".join(f"{inputs('vlmo_retrieval') / name}\n" for name in listed["images"]))
    keys = dict(vars(config("vlmo_retrieval")), output="deep/scores.npz", texts="texts.txt")
    for images in ("images.txt", str(inputs("vlmo_retrieval"))):
        task = GenerateConfig(**keys, images=images)
        generate.check(task)
        assert generate.run(task, load_engine(task, TP(), CPU)) == 0
        scores = np.load("deep/scores.npz")
        order = [listed["images"].index(Path(name).name) for name in scores["image_names"]]
        assert sorted(order) == list(range(5)) and scores["texts"].tolist() == listed["texts"]
        assert scores["truncated"].tolist() == [False] * 4 + [True]
        for name, reference in (
            ("logits_per_image", "logits_per_image"),
            ("image_features", "image_cls_feats"),
        ):
            np.testing.assert_allclose(scores[name], want[reference][order], rtol=0, atol=1e-4)
        np.testing.assert_allclose(scores["text_features"], want["text_cls_feats"], rtol=0, atol=1e-4)
    assert [path.name for path in Path("deep").iterdir()] == ["scores.npz"]


def error_line(capsys: pytest.CaptureFixture) -> str:
    """The one line of an error among the log's."""
    (line,) = (line for line in capsys.readouterr().err.splitlines() if " [mmdist." not in line)
    assert line.startswith("error: ")
    return line


MISTAKES = {
    "images=PICTURES": "texts=None: expected a file of texts",
    "texts=TEXTS": "images=None: expected a folder of pictures",
    "images=PICTURES texts=TEXTS input=TEXTS": "nothing beside images= and texts=",
    "images=PICTURES texts=no_such.txt": "texts=no_such.txt: cannot be read",
    "images=EMPTY texts=TEXTS": "no pictures in it",
    "images=PICTURES texts=GAP": "line 2 is empty; write one on each line",
    "images=PICTURES texts=TEXTS checkpoint=VQA": "this checkpoint answers questions; images= and texts= take one made",
    "input=REQUESTS checkpoint=RETRIEVAL": "this checkpoint is for retrieval and answers no questions",
    "images=PICTURES texts=TEXTS model=llava": "model=llava: writes answers and compares nothing",
    "images=TEXTS texts=TEXTS": "a boat: no such picture",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_mistakes_are_one_line(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    Path("texts.txt").write_text("a boat\n")
    Path("gap.txt").write_text("a boat\n\nanother\n")
    Path("empty").mkdir()
    places = {"TEXTS": "texts.txt", "GAP": "gap.txt", "EMPTY": "empty", "PICTURES": str(inputs("vlmo_retrieval"))}
    places |= {"VQA": str(plain("vlmo_vqa")), "RETRIEVAL": str(plain("vlmo_retrieval"))}
    places["REQUESTS"] = write([{"id": 1, "question": "Where?", "image": "a.png"}])
    defaults = {"task": "generate", "model": "vlmo", "checkpoint": "RETRIEVAL", "world_size": "1"}
    given = {**defaults, **dict(word.split("=") for word in command.split())}
    assert main(monkeypatch, *(f"{key}={places.get(value, value)}" for key, value in given.items())) == 2
    assert MISTAKES[command] in error_line(capsys)


def test_plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """No KV cache; memory grows with the batch and is refused where it does not fit."""
    arguments = ["task=plan", "format=json", "model=vlmo", f"checkpoint={plain('vlmo_vqa')}", "world_size=2"]
    assert main(monkeypatch, *arguments) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["legal_world_sizes"] == SIZES and made["allreduce_bytes_per_token"] == 2 * 3 * 48 * 4
    assert [rank["kv_bytes"] for rank in made["ranks"]] == [0, 0]
    assert made["ranks"][0]["vision_bytes"] > made["ranks"][1]["vision_bytes"] == 0
    rank_zero = sum(p.nbytes for p in load_engine(config("vlmo_vqa"), TP(), CPU).model.parameters())
    halves = 2 * made["ranks"][1]["llm_bytes"] + made["ranks"][0]["vision_bytes"]
    assert halves == pytest.approx(rank_zero, rel=0.02)  # norms and layer scales are on both
    small, large = (
        rank_memory(*open_model(config("vlmo_vqa"), TP(), "cpu")[:2], TP(), config("vlmo_vqa", max_num_seqs=n).engine)
        for n in (1, 8)
    )
    assert large.total > small.total
    tight = config("vlmo_vqa")
    tight.hardware.memory_gib = 0.001
    with pytest.raises(UserError, match=r"rank 0 needs .* lower engine.max_num_seqs=3"):
        load_engine(tight, TP(), CPU)
