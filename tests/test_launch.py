"""The whole program as a user runs it: our launcher and torchrun, killed ranks, two jobs, sweeps, a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import GOLDEN

REPOSITORY = Path(__file__).parents[1]
LAUNCH = [sys.executable, str(REPOSITORY / "launch.py")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(REPOSITORY / "launch.py")]
MISTRAL = GOLDEN / "llava_next_mistral"
MODEL = [f"checkpoint={MISTRAL / 'checkpoint'}", "dtype=float32", "engine.max_model_len=512"]
BOAT = [f"image={MISTRAL / 'inputs' / 'panorama.png'}", "prompt=Where is the boat?", "max_new_tokens=12"]
ANSWER = "\ufffd\ufffd\ufffd\ufffd\ufffdY\x145Y\u035cO\n"  # the reference's text of llava_next_mistral/panorama


def run(*arguments: str, command: list[str] | None = None, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*(command or LAUNCH), *arguments], capture_output=True, text=True, timeout=120, env={**os.environ, **env}
    )


def write_requests(path: Path, count: int, **params) -> Path:
    items = json.loads((MISTRAL / "inputs" / "items.json").read_text())["items"]
    lines = []
    for number in range(count):
        item = items[number % len(items)]
        images = [str(MISTRAL / "inputs" / name) for name in item.get("images", [])]
        lines.append({"id": f"r{number}", "messages": item["messages"], "images": images, **params})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def ranks_of(parent: int) -> list[int]:
    """Process ids of the ranks an agent started, in the order of their start."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_plain_and_torchrun_give_the_same() -> None:
    plain = run(*MODEL, *BOAT, "world_size=2")
    assert (plain.returncode, plain.stdout) == (0, ANSWER), plain.stderr
    assert re.search(r"MASTER_PORT=200[345]\d", plain.stderr) and "collectives over shm" in plain.stderr
    torchrun = run(*MODEL, *BOAT, command=TORCHRUN)
    assert (torchrun.returncode, torchrun.stdout) == (0, ANSWER), torchrun.stderr


def test_without_shared_memory_gloo_is_used(tmp_path: Path) -> None:
    """A compiler that is not there, and an empty cache: said in a line, refused only where shm was asked for."""
    env = {"CC": "/nowhere/cc", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    result = run(*MODEL, *BOAT, "world_size=2", **env)
    assert (result.returncode, result.stdout) == (0, ANSWER), result.stderr
    assert result.stderr.count("there is no native library") == 1 and "collectives over gloo" in result.stderr
    result = run(*MODEL, *BOAT, "world_size=2", "hardware.collectives=shm", **env)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and "hardware.collectives=shm: rank 0: there is no native library" in line
    assert "collectives over gloo" in run(*MODEL, *BOAT, "world_size=2", "hardware.collectives=gloo").stderr


def test_one_output_folder_a_job_and_no_litter(tmp_path: Path) -> None:
    assert run(*MODEL, *BOAT, "world_size=2").returncode == 0
    (job,) = tmp_path.glob("outputs/*/*")
    assert sorted(path.name for path in job.iterdir()) == ["config.json", "run.log"]
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    assert json.loads((job / "config.json").read_text())["prompt"] == "Where is the boat?"


def test_user_environment_is_kept(tmp_path: Path) -> None:
    result = run(*MODEL, *BOAT, "world_size=2", MASTER_PORT="20049", OMP_NUM_THREADS="1")
    assert result.returncode == 0 and "MASTER_PORT=20049" in result.stderr


@pytest.mark.parametrize("command", (LAUNCH, TORCHRUN), ids=("ours", "torchrun"))
def test_killed_rank_ends_the_job(tmp_path: Path, command: list[str]) -> None:
    """kill -9 of rank 1 while decoding: all end within 10 s, non-zero, the rank named, no orphans."""
    requests = write_requests(tmp_path / "in.jsonl", 200, max_new_tokens=200, ignore_eos=True)
    extra = ["world_size=2"] if command is LAUNCH else []
    arguments = [*command, *MODEL, "task=generate", f"input={requests}", f"output={tmp_path / 'out.jsonl'}", *extra]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=os.environ) as job:
        assert wait_for(lambda: (tmp_path / "out.jsonl").exists() and (tmp_path / "out.jsonl").stat().st_size, 60)
        ranks = ranks_of(job.pid)
        assert len(ranks) == 2
        cores = [os.sched_getaffinity(rank) for rank in ranks]
        assert cores[0].isdisjoint(cores[1]) or len(os.sched_getaffinity(0)) == 1
        start = time.monotonic()
        os.kill(ranks[1], signal.SIGKILL)
        assert wait_for(lambda: not any(map(alive, ranks)), 10)
        _, errors = job.communicate(timeout=10)
        assert time.monotonic() - start < 10 and job.returncode != 0
    if command is LAUNCH:
        assert "error: rank 1 was killed by SIGKILL" in errors
    else:
        assert re.search(r"rank\s*: 1", errors) and "SIGKILL" in errors


