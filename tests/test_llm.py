"""from mmdist import LLM: the command line's answers in the hands of a program, whatever becomes of the ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_launch import TORCHRUN, alive, ranks_of, wait_for
from test_tasks import main

from mmdist import LLM, SamplingParams
from mmdist.config import UserError

REPOSITORY = Path(__file__).parents[1]
PICTURES = [str(REPOSITORY / "assets" / "pictures" / name) for name in ("shapes.png", "shapes_square.png")]
QUESTION = "What is in the picture?"
SHORT = SamplingParams(max_new_tokens=8)
LONG = SamplingParams(max_new_tokens=3000, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(model="llava_next", world_size=2) as llm:
        yield llm


def test_answers_are_those_of_the_command_line(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """task=generate on one rank, LLM on two: greedy and sampled, questions, raw prompts and conversations."""
    sampled = {"temperature": 1.0, "seed": 7, "max_new_tokens": 8}
    lines: list[dict[str, Any]] = [
        {"id": "a", "question": QUESTION, "image": PICTURES[0], "max_new_tokens": 8},
        {"id": "b", "question": QUESTION, "image": PICTURES[1], **sampled},
        {"id": "c", "prompt": "What is this?", "max_new_tokens": 8},
    ]
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(monkeypatch, "task=generate", "input=in.jsonl", "output=out.jsonl", "world_size=1") == 0
    wanted = {line["id"]: line for line in map(json.loads, Path("out.jsonl").read_text().splitlines())}

    outputs = llm.generate(lines)
    assert [output.line() for output in outputs] == [wanted[name] for name in "abc"]
    params = [SHORT, SamplingParams(**sampled)]
    asked = llm.generate([QUESTION, QUESTION], images=[Image.open(PICTURES[0]), [Path(PICTURES[1])]], params=params)
    assert [output.token_ids for output in asked] == [wanted[name]["token_ids"] for name in "ab"]
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    (answer,) = llm.chat([message], images=[PICTURES[0]], params=SHORT)
    assert answer.text == wanted["a"]["text"]
    both = llm.chat([[message], [message]], images=PICTURES, params=params)
    assert [output.text for output in both] == [wanted[name]["text"] for name in "ab"]


def test_a_stream_is_the_answer_in_pieces(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths are those of the program now; a stream may be left, and others asked beside it."""
    (whole,) = llm.generate(QUESTION, images=PICTURES[:1])
    (tmp_path / "here.png").write_bytes(Path(PICTURES[0]).read_bytes())
    monkeypatch.chdir(tmp_path)
    stream = llm.stream(QUESTION, images="here.png")
    deltas = [next(stream).delta]
    left = llm.stream(QUESTION, images=PICTURES[:1], params=LONG)
    assert next(left).num_tokens == 1
    deltas += [output.delta for output in stream]
    assert len(deltas) == len(whole.token_ids) and "".join(deltas) == whole.text
    number, unread = max(llm._inbox.open.items())
    left.close()
    llm._inbox.open[number] = unread
    assert llm.generate(QUESTION, images=PICTURES[:1])[0].text == whole.text
    assert unread.qsize() < 2000, "the stream that was left was computed to its end"
    del llm._inbox.open[number]


def test_threads_may_ask_at_once(llm: LLM) -> None:
    texts: dict[int, str] = {}

    def ask(number: int) -> None:
        texts[number] = llm.generate(QUESTION, images=[PICTURES[number % 2]])[0].text

    threads = [threading.Thread(target=ask, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert texts[0] == texts[2] != texts[1] == texts[3]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompts": QUESTION, "images": ["nowhere.png"]}, "nowhere.png: no such picture"),
    ({"prompts": QUESTION, "images": [3]}, "images: expected paths or PIL pictures, found int"),
    ({"prompts": ["a", "b"], "images": PICTURES[:1]}, "images: expected a list with one entry for each of the 2"),
    ({"prompts": ["a", "b"], "params": [SHORT]}, "params: expected a list"),
    ({"prompts": {"promt": "a"}}, "unknown key promt"),
    ({"prompts": {"prompt": "a", "images": []}, "images": PICTURES}, "images: given twice"),
    ({"prompts": 3}, "prompts: expected text"),
    ({"prompts": ["a", 3]}, "prompts: expected text or a request"),
    ({"prompts": [QUESTION, "b " * 9000]}, "prompt 1: the prompt has"),
    ({"prompts": QUESTION, "video": PICTURES[0]}, "takes pictures only"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "words"), WRONG, ids=[words for _, words in WRONG])
def test_a_wrong_question_is_refused_and_the_next_one_answered(llm: LLM, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        llm.generate(**asked)
    assert llm.generate("What is this?", params=SHORT)[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "gpt"}, "llava_next"),
        ({"checkpoint": "/nowhere", "engine": {"blocksize": 4}}, "did you mean engine.block_size"),
    ],
)
def test_a_wrong_setting_is_what_the_command_line_says(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        LLM(**settings)


def test_task_is_no_setting() -> None:
    with pytest.raises(UserError, match="task=chat"):
        LLM(task="chat")


def test_a_killed_rank_ends_the_question_with_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another model meanwhile is not touched; nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    other = LLM(model="vlmo", world_size=1, dtype="float32")
    with LLM(model="llava", world_size=2) as llm:
        ranks = ranks_of(llm._job.process.pid)
        stream = llm.stream(QUESTION, images=PICTURES[1:], params=LONG)
        next(stream)
        os.kill(ranks[1], signal.SIGKILL)
        with pytest.raises(RuntimeError, match="rank 1 was killed by SIGKILL"):
            list(stream)
        with pytest.raises(RuntimeError, match="rank 1 was killed by SIGKILL"):
            llm.generate(QUESTION)
        assert wait_for(lambda: not any(map(alive, ranks)), 10)
    (answer,) = other.generate("which object is on the left?", images=PICTURES[:1])
    assert answer.text == "the purple triangle" and answer.top[0]["answer"] == answer.text  # type: ignore[attr-defined]
    other.close()
    with pytest.raises(UserError, match="closed"):
        other.generate(QUESTION)
    assert other._job.process.poll() == 0 and list(tmp_path.iterdir()) == []


# No guard of __main__, and threads before it starts.
SCRIPT = f"""
import sys, threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
from mmdist import LLM
assert "torch" not in sys.modules
llm = LLM(model="llava_next", world_size=2)
print(llm._job.process.pid, flush=True)
print(llm.generate({QUESTION!r}, images={PICTURES[:1]!r})[0].text, flush=True)
assert "torch" not in sys.modules
if "wait" in sys.argv:
    next(llm.stream({QUESTION!r}, images={PICTURES[:1]!r}))
    input()
"""


def test_a_script_that_dies_takes_its_ranks_along(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", "wait"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as script:
        assert script.stdout is not None
        job = int(script.stdout.readline())
        assert script.stdout.readline().startswith("a red square")
        processes = [job, *ranks_of(job)]
        assert len(processes) == 3
        script.kill()
        assert wait_for(lambda: not any(map(alive, processes)), 10)


def test_under_torchrun_its_ranks_are_the_ranks(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        f"import os\nfrom mmdist import LLM\nllm = LLM(model='llava_next')\n"
        f"print(os.environ['RANK'], llm.world_size, llm.generate({QUESTION!r}, images={PICTURES[:1]!r})[0].text)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([*TORCHRUN[:-1], "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0 2 a red square") and done.stdout.count("\n") == 1
