"""task=precision: what is the same passes, what is not is caught and named, what cannot be compared is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, config_for, convert, run_ranks
from safetensors.torch import load_file, save_file
from test_tasks import main

from mmdist.config import SamplingParams, UserError
from mmdist.engine.engine import Engine
from mmdist.engine.load import load_engine
from mmdist.engine.record import load_record
from mmdist.launch import run_rank
from mmdist.precision.answers import Answers, check_settings, read_answers
from mmdist.precision.compare import compare_layers, compare_request
from mmdist.precision.scores import read_scores
from mmdist.task_config import GenerateConfig, PrecisionConfig
from mmdist.tasks import generate
from mmdist.tp import TP

REPOSITORY = Path(__file__).parents[1]
ASSETS = REPOSITORY / "assets"
PICTURES = ASSETS / "pictures"
CHECKPOINT = ASSETS / "llava_next-shapes"
ASKED = {"input": str(PICTURES), "prompt": "What is in the picture?", "max_new_tokens": 8, "record": "layers"}
JOB = [
    "model=llava_next",
    "dtype=float32",
    "max_new_tokens=8",
    "layers=true",
    f"data={PICTURES}",
    "prompt=What is in the picture?",
]


def precision(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and precision.json of the job."""
    code = main(monkeypatch, "task=precision", "output_dir=job", *arguments)
    return code, json.loads(Path("job/precision.json").read_text())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank's answers about the shipped pictures, with all that can be recorded."""
    folder = tmp_path_factory.mktemp("saved")
    common = vars(config_for(CHECKPOINT, max_num_seqs=8))
    answer(1, GenerateConfig(**{**common, **ASKED, "output": str(folder / "one.jsonl")}))
    return folder / "one.jsonl"


def answer(size: int, config: GenerateConfig) -> None:
    """task=generate on `size` ranks, which are threads."""

    def work(tp: TP) -> int:
        engine = load_engine(config, tp, CPU)
        if tp.rank > 0:
            return engine.follow()
        code = generate.run(config, engine)
        engine.stop()
        return code

    assert run_ranks(size, work)[0] == 0


