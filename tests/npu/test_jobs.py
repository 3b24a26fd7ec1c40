"""Whole jobs on emulated chips: two at once, ranks that end or hang within a collective, task=doctor."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from npu.jobs import HARDWARE, LAUNCH, REPOSITORY, Run, Start, free_ports, torchrun
from test_launch import alive, ranks_of, wait_for

DUO = "Ascend310P3"
QUESTION = ["model=llava", "world_size=2", "max_new_tokens=12"]
END_S = 10  # at most, from a rank's end to the job's
LINES = 500  # questions: more than are answered meanwhile


def long_job(folder: Path) -> list[str]:
    """Arguments of a job that decodes until it is stopped; out.jsonl grows meanwhile."""
    picture = REPOSITORY / "assets" / "pictures" / "shapes_square.png"
    line = {"question": "What is in the picture?", "image": str(picture), "max_new_tokens": 30, "ignore_eos": True}
    text = "".join(json.dumps({"id": f"r{number}", **line}) + "\n" for number in range(LINES))
    (folder / "in.jsonl").write_text(text)
    files = [f"input={folder / 'in.jsonl'}", f"output={folder / 'out.jsonl'}"]
    return ["model=llava", "task=generate", "engine.max_model_len=512", *files]


def wait_for_answers(folder: Path) -> None:
    out = folder / "out.jsonl"
    assert wait_for(lambda: out.exists() and out.stat().st_size, 120)


def end_of(job: subprocess.Popen, ranks: list[int], harm: Callable[[], object], seconds: float = END_S) -> str:
    """What a job says that ends in time after harm(); its ranks are gone with it."""
    start = time.monotonic()
    harm()
    _, errors = job.communicate(timeout=seconds)
    assert time.monotonic() - start < seconds and job.returncode not in (0, None), errors
    assert not any(map(alive, ranks))
    return errors


def test_two_jobs_at_once(start_on_npu: Start) -> None:
    """Each with ports of its own, and the answer that the other has."""
    with start_on_npu([*LAUNCH, *QUESTION], DUO) as one, start_on_npu([*LAUNCH, *QUESTION], DUO) as two:
        said = [job.communicate(timeout=120) for job in (one, two)]
    assert [one.returncode, two.returncode] == [0, 0], said
    assert said[0][0] == said[1][0] != ""
    found = [re.search(r"starting 2 ranks, MASTER_PORT=(\d+), HCCL_IF_BASE_PORT=(\d+)", errors) for _, errors in said]
    masters, bases = zip(*(map(int, line.groups()) for line in found if line), strict=True)
    assert len(set(masters)) == 2 and abs(bases[0] - bases[1]) >= 16


def test_two_jobs_with_the_same_ports(start_on_npu: Start, run_on_npu: Run, tmp_path: Path) -> None:
    """Asked for by hand: the second one is refused in a line, under torchrun too."""
    base, master = free_ports(), free_ports() - 1
    same = {"HCCL_IF_BASE_PORT": str(base), "MASTER_PORT": str(master)}
    with start_on_npu([*LAUNCH, "world_size=2", *long_job(tmp_path)], DUO, **same) as job:
        wait_for_answers(tmp_path)
        for rank in ranks_of(job.pid):
            os.kill(rank, signal.SIGSTOP)  # which leaves it its ports, and us its cores
        for env, words in (
            (same, f"port {master} is in use; choose a free one with launcher.master_port=PORT"),
            ({"HCCL_IF_BASE_PORT": str(base + 8)}, "some are in use (.*); unset it, and each job takes free ones"),
        ):
            done = run_on_npu([*LAUNCH, *QUESTION], DUO, **env)
            assert done.returncode == 2 and re.fullmatch(f"error: .*{words}\n", done.stderr), done.stderr
        done = run_on_npu(torchrun(2, LAUNCH[1], "model=llava"), DUO, HCCL_IF_BASE_PORT=str(base))
        cure = f"error: HCCL_IF_BASE_PORT={base}: .* export HCCL_IF_BASE_PORT=PORT, 16 free ones from there on"
        assert done.returncode and re.search(f"^{cure}", done.stderr, re.M), done.stderr


@pytest.mark.parametrize(("launcher", "soc"), (("ours", DUO), ("torchrun", "Ascend910B3")))
def test_a_rank_is_killed(launcher: str, soc: str, start_on_npu: Start, tmp_path: Path) -> None:
    """kill -9 while decoding: the others wait for it in HCCL, whose own complaint would come after minutes."""
    asked = long_job(tmp_path)
    ports = {"HCCL_IF_BASE_PORT": str(free_ports())} if launcher == "torchrun" else {}
    command = torchrun(2, LAUNCH[1], *asked) if launcher == "torchrun" else [*LAUNCH, *asked, "world_size=2"]
    with start_on_npu(command, soc, **ports) as job:
        wait_for_answers(tmp_path)
        ranks = ranks_of(job.pid)
        errors = end_of(job, ranks, lambda: os.kill(ranks[1], signal.SIGKILL))
    words = r"^error: rank 1 was killed by SIGKILL" if launcher == "ours" else r"rank +: 1 .*\n *exitcode +: -9"
    assert re.search(words, errors, re.M) and "EI000" not in errors, errors


def test_an_operator_fails_on_one_rank(soc: str, start_on_npu: Start, tmp_path: Path) -> None:
    """The chip's error, as the next synchronisation of rank 1 tells it."""
    fault = tmp_path / "now"
    with start_on_npu([*LAUNCH, *long_job(tmp_path), "world_size=2"], soc, EMULATED_FAULT=f"1:{fault}") as job:
        wait_for_answers(tmp_path)
        errors = end_of(job, ranks_of(job.pid), fault.touch)
    first = next(line for line in errors.splitlines() if line.startswith("error: "))
    assert first.startswith("error: rank 1 failed: RuntimeError") and "EI000" not in errors, errors
    assert "EZ9999: the error from device(chipId:1): the aicore execution is abnormal" in errors


