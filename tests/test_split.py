"""weights_tools split: interrupted, killed, told twice, out of space, and how much memory it takes."""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from split_cases import Q_PROJ, contents, load, one_line, source, spoil, stop_after

from mmdist.config import UserError
from mmdist.manifest import part_file
from mmdist.models.family import list_models
from mmdist.tp import TP
from weights_tools import split
from weights_tools.cli import main
from weights_tools.journal import JOURNAL

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.parametrize("num_writes", [0, 1, 60, 100])
def test_interrupted_split_goes_on(
    splits: dict, tmp_path: Path, num_writes: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    dst = tmp_path / "dst"
    argv = ["split", str(source()), "--ranks", "2", "--dst", str(dst)]
    with monkeypatch.context() as patched:
        stop_after(patched, num_writes, OSError(28, "No space left on device"))
        assert main(argv) == 2
        assert "No space left on device" in one_line(capsys)
    assert not dst.exists()
    with pytest.raises(UserError):
        load(tmp_path / "dst.partial", TP(0, 2))
    done = len((tmp_path / "dst.partial" / JOURNAL).read_text().splitlines()) - 1
    read = []
    monkeypatch.setattr(split.Checkpoint, "read_whole", spy(split.Checkpoint.read_whole, read))
    assert main(argv) == 0
    assert len(read) == 90 - done and (done > 50) == (num_writes >= 60)
    assert contents(dst) == contents(splits["mistral", 2])
    assert [path.name for path in tmp_path.iterdir()] == ["dst"]


def spy(function, calls: list):
    def wrapper(self, name):
        calls.append(name)
        return function(self, name)

    return wrapper


def test_killed_split_goes_on(splits: dict, tmp_path: Path):
    """kill -9 in the middle of a journal line; what was committed before is not done again."""
    program = f"""
        import os, signal, sys
        from weights_tools import job
        from weights_tools.cli import main
        from weights_tools.journal import Journal
        job.COMMIT_BYTES = 1
        commit, before = Journal.commit, []
        def killed(self, lines):
            before.append(lines)
            if len(before) > 10:
                self.file.write(b'{{"name": "half a li')
                self.file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            commit(self, lines)
        Journal.commit = killed
        main(["split", {str(source())!r}, "--ranks", "2", "--dst", "dst"])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["dst.partial"]
    assert len((tmp_path / "dst.partial" / JOURNAL).read_text().splitlines()) == 1 + 9 + 1
    assert main(["split", str(source()), "--ranks", "2", "--dst", str(tmp_path / "dst")]) == 0
    assert contents(tmp_path / "dst") == contents(splits["mistral", 2])


def test_left_over_of_another_job_is_not_gone_on_with(
    splits: dict, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    dst = tmp_path / "dst"
    for ranks in ("4", "2"):  # 4 ranks, then 2 from a source that is changed before it is finished
        with monkeypatch.context() as patched:
            stop_after(patched, 60, KeyboardInterrupt())
            assert main(["split", str(checkpoint), "--ranks", ranks, "--dst", str(dst)]) == 130
    (path,) = checkpoint.glob("model-00001*")
    spoil(path, "image_newline", lambda x: x + 1)
    assert main(["split", str(checkpoint), "--ranks", "2", "--dst", str(dst)]) == 0
    assert main(["verify", str(dst), "--against", str(checkpoint)]) == 0
    assert contents(dst).keys() == contents(splits["mistral", 2]).keys()


def test_part_file_lost_from_what_is_left_over(splits: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    argv = ["split", str(source()), "--ranks", "2", "--dst", str(tmp_path / "dst")]
    with monkeypatch.context() as patched:
        stop_after(patched, 60, KeyboardInterrupt())
        assert main(argv) == 130
    (tmp_path / "dst.partial" / part_file(0, 2)).unlink()
    assert main(argv) == 0
    assert contents(tmp_path / "dst") == contents(splits["mistral", 2])


def test_two_splits_at_once_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    partial = tmp_path / "dst.partial"
    partial.mkdir()
    with open(partial / JOURNAL, "ab") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        assert main(["split", str(source()), "--ranks", "2", "--dst", str(tmp_path / "dst")]) == 2
    assert f"{partial}: another split is writing it" in one_line(capsys)


def test_what_is_there_is_replaced_only_when_asked(tp2: Path, splits: dict, capsys: pytest.CaptureFixture):
    before = contents(tp2)
    argv = ["split", str(source()), "--ranks", "4", "--dst", str(tp2)]
    assert main(argv) == 2
    assert f"{tp2}: is there already; choose another --dst, or --force" in one_line(capsys)
    assert contents(tp2) == before
    assert main([*argv, "--force"]) == 0
    assert contents(tp2) == contents(splits["mistral", 4])
    assert [path.name for path in tp2.parent.iterdir()] == ["tp2"]


def test_force_replaces_no_other_folder(tmp_path: Path, capsys: pytest.CaptureFixture):
    for name in ("dst", "other.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "letters.txt").write_text("dear")
    argv = ["split", str(source()), "--ranks", "4", "--force", "--dst"]
    assert main([*argv, str(tmp_path / "dst")]) == 2
    assert "not a folder made by split" in one_line(capsys)
    assert main([*argv, str(tmp_path / "other")]) == 2
    assert "other.partial: in the way" in one_line(capsys)
    assert (tmp_path / "dst" / "letters.txt").exists() and (tmp_path / "other.partial" / "letters.txt").exists()


MISTAKES = {
    "split SRC --ranks 3": "legal sizes: 1, 2, 4, 8",
    "split SRC --ranks 0": "0 is not a whole number above 0",
    "split SRC": "required: --ranks",
    "split no_such --ranks 2": f"no_such: neither a folder nor a family; the families are: {', '.join(list_models())}",
    "split llava_next --ranks 2 --src no_such": "no_such: no such folder",
    "split SRC --ranks 2 --src SRC": "with --src, MODEL is the name of a family",
    "split SPLIT --ranks 2": "split already, for 2 ranks",
    "split EMPTY --ranks 2": "no config.json",
    "verify no_such": "no_such: no such folder",
    "verify SPLIT --against no_such": "no_such: no such folder",
    "verify SRC --against SRC": "neither split nor quantised, as --against is for; weights_tools diff compares any two",
    "verify EMPTY": "the weights are missing",
    "inspect no_such": "no_such: no such folder",
    "inspect SRC --ranks 3": "legal sizes: 1, 2, 4, 8",
    "inspect SPLIT --ranks 2": "split already",
    "merge SRC": "invalid choice",
    "": "required",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_mistakes_are_one_line(command: str, splits: dict, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "empty").mkdir()
    places = {"SRC": source(), "SPLIT": splits["mistral", 2], "EMPTY": tmp_path / "empty"}
    capsys.readouterr()
    try:
        code = main([str(places.get(word, word)) for word in command.split()])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    assert code == 2
    assert MISTAKES[command] in one_line(capsys)


def test_too_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 0, 100))
    assert main(["split", str(source()), "--ranks", "2", "--dst", str(tmp_path / "dst")]) == 2
    assert "needed, 100 bytes free" in one_line(capsys)
    assert not list(tmp_path.iterdir())


def test_source_of_one_file_and_an_unknown_dtype(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    tensors = {name: x for path in checkpoint.glob("*.safetensors") for name, x in load_file(path).items()}
    for path in checkpoint.glob("model*"):
        path.unlink()
    save_file(tensors, checkpoint / "model.safetensors")
    argv = ["split", "llava_next", "--src", str(checkpoint), "--ranks", "2"]
    assert main(argv) == 0  # beside the source
    assert main(["verify", str(tmp_path / "source-tp2"), "--against", str(checkpoint)]) == 0
    save_file({**tensors, Q_PROJ: tensors[Q_PROJ].to(torch.float8_e4m3fn)}, checkpoint / "model.safetensors")
    assert main(["inspect", str(checkpoint)]) == 0
    capsys.readouterr()
    assert main([*argv, "--force"]) == 2
    assert f"{Q_PROJ} is F8_E4M3; mmdist reads" in one_line(capsys)


def peak_rss(*argv: str) -> int:
    """Most bytes of memory that a process of its own has had while running the command."""
    code = "import resource, sys; from weights_tools.cli import main; assert main(sys.argv[1:]) == 0"
    code += "; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    command = [sys.executable, "-c", code, *argv]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    return int(result.stdout.split()[-1]) * 1024


def test_memory_is_about_one_tensor(checkpoint: Path, tmp_path: Path):
    """Eleven tensors of 12 MiB in one file."""
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"] |= {"vocab_size": 1 << 16, "intermediate_size": 1 << 16}
    (checkpoint / "config.json").write_text(json.dumps(config))
    tensors = {name: x for path in checkpoint.glob("*.safetensors") for name, x in load_file(path).items()}
    for name, x in tensors.items():
        if 416 in x.shape or 160 in x.shape:
            tensors[name] = torch.ones([1 << 16 if size in (416, 160) else size for size in x.shape], dtype=x.dtype)
    for path in checkpoint.glob("model*"):
        path.unlink()
    save_file(tensors, checkpoint / "model.safetensors")
    total, largest = (count(x.nbytes for x in tensors.values()) for count in (sum, max))
    del tensors, x
    bare = peak_rss("split", str(source()), "--ranks", "4", "--dst", str(tmp_path / "bare"))
    dst = str(tmp_path / "dst")
    for argv in (
        ["split", str(checkpoint), "--ranks", "4", "--dst", dst],
        ["verify", dst, "--against", str(checkpoint)],
        ["quantize", str(checkpoint), "--scheme", "w8a16", "--dst", str(tmp_path / "w8a16")],
    ):
        assert peak_rss(*argv) - bare < 2.5 * largest < total / 4
