"""VLMo as a user meets it: questions and answers, pictures compared with texts, the plan, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CPU, config_for, convert, run_engine
from test_tasks import main, write
from vlmo_cases import SIZES, config, golden, inputs, plain

from mmdist.config import UserError
from mmdist.engine.load import load_engine, open_model
from mmdist.engine.memory import rank_memory
from mmdist.task_config import GenerateConfig
from mmdist.tasks import generate
from mmdist.tp import TP

REPOSITORY = Path(__file__).parents[1]


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
        {"id": "turns", "messages": [message, {"role": "assistant", "content": "here"}, message], "images": [column]},
        {"id": "two", "messages": [{**message, "content": message["content"] * 2}], "images": [column, column]},
        {"id": "form", "image": column, "question": "Where?", "json_schema": {}},
        {"id": "penalty", "image": column, "question": "Where?", "presence_penalty": 1},
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
        "two": "VLMo looks at one picture, 2 are given",
        "form": "json_schema={}: this model chooses one answer of a list; leave it out",
        "penalty": "presence_penalty=1: this model chooses one answer of a list; leave it out",
        "turns": "VLMo answers single questions: give one message of a user, not user, assistant, user",
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


def test_shipped_pairs_find_each_other(tmp_path: Path) -> None:
    """50 held-out pictures and captions: recall at 1 in both directions, and the same matches at every world size."""
    command = [sys.executable, str(REPOSITORY / "examples" / "shapes" / "pairs.py"), "--write", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    checkpoint = convert("vlmo", REPOSITORY / "assets" / "vlmo_retrieval-shapes", ())
    keys = dict(vars(config_for(checkpoint, model="vlmo", max_num_seqs=25)), output="scores.npz")
    task = GenerateConfig(**keys, images=str(tmp_path / "pictures"), texts=str(tmp_path / "texts.txt"))
    matches = []
    for size in SIZES:
        assert run_engine(size, task, lambda engine: generate.run(task, engine)) == 0
        logits = np.load("scores.npz")["logits_per_image"]
        matches.append([logits.argmax(axis).tolist() for axis in (0, 1)])
    assert all(found == matches[0] for found in matches)
    assert min(np.mean(np.array(found) == np.arange(50)) for found in matches[0]) >= 0.9


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