def test_killed_launcher_leaves_no_orphans(tmp_path: Path) -> None:
    requests = write_requests(tmp_path / "in.jsonl", 200, max_new_tokens=200, ignore_eos=True)
    arguments = [*LAUNCH, *MODEL, "task=generate", f"input={requests}", "output=out.jsonl", "world_size=2"]
    with subprocess.Popen(arguments, stderr=subprocess.DEVNULL) as job:
        assert wait_for(lambda: (tmp_path / "out.jsonl").exists() and (tmp_path / "out.jsonl").stat().st_size, 60)
        ranks = ranks_of(job.pid)
        job.kill()
        assert wait_for(lambda: not any(map(alive, ranks)), 10)


def test_interrupt_ends_a_batch(tmp_path: Path) -> None:
    requests = write_requests(tmp_path / "in.jsonl", 200, max_new_tokens=200, ignore_eos=True)
    arguments = [*LAUNCH, *MODEL, "task=generate", f"input={requests}", "output=out.jsonl", "world_size=2"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as job:
        assert wait_for(lambda: (tmp_path / "out.jsonl").exists() and (tmp_path / "out.jsonl").stat().st_size, 60)
        job.send_signal(signal.SIGINT)
        _, errors = job.communicate(timeout=15)
    assert job.returncode == 130 and "Traceback" not in errors


def test_killed_batch_goes_on_where_it_stopped(tmp_path: Path) -> None:
    requests = write_requests(tmp_path / "in.jsonl", 40, max_new_tokens=20, ignore_eos=True)
    arguments = [*MODEL, "task=generate", f"input={requests}", "output=out.jsonl", "world_size=1"]
    output = tmp_path / "out.jsonl"
    with subprocess.Popen([*LAUNCH, *arguments], stderr=subprocess.DEVNULL) as job:
        assert wait_for(lambda: output.exists() and output.read_text().count("\n") >= 8, 60)
        job.kill()
    done = output.read_text().splitlines()
    output.write_text("\n".join(done) + '\n{"id": "r39", "te')  # and a line cut in half
    again = run(*arguments)
    assert again.returncode == 0, again.stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [json.dumps(line) for line in lines[: len(done)]] == done
    assert sorted(line["id"] for line in lines) == sorted(f"r{i}" for i in range(40))


def test_two_jobs_at_once(tmp_path: Path) -> None:
    jobs = [
        subprocess.Popen([*LAUNCH, *MODEL, *BOAT, "world_size=2"], stdout=-1, stderr=-1, text=True) for _ in range(2)
    ]
    results = [job.communicate(timeout=120) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0] and [out for out, _ in results] == [ANSWER, ANSWER]
    ports = {re.search(r"MASTER_PORT=(\d+)", errors)[1] for _, errors in results}
    assert len(ports) == 2
    assert len(list(tmp_path.glob("outputs/*/*"))) == 2


def test_sweep_runs_one_job_a_point(tmp_path: Path) -> None:
    result = run("-m", *MODEL, *BOAT, "world_size=1,2")
    assert (result.returncode, result.stdout) == (0, 2 * ANSWER), result.stderr
    jobs = [next(tmp_path.glob(f"multirun/*/*/world_size={size}")) for size in (1, 2)]
    assert [json.loads((job / "config.json").read_text())["world_size"] for job in jobs] == [1, 2]
    assert not (tmp_path / "outputs").exists()


def ignores(pid: int, number: signal.Signals) -> bool:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn"))
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)