def test_a_rank_hangs(start_on_npu: Start, tmp_path: Path) -> None:
    """No one knows why: what HCCL says to the rank that waits is all there is to show."""
    with start_on_npu([*LAUNCH, *long_job(tmp_path), "world_size=2"], DUO, HCCL_EXEC_TIMEOUT="3") as job:
        wait_for_answers(tmp_path)
        ranks = ranks_of(job.pid)
        errors = end_of(job, ranks, lambda: os.kill(ranks[1], signal.SIGSTOP), seconds=20)
    assert re.search(r"^error: rank 0 failed: RuntimeError", errors, re.M), errors
    assert "EI0002: rank 0: " in errors and "timed out after 3 s, 1 ranks missing" in errors, errors


def test_doctor(soc: str, start_on_npu: Start) -> None:
    """Everything a job needs is there; locked memory may be this machine's to note."""
    asked = ["task=doctor", f"hardware={HARDWARE[soc]}", "world_size=2", "format=json"]
    with start_on_npu([*LAUNCH, *asked], soc) as job:
        said, errors = job.communicate(timeout=120)
    found = {finding["name"]: finding for finding in json.loads(said)["findings"]}
    assert job.returncode == 0 and json.loads(said)["ok"], said
    assert not [finding for finding in found.values() if finding["state"] == "broken"]
    chips, title = (2, "300I DUO (310P)") if soc == DUO else (8, "800I A2 (910B)")
    assert found["ascend"]["value"].endswith("torch_npu 2.13.0, CANN emulated")
    assert found["chip"]["value"].startswith(f"{chips} x {title}, computes in ")
    assert re.fullmatch(r"all \d+ of the plan .*", found["operations"]["value"])
    assert found["device"]["value"].count(soc) == chips
    assert found["all-reduce"]["value"].startswith("2 ranks over cpu:gloo,npu:hccl: 8 KiB in ")
    assert "plog may not be recorded" not in errors
