"""task=precision's scores: VQA, the CLIP judge, recall; and questions of an arrow file in task=generate."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import config_for, convert, run_engine
from judge_cases import make_clip
from test_tasks import main
from vlmo_cases import inputs, plain

from mmdist.config import SamplingParams
from mmdist.engine.request import Output, Request, failed
from mmdist.models.base import Prompt
from mmdist.precision.vqa import VqaData
from mmdist.task_config import GenerateConfig
from mmdist.tasks import generate
from mmdist.tasks.stopwatch import Stopwatch

REPOSITORY = Path(__file__).parents[1]
PICTURES = REPOSITORY / "assets" / "pictures"
ANSWERS = REPOSITORY / "assets" / "vlmo-shapes" / "answer2label.txt"


@pytest.fixture(scope="module")
def arrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pictures of the shapes' world with their questions, as VQAv2 publishes them, made into VLMo's file."""
    folder, mine = tmp_path_factory.mktemp("vqa"), REPOSITORY / "examples"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(mine / "shapes"))
        run_script(patch, mine / "shapes" / "vqav2_files.py", "--num", "60", "--out", str(folder))
        words = ["--src", str(folder), "--dst", str(folder), "--splits", "val", "--answers", str(ANSWERS)]
        run_script(patch, mine / "vqav2" / "make_arrow.py", *words)
    return folder / "vqav2_val.arrow"


def run_script(patch: pytest.MonkeyPatch, script: Path, *arguments: str) -> None:
    patch.setattr(sys, "argv", [script.name, *arguments])
    runpy.run_path(str(script), run_name="__main__")


def answer(checkpoint: Path, model: str, size: int, output: str, **keys: Any) -> None:
    """task=generate on `size` ranks, which are threads."""
    common = vars(config_for(checkpoint, model=model, max_num_seqs=8))
    config = GenerateConfig(**{**common, "output": output, "timing": True, **keys})
    generate.check(config)
    assert run_engine(size, config, lambda engine: generate.run(config, engine)) == 0