def test_a_rank_that_is_stopped_leaves_its_error_whole(tmp_path: Path) -> None:
    """SIGTERM while it writes: a pipe holds it there until someone reads."""
    pipe = tmp_path / "error.json"
    os.mkfifo(pipe)
    environment = {**os.environ, "RANK": "0", "MMDIST_AGENT": "1", "TORCHELASTIC_ERROR_FILE": str(pipe)}
    code = "from mmdist.launch import become_rank; become_rank(lambda: 1 / 0)"
    rank = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=REPOSITORY)
    try:
        deadline = time.monotonic() + 60
        while not ignores(rank.pid, signal.SIGTERM):
            assert time.monotonic() < deadline, "SIGTERM would end it"
            time.sleep(0.05)
        rank.terminate()
        assert "ZeroDivisionError" in json.loads(pipe.read_text())["message"]["message"]
        assert rank.wait(60) == 1
    finally:
        rank.kill()
        rank.wait()


def test_split_folder_loads_directly(tmp_path: Path) -> None:
    split = [sys.executable, "-m", "weights_tools", "split", str(MISTRAL / "checkpoint"), "--ranks", "2"]
    made = subprocess.run([*split, "--dst", str(tmp_path / "tp2")], cwd=REPOSITORY, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    arguments = [f"checkpoint={tmp_path / 'tp2'}", *MODEL[1:], *BOAT]
    result = run(*arguments, "world_size=2")
    assert (result.returncode, result.stdout) == (0, ANSWER), result.stderr
    other = run(*arguments, "world_size=4")
    assert other.returncode == 2 and "split for world_size=2, asked for 4" in other.stderr


class Terminal:
    """A person at a pseudo-terminal in front of launch.py."""

    def __init__(self, *arguments: str):
        self.master, slave = pty.openpty()
        self.job = subprocess.Popen(
            [*LAUNCH, *arguments], stdin=slave, stdout=slave, stderr=subprocess.DEVNULL, start_new_session=True
        )
        os.close(slave)
        self.seen = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        self.job.kill()
        self.job.wait()
        os.close(self.master)

    def expect(self, text: str, seconds: float = 60) -> str:
        """Read on until `text` comes; what was read before it."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 4096).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, line: str) -> None:
        os.write(self.master, line.encode() + b"\n")


def test_conversation_in_a_terminal() -> None:
    """A picture, a question, a mistake, help, quit."""
    with Terminal(*MODEL, "world_size=2", "max_new_tokens=12", "ignore_eos=true") as person:
        person.expect("> ")
        person.type(f"/image {MISTRAL / 'inputs' / 'panorama.png'}")
        person.expect("> ")
        person.type("Where is the boat?")
        assert "Y\x145Y" in person.expect("> ").replace("^T", "\x14")
        person.type("/image /nowhere.png")
        assert "no such picture" in person.expect("> ")
        person.type("/help")
        assert "/reset" in person.expect("> ")
        person.type("/quit")
        assert person.job.wait(20) == 0


def test_interrupt_stops_the_answer_not_the_program() -> None:
    endless = ["engine.max_model_len=8192", "max_new_tokens=8000", "ignore_eos=true"]
    with Terminal(*MODEL[:2], "world_size=2", *endless) as person:
        person.expect("> ")
        person.type("Tell me everything.")
        time.sleep(3)
        os.kill(person.job.pid, signal.SIGINT)
        person.expect("\n> ", 10)
        person.type("/reset")
        person.expect("> ", 10)
        person.type("/quit")
        assert person.job.wait(20) == 0


@pytest.mark.parametrize("command", (LAUNCH, TORCHRUN), ids=("ours", "torchrun"))
def test_mistake_found_by_rank_zero_is_one_line(command: list[str]) -> None:
    extra = ["world_size=2"] if command is LAUNCH else []
    result = run(*MODEL, f"prompt={'word ' * 600}", *extra, command=command)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode != 0 and len(lines) == 1 and "engine.max_model_len=512" in lines[0]
    assert command is TORCHRUN or (result.returncode == 2 and "Traceback" not in result.stderr)