def planted(folder: Path, weight: str, row: int) -> str:
    """The checkpoint with one row of one weight scaled by 1.02."""
    shutil.copytree(CHECKPOINT, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[weight][row] *= 1.02
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def test_two_ranks_equal_one(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    """Through launch.py, each side a job of its own."""
    code, found = precision(monkeypatch, *JOB, "reference=world_size_1", "world_size=2")
    assert code == 0 and found["passed"] and found["summary"]["compared"] == "logits", found
    assert found["summary"]["requests"] == found["summary"]["requests_equal"] == 5
    assert 0 < found["summary"]["max_error"] < 1e-4 and found["first_drift"] is None
    names = [layer["name"] for layer in found["layers"]]
    assert names[0].startswith("vision.") and names[-3:] == ["decoder.layers.4", "decoder.norm", "head"]
    out, _ = capfd.readouterr()
    assert out == Path("job/precision.md").read_text() and "# Precision: passed" in out
    for side, size in (("reference", 1), ("ours", 2)):
        assert json.loads(Path(f"job/{side}/config.json").read_text())["world_size"] == size


def test_transformers_is_the_same(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    code, found = precision(monkeypatch, *JOB, f"answers={saved}", "reference=transformers")
    assert code == 0 and found["summary"]["texts_equal"] == 5 and 0 < found["summary"]["max_error"] < 1e-4
    assert {"vision.projector", "decoder.layers.0", "head"} < {layer["name"] for layer in found["layers"]}


def test_a_planted_error_is_caught_and_its_layer_named(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    weight = "language_model.model.layers.2.mlp.up_proj.weight"
    reference = planted(Path("planted"), weight, 7)
    code, found = precision(monkeypatch, *JOB, f"answers={saved}", f"reference={reference}", "world_size=1")
    missed = {check["name"] for check in found["checks"] if not check["passed"]}
    assert code == 1 and {"max_logit_error", "max_rms_error", "max_layer_error"} <= missed
    assert found["first_drift"] == "decoder.layers.2"
    assert "first layer that drifts: **decoder.layers.2**" in Path("job/precision.md").read_text()


@pytest.mark.parametrize(
    ("weight", "row", "layer"),
    [
        ("vision_tower.vision_model.encoder.layers.1.mlp.fc2.weight", 3, "vision.tower.model.encoder.layers.1"),
        ("multi_modal_projector.linear_2.weight", 24, "vision.projector"),
        ("language_model.lm_head.weight", 61, "head"),
    ],
)
def test_every_stage_can_be_named(saved: Path, weight: str, row: int, layer: str) -> None:
    common = vars(config_for(planted(Path("planted"), weight, row), max_num_seqs=8))
    answer(1, GenerateConfig(**{**common, **ASKED, "max_new_tokens": 1, "output": "other.jsonl"}))
    theirs, own = read_answers(saved, "reference"), read_answers(Path("other.jsonl"), "answers")
    layers = compare_layers(own.lines, theirs, own)
    assert next(error.name for error in layers if error.error > 1e-5) == layer


@pytest.mark.parametrize(("family", "size"), [("mllama", 8), ("llama_adapter", 4), ("vlmo", 2)])
def test_world_sizes_agree(family: str, size: int) -> None:
    """Recorded logits and layers, in families that look at pictures in other ways."""
    checkpoint = ASSETS / f"{family}-shapes"
    folder = checkpoint if (checkpoint / "config.json").exists() else convert(family, checkpoint, ())
    sides = []
    for ranks in (1, size):
        output = Path(f"{ranks}.jsonl")
        common = vars(config_for(folder, model=family, max_num_seqs=8))
        answer(ranks, GenerateConfig(**{**common, **ASKED, "max_new_tokens": 4, "output": str(output)}))
        sides.append(read_answers(output, "answers"))
    for name in sides[0].lines:
        found = compare_request(name, *sides)
        assert found.divergence is None and found.errors.kind == "logits" and 0 < found.errors.largest < 1e-4
    layers = compare_layers(sides[0].lines, *sides)
    assert len(layers) > 5 and all(layer.error < 1e-5 for layer in layers)


def test_retrieval_at_two_ranks_equals_one() -> None:
    """Pictures and texts each find the same, by features that agree."""
    folder = convert("vlmo", ASSETS / "vlmo_retrieval-shapes", ())
    Path("texts.txt").write_text("red circle\nblue square\nred circle\n")
    sides = []
    for ranks in (1, 2):
        common = vars(config_for(folder, model="vlmo"))
        asked = {"images": str(PICTURES), "texts": "texts.txt", "record": "layers", "output": f"{ranks}.npz"}
        answer(ranks, GenerateConfig(**{**common, **asked}))
        sides.append(read_scores(Path(f"{ranks}.npz"), "answers"))
    names = list(sides[0].lines)
    assert len(names) == 8 and {"image: shapes.png", "text: red circle", "text: red circle (2)"} < set(names)
    found = [compare_request(name, *sides) for name in names]
    assert all(request.divergence is None and request.errors.largest < 1e-4 for request in found)
    assert found[0].text.startswith("text: ") and found[-1].text.startswith("image: ")
    layers = {layer.name: layer.error for layer in compare_layers(names, *sides)}
    assert next(iter(layers)).startswith("embeddings.") and 0 < layers["features"] < 1e-5


def line(token_ids: list[int], tops: list[dict[int, float]], **more: Any) -> dict[str, Any]:
    """An answer whose tokens had these log probabilities."""
    entries = [
        {
            "token_id": token,
            "logprob": top.get(token, -9.0),
            "top": [{"token_id": i, "logprob": p} for i, p in top.items()],
        }
        for token, top in zip(token_ids, tops, strict=True)
    ]
    return {"id": "a", "text": " ".join(map(str, token_ids)), "token_ids": token_ids, "logprobs": entries, **more}


def compare(theirs: dict[str, Any], own: dict[str, Any]) -> Any:
    sides = (Answers(Path("nowhere"), {"a": side}) for side in (theirs, own))
    return compare_request("a", *sides)


SURE = {1: -0.1, 2: -2.5, 3: -4.0}


@pytest.mark.parametrize(
    ("theirs", "own", "near_tie"),
    [
        ({4: -0.69, 5: -0.70}, {5: -0.69, 4: -0.70}, True),
        ({4: -0.60, 5: -0.80}, {5: -0.69, 4: -0.70}, False),  # one side is sure
        ({4: -1.0, 6: -1.01, 5: -1.02}, {5: -1.0, 4: -1.01}, False),  # the other's token is third
        ({4: -0.69, 6: -0.70}, {5: -0.69, 4: -0.70}, False),  # not known
    ],
)
def test_near_ties_are_counted_apart(theirs: dict[int, float], own: dict[int, float], near_tie: bool) -> None:
    found = compare(line([1, 4, 1], [SURE, theirs, SURE]), line([1, 5, 9], [SURE, own, SURE]))
    assert found.divergence.position == 1 and found.divergence.near_tie == near_tie
    assert (found.agreed, found.counted) == ((1, 1) if near_tie else (1, 3))
    assert found.divergence.tokens == (4, 5)
    assert [top["token_id"] for top in found.divergence.reference] == list(theirs)


def test_saved_log_probabilities_are_compared_up_to_the_divergence() -> None:
    """Among the tokens that both sides name; what comes after has other contexts."""
    theirs = line([1, 4, 7], [SURE, {4: -0.2, 5: -1.8}, {7: -0.1}])
    own = line([1, 5, 7], [{1: -0.11, 2: -2.4, 9: -5.0}, {5: -0.3, 4: -1.4}, {7: -3.0}])
    found = compare(theirs, own)
    assert found.errors.kind == "log probabilities" and found.errors.count == 4
    assert found.errors.largest == pytest.approx(1.5) and len(found.errors.kls) == 2
    terms = [math.exp(p) * (math.expm1(q - p) - (q - p)) for p, q in ((-0.2, -1.4), (-1.8, -0.3))]
    assert found.errors.kls[1] == pytest.approx(sum(terms))


def test_a_nan_is_the_largest_error() -> None:
    bad = line([1], [{1: math.nan, 2: -1.0}])
    assert compare(line([1], [{1: -0.1, 2: -1.0}]), bad).errors.largest > 1e30


def test_a_side_that_stops_early_diverges() -> None:
    found = compare(line([1, 1], [SURE, SURE]), line([1], [SURE]))
    assert found.divergence.position == 1 and found.divergence.tokens == (1, None) and found.counted == 2


def test_a_saved_reference_is_matched_by_id(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    """Two files, no data, nothing run; without the recorded logits, the log probabilities are compared."""
    shutil.copy(saved, "there.jsonl")
    code, found = precision(monkeypatch, f"answers={saved}", "reference=there.jsonl")
    assert code == 0 and found["summary"]["compared"] == "log probabilities"
    assert "log probabilities of the saved best tokens" in found["notes"][0]
    lines = lines_of(saved)
    for entry in lines:
        del entry["logprobs"], entry["params"]
    lines[0]["token_ids"][0] += 1
    write(lines)
    code, found = precision(monkeypatch, f"answers={saved}", "reference=there.jsonl")
    assert code == 1 and found["summary"]["compared"] == "tokens only" and found["summary"]["divergences"] == 1
    assert len(found["notes"]) == 2 and "does not say its generation settings" in found["notes"][1]


def lines_of(path: Path) -> list[dict[str, Any]]:
    """By id: answers are written as they come."""
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda line: line["id"])


def write(lines: list[dict[str, Any]]) -> None:
    Path("there.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))


def change(lines: list[dict[str, Any]], what: str) -> None:
    if what == "ids":
        lines[0]["id"] = "other.png"
    elif what == "settings":
        lines[0]["params"] |= {"max_new_tokens": 30, "stop": ["x"]}
    elif what == "prompt":
        lines[0]["prompt_token_ids"].append(5)
    elif what == "twice":
        lines.append(lines[0])
    elif what == "form":
        lines[0] = {"a": "cat"}


REFUSED = {
    "ids": "1 of the 5 asked for are not in it (first: shapes.png), 1 of its 5 are not asked for (first: other.png)",
    "settings": "other generation settings: max_new_tokens=30 (here 8), stop=['x'] (here [])",
    "prompt": "request shapes.png: its prompt has",
    "twice": "line 6: id shapes.png is there twice",
    "form": 'line 1: expected {"id", "token_ids", ...}',
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_reference_that_is_no_reference(monkeypatch: Any, capsys: Any, saved: Path, what: str) -> None:
    lines = lines_of(saved)
    change(lines, what)
    write(lines)
    refused(monkeypatch, capsys, REFUSED[what], *JOB[:3], *JOB[4:], f"answers={saved}", "reference=there.jsonl")


def test_a_setting_newer_than_a_file_has_its_default_there() -> None:
    old, new = {"max_new_tokens": 8}, generate.settings_of(SamplingParams(max_new_tokens=8))
    for sides in (({"a": old}, {"a": new}), ({"a": new}, {"a": old})):
        check_settings(*sides, "reference=old.jsonl")
    biased = json.loads(json.dumps(generate.settings_of(SamplingParams(max_new_tokens=8, logit_bias={5: 1}))))
    check_settings({"a": biased}, {"a": generate.settings_of(SamplingParams(max_new_tokens=8, logit_bias={5: 1}))}, "")
    with pytest.raises(UserError, match=r"logit_bias=\{\} \(here"):
        check_settings({"a": old}, {"a": biased}, "reference=old.jsonl")


def refused(monkeypatch: Any, capsys: Any, words: str, *arguments: str) -> None:
    code = main(monkeypatch, "task=precision", *arguments)
    errors = capsys.readouterr().err.splitlines()
    assert code == 2 and len(errors) == 1 and errors[0].startswith("error: ") and words in errors[0], errors


WRONG = {
    "data=": (["prompt=x"], "data= is missing"),
    "data=/nowhere": ([], "data=/nowhere: no such file or folder"),
    "data=.": (["prompt=x"], "data=.: no pictures in it (.bmp"),
    "data=empty": ([], "data=empty: no requests in it"),
    "data=hot": ([], "request warm has temperature=0.5"),
    "temperature=1": ([], "only greedy answers"),
    "reference=/nowhere": ([], "reference=/nowhere: no such file or folder; give transformers, world_size_1"),
    "reference=.": ([], "no config.json in it"),
    "answers=/nowhere": ([], "answers=/nowhere: no such file"),
    "model=minigpt4": (["reference=transformers", "checkpoint=x"], "transformers has no model=minigpt4"),
    "output_dir=/proc/no": (["data=good"], "output_dir=/proc/no: cannot write there"),
    "images=.": ([], "images=FOLDER and texts=FILE together"),
    "reference_dtype=int8": ([], "auto|float32|float16|bfloat16"),
    "min_token_agreement=2": ([], "0 to 1"),
    "max_kl=-1": ([], "max_kl=-1.0: expected 0 or above"),
}


@pytest.mark.parametrize("word", WRONG)
def test_bad_input(monkeypatch: Any, capsys: Any, word: str) -> None:
    """Before any side is started."""
    Path("empty").touch()
    Path("hot").write_text('{"id": "warm", "prompt": "x", "temperature": 0.5}\n')
    Path("good").write_text('{"id": "1", "prompt": "x"}\n')
    more, words = WRONG[word]
    data = [] if any(given.startswith("data=") for given in (word, *more)) else ["data=good"]
    refused(monkeypatch, capsys, words, *([] if word == "data=" else [word]), *more, *data)


def test_a_side_that_fails_is_named(monkeypatch: Any, capfd: Any) -> None:
    """Its own message first."""
    shutil.copytree(CHECKPOINT, "broken")
    Path("broken/model.safetensors").write_bytes(b"")
    code = main(monkeypatch, "task=precision", *JOB, "reference=broken", "world_size=1")
    _, errors = capfd.readouterr()
    assert code == 2 and errors.count("error: ") == 1 and "model.safetensors" in errors
    assert "the side reference (this engine, broken, world_size=1" in errors


def test_torchrun_is_refused() -> None:
    with pytest.raises(UserError, match=r"task=precision .*without torchrun"):
        run_rank(PrecisionConfig(task="precision", data="x"))


def test_failed_requests_are_told_apart(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    lines = lines_of(saved)
    lines[1] = {"id": lines[1]["id"], "token_ids": [], "text": "", "error": "no such picture"}
    write(lines)
    code, found = precision(monkeypatch, f"answers={saved}", "reference=there.jsonl")
    assert code == 1 and found["failed"]["reference"] == {lines[1]["id"]: "no such picture"}
    assert found["summary"]["requests"] == 4 and all(check["passed"] for check in found["checks"])


def test_recording_changes_nothing_and_off_keeps_nothing(saved: Path) -> None:
    """The same answers without it, and no folder; recorded are the logits that the answers were chosen by."""
    common = vars(config_for(CHECKPOINT, max_num_seqs=8))
    answer(1, GenerateConfig(**{**common, **ASKED, "record": "none", "output": "plain.jsonl"}))
    plain, kept = read_answers(Path("plain.jsonl"), "answers"), read_answers(saved, "answers")
    assert not Path("plain.jsonl.record").exists() and "params" not in plain.lines["shapes.png"]
    for name, entry in kept.lines.items():
        assert plain.lines[name]["token_ids"] == entry["token_ids"] and plain.lines[name]["text"] == entry["text"]
        record = load_record(saved, name)
        assert record is not None and record.logits is not None
        assert record.logits.argmax(-1).tolist() == entry["token_ids"]
        logprobs = record.logits.log_softmax(-1).amax(-1)
        torch.testing.assert_close(logprobs, torch.tensor([best["logprob"] for best in entry["logprobs"]]))
    engine = load_engine(config_for(CHECKPOINT), TP(), CPU)
    assert isinstance(engine, Engine) and engine.recorder is None