def precision(patch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(patch, "task=precision", "output_dir=job", *arguments)
    return code, json.loads(Path("job/precision.json").read_text())


def test_vlmo_on_two_ranks_answers_as_on_one(
    arrow: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Accuracy, soft score and cost of both sides; a side that answers worse misses the threshold and is named."""
    checkpoint = convert("vlmo", REPOSITORY / "assets" / "vlmo-shapes", ())
    for size in (1, 2):
        answer(checkpoint, "vlmo", size, f"{size}.jsonl", input=str(arrow), logprobs=1)
    words = ["model=vlmo", f"checkpoint={checkpoint}", f"data={arrow}"]
    code, found = precision(monkeypatch, *words, "reference=1.jsonl", "answers=2.jsonl")
    assert code == 0 and found["passed"], found["checks"]
    figures = found["scores"]["vqa"]["figures"]
    assert figures["accuracy"]["ours"] == figures["accuracy"]["reference"] >= 0.95
    assert figures["soft_score"]["ours"] == figures["accuracy"]["ours"]  # all ten people agree in this world
    num = len(VqaData(arrow).questions())
    assert figures["questions"] == {"reference": num, "ours": num} and num > 120
    assert 0 < figures["median_cost_ms"]["ours"] <= figures["p99_cost_ms"]["ours"] <= figures["max_cost_ms"]["ours"]
    printed = capsys.readouterr().out
    assert "| accuracy, as VLMo counts it | " in printed and "questions/s, reading included" in printed

    lines = [json.loads(line) for line in Path("2.jsonl").read_text().splitlines()]
    right = {name for name, sides in found["scores"]["vqa"]["items"].items() if sides["ours"]}
    for line in [line for line in lines if line["id"] in right][:5]:
        line["answer"] = "purple cross"
    Path("worse.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, found = precision(monkeypatch, *words, "reference=1.jsonl", "answers=worse.jsonl")
    assert code == 1 and {c["name"] for c in found["checks"] if not c["passed"]} == {"max_score_loss"}
    assert sum(sides["ours"] < sides["reference"] for sides in found["scores"]["vqa"]["items"].values()) == 5
    assert "questions on which the sides differ most" in capsys.readouterr().out


def test_a_generative_family_answers_the_same_file(arrow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, by words that are exact once normalised; prompt= puts text around each question."""
    checkpoint = REPOSITORY / "assets" / "llava_next-shapes"
    answer(checkpoint, "llava_next", 1, "a.jsonl", input=str(arrow), max_new_tokens=8, prompt="{question}")
    words = [f"checkpoint={checkpoint}", f"data={arrow}", "reference=none", "answers=a.jsonl"]
    code, found = precision(monkeypatch, *words)
    assert code == 0 and found["passed"] and found["per_request"] == []
    assert list(found["scores"]["vqa"]["figures"]["accuracy"]) == ["ours"]
    assert found["scores"]["vqa"]["figures"]["accuracy"]["ours"] >= 0.9
    asked = {json.loads(line)["id"]: json.loads(line) for line in Path("a.jsonl").read_text().splitlines()}
    assert len({len(line["prompt_token_ids"]) for line in asked.values()}) > 3


def test_the_seeds_files_before_the_judge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """One side by path and long, the other by name and short: joined by name, cut alike, which is said."""
    names = sorted(path.name for path in PICTURES.glob("*.png"))
    ours = {f"/data/coco/{name}": "a red circle and more" for name in names}
    Path("predict_result.json").write_text(json.dumps(ours, indent=4))
    Path("gpu_coco_predict.json").write_text(json.dumps(dict.fromkeys(names, "a red dot")))
    words = ["judge=clip", f"judge_checkpoint={make_clip(Path('clip'))}", f"data={PICTURES}", "max_score_loss=2"]
    code, found = precision(monkeypatch, *words, "reference=gpu_coco_predict.json", "answers=predict_result.json")
    assert code == 0 and found["summary"]["texts_equal"] == 0 and found["summary"]["token_agreement"] is None
    clip = found["scores"]["clip"]
    assert sorted(clip["items"]) == names and clip["figures"]["captions_cut"] == {"reference": 0, "ours": len(names)}
    mean = sum(sides["ours"] for sides in clip["items"].values()) / len(names)
    assert clip["figures"]["mean_cosine"]["ours"] == pytest.approx(mean)
    assert (
        "captions of both sides are cut after 9 tokens, the longest of the side that writes least" in clip["notes"][0]
    )
    assert "mean cosine of picture and caption" in capsys.readouterr().out

    Path("same.json").write_text(json.dumps(dict.fromkeys(names, "a red dot or two")))
    found = precision(monkeypatch, *words, "reference=same.json", "answers=same.json")[1]["scores"]["clip"]
    assert all(sides["reference"] == pytest.approx(sides["ours"]) for sides in found["items"].values())


def test_our_answers_have_a_known_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides say how many tokens they were allowed: nothing is cut but by CLIP itself."""
    params = generate.settings_of(SamplingParams(max_new_tokens=30))
    line = {"token_ids": [1], "prompt_token_ids": [1], "finish_reason": "stop", "params": params}
    names = sorted(path.name for path in PICTURES.glob("*.png"))
    for file, text in (("a.jsonl", "a red dot"), ("b.jsonl", "a blue square here")):
        Path(file).write_text("".join(json.dumps({**line, "id": name, "text": text}) + "\n" for name in names))
    make_clip(Path("clip"))
    words = ["judge=clip", "judge_checkpoint=clip", f"data={PICTURES}"]
    found = precision(monkeypatch, *words, "reference=a.jsonl", "answers=b.jsonl", "max_new_tokens=30")[1]
    assert found["scores"]["clip"]["figures"]["captions_cut"] == {"reference": 0, "ours": 0}
    assert "after 24 tokens, what the judge reads" in found["scores"]["clip"]["notes"][0]


def test_recall(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text i belongs to picture i, or COCO's captions say where each belongs; both sides are counted."""
    listed = json.loads((inputs("vlmo_retrieval") / "items.json").read_text())
    shutil.copytree(inputs("vlmo_retrieval"), "pictures")
    names = sorted(path.name for path in Path("pictures").glob("*.png"))
    Path("texts.txt").write_text("".join(text + "\n" for text in listed["texts"]))
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    captions = [{"image_id": i % 3, "caption": text} for i, text in enumerate(listed["texts"])]
    Path("captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    common = vars(config_for(plain("vlmo_retrieval"), model="vlmo", max_num_seqs=3))
    for texts, shape in (("texts.txt", 5), ("captions.json", 3)):
        keys = {"images": "pictures", "texts": texts, "output": "scores.npz"}
        job = GenerateConfig(**{**common, **keys})
        assert run_engine(1, job, lambda engine, job=job: generate.run(job, engine)) == 0
        words = ["model=vlmo", f"checkpoint={plain('vlmo_retrieval')}", "images=pictures", f"texts={texts}"]
        code, found = precision(monkeypatch, *words, "reference=scores.npz", "answers=scores.npz")
        assert code == 0 and len(found["per_request"]) == shape + 5
        figures = found["scores"]["recall"]["figures"]
        assert figures["recall_images_at_5"] == {"reference": 1.0, "ours": 1.0}
        assert 0 <= figures["recall_texts_at_1"]["ours"] < 1
    assert precision(monkeypatch, *words, "reference=none", "answers=scores.npz")[0] == 0


def odd_arrow() -> str:
    table = pa.table({"image": [b""], "question": ["Where?"]})
    with pa.OSFile("odd.arrow", "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return "odd.arrow"


MISTAKES = {
    "task=generate input=ODD": "odd.arrow: no column questions; VLMo's has image, questions",
    "task=precision data=ODD": "odd.arrow: no column questions; VLMo's has image, questions",
    "task=generate input=ARROW prompt=Short": "has its own questions; say with {question} where they go",
    "task=precision reference=none data=PICTURES prompt=What": "reference=none: then there must be something to score",
    "task=precision judge=clip data=PICTURES prompt=What": "judge_checkpoint=None: expected a CLIP model with judge",
    "task=precision judge=clip judge_checkpoint=PICTURES": "judge=clip: give the pictures with data=FOLDER",
    "task=precision judge=clip judge_checkpoint=PICTURES data=PICTURES prompt=What": "no config.json there",
    "task=precision judge=blip judge_checkpoint=PICTURES": "judge=blip: expected clip",
    "task=precision reference=SEED answers=SEED": "answers by picture: give the folder of these pictures",
    "task=precision reference=SEED answers=SEED data=PICTURES": "cat.jpg: no picture of this name",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_mistakes_are_one_line(
    command: str, arrow: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    Path("seed.json").write_text('{"cat.jpg": "a cat"}')
    places = {"ODD": odd_arrow(), "ARROW": str(arrow), "PICTURES": str(PICTURES), "SEED": "seed.json"}
    words = [word.split("=", 1) for word in command.split()]
    assert main(monkeypatch, *(f"{key}={places.get(value, value)}" for key, value in words)) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if " [mmdist." not in line)
    assert line.startswith("error: ") and MISTAKES[command] in line


def test_the_clock_stands_while_pictures_are_read_and_answers_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that takes two requests and computes for a second, between a slow reader and a slow writer."""
    now = [0.0]
    monkeypatch.setattr("mmdist.tasks.stopwatch.time.perf_counter", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    def slowly(names: str) -> Iterator[Request]:
        for name in names:
            with stopwatch.reading(name):
                wait(10)
            yield Request(name, Prompt([]), SamplingParams())

    def engine(requests: Iterator[Request]) -> Iterator[Output]:
        for first, second in zip(requests, requests, strict=True):
            wait(1)
            yield from (failed(request.id, [], "") for request in (first, second))

    stopwatch = Stopwatch()
    seen: dict[str, dict[str, float]] = {}
    for output in stopwatch.outputs(engine(slowly("abcd"))):
        seen[output.id] = stopwatch.timing(output.id)
        wait(10)
    assert [timing["seconds"] for timing in seen.values()] == [1, 1, 1, 1]
    assert [timing["since_start_s"] for timing in seen.values()] == [21, 31, 62, 72]
