"""weights_tools: a split folder loads to the same parameters; whatever is wrong in one is refused or found, by name."""

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
from conftest import GOLDEN
from safetensors.torch import load_file, save_file

from mmdist.config import UserError
from mmdist.manifest import MANIFEST, load_manifest, part_file, save_manifest
from mmdist.models.base import build_model, find_model, load_model_config
from mmdist.plan import Piece, Placement, shard_plan
from mmdist.tp import TP
from mmdist.weights import load_weights, open_checkpoint
from weights_tools import split
from weights_tools.cli import main
from weights_tools.journal import JOURNAL
from weights_tools.part_file import PartFile
from weights_tools.split_checks import tiling_gaps

CASES = [
    (case, size)
    for case, sizes in (("mistral", (1, 2, 4, 8)), ("vicuna", (1, 2, 4, 8)), ("34b", (1, 2, 4)))
    for size in sizes
]
Q_PROJ = "language_model.model.layers.1.self_attn.q_proj.weight"


def source(case: str = "mistral") -> Path:
    return GOLDEN / f"llava_next_{case}" / "checkpoint"


def make_split(folder: Path, case: str, size: int) -> Path:
    dst = folder / f"{case}-tp{size}"
    assert main(["split", str(source(case)), "--ranks", str(size), "--dst", str(dst)]) == 0
    return dst


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    folder = tmp_path_factory.mktemp("splits")
    return {(case, size): make_split(folder, case, size) for case, size in CASES}


@pytest.fixture
def tp2(splits: dict, tmp_path: Path) -> Path:
    """A split folder to spoil."""
    return shutil.copytree(splits["mistral", 2], tmp_path / "tp2")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return Path(shutil.copytree(source(), tmp_path / "source"))


def load(folder: Path, tp: TP) -> dict[str, torch.Tensor]:
    """This rank's parameters, loaded as the engine does."""
    family = find_model("llava_next")
    model = build_model(family, load_model_config(family, folder), tp, torch.float16)
    plan = shard_plan(model, tp)
    checkpoint = open_checkpoint(folder, family.renames, family.ignored, tp)
    checkpoint.check(plan, "llava_next")
    load_weights(model, checkpoint, plan, tp, torch.device("cpu"))
    return {name: param for name, param in model.named_parameters() if not param.is_meta}


def spoil(path: Path, name: str, edit) -> None:
    """Change one tensor of a safetensors file (the file's metadata stays)."""
    tensors = load_file(path)
    tensors[name] = edit(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def flip_byte(path: Path, name: str) -> None:
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    raw[start + json.loads(raw[8:start])[name]["data_offsets"][0]] ^= 1
    path.write_bytes(raw)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def one_line(capsys: pytest.CaptureFixture) -> str:
    """What went to stderr: one line, no traceback."""
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err, err
    return err


@pytest.mark.parametrize(("case", "size"), CASES)
def test_split_loads_like_its_source(splits: dict, case: str, size: int):
    for rank in range(size):
        want, got = load(source(case), TP(rank, size)), load(splits[case, size], TP(rank, size))
        assert want.keys() == got.keys()
        assert any(name.startswith("vision.") for name in got) == (rank == 0)
        for name, param in want.items():
            assert torch.equal(param, got[name]), name


@pytest.mark.parametrize(("case", "size"), CASES)
def test_verify_finds_nothing_in_a_good_split(splits: dict, case: str, size: int, capsys: pytest.CaptureFixture):
    assert main(["verify", str(splits[case, size]), "--against", str(source(case))]) == 0
    assert "all is well" in capsys.readouterr().out


def test_split_folder_is_a_whole_one(splits: dict):
    folder = splits["mistral", 4]
    names = {path.name for path in folder.iterdir()}
    parts = {part_file(rank, 4) for rank in range(4)}
    side = {path.name for path in source().iterdir() if "safetensors" not in path.name}
    assert names == parts | side | {MANIFEST}
    for path in folder.glob("*.safetensors"):  # readable by others, every tensor aligned to its dtype
        assert load_file(path)
        raw = path.read_bytes()
        assert int.from_bytes(raw[:8], "little") % 8 == 0
    assert not list(folder.parent.glob("*.partial"))


def test_vocabulary_that_does_not_divide():
    """Seven ranks of three rows each hold a vocabulary of 10: the last three hold 1, 0 and 0."""
    placement = Placement("w", (10, 2), "w", 0, (Piece(10, padded=21),))
    assert [placement.part_shape(TP(rank, 7))[0] for rank in range(7)] == [3, 3, 3, 1, 0, 0, 0]


def test_empty_part(tmp_path: Path):
    file = PartFile(tmp_path / "a.safetensors", [("none", "F16", (0, 4)), ("byte", "U8", (3,)), ("wide", "F32", (2,))])
    file.write("none", torch.zeros(0, 4, dtype=torch.float16))
    file.write("wide", torch.tensor([1.0, 2.0]))
    file.write("byte", torch.tensor([1, 2, 3], dtype=torch.uint8))
    file.close()
    got = load_file(tmp_path / "a.safetensors")
    assert got["none"].shape == (0, 4) and got["byte"].tolist() == [1, 2, 3] and got["wide"].tolist() == [1.0, 2.0]


def test_another_world_size_is_refused(splits: dict):
    with pytest.raises(UserError, match="split for world_size=2, asked for 4"):
        load(splits["mistral", 2], TP(0, 4))


def test_flipped_byte_is_named(tp2: Path, capsys: pytest.CaptureFixture):
    path = tp2 / part_file(1, 2)
    flip_byte(path, Q_PROJ)
    with pytest.raises(UserError, match=f"{path}: {Q_PROJ} is damaged"):
        load(tp2, TP(1, 2))
    assert main(["verify", str(tp2)]) == 1
    assert f"{path}: {Q_PROJ} is damaged" in capsys.readouterr().out


def test_missing_part_is_named(tp2: Path, capsys: pytest.CaptureFixture):
    path = tp2 / part_file(1, 2)
    path.unlink()
    for rank in range(2):
        with pytest.raises(UserError, match=f"{path}: missing"):
            load(tp2, TP(rank, 2))
    assert main(["verify", str(tp2)]) == 1
    assert f"{path}: missing" in capsys.readouterr().out


@pytest.mark.parametrize("size", [4, 100, -100])
def test_truncated_part_is_named(tp2: Path, size: int, capsys: pytest.CaptureFixture):
    path = tp2 / part_file(1, 2)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=f"{path}: truncated"):
        load(tp2, TP(1, 2))
    assert main(["verify", str(tp2)]) == 1
    assert f"{path}: truncated" in capsys.readouterr().out


def test_missing_and_extra_tensors_are_named(tp2: Path, capsys: pytest.CaptureFixture):
    path = tp2 / part_file(1, 2)
    tensors = load_file(path)
    tensors["extra"] = tensors.pop(Q_PROJ)
    save_file(tensors, path)
    with pytest.raises(UserError, match=f"{path}: {Q_PROJ} is missing"):
        load(tp2, TP(1, 2))
    assert main(["verify", str(tp2)]) == 1
    out = capsys.readouterr().out
    assert f"{path}: {Q_PROJ} is missing" in out and f"{path}: extra is not in {MANIFEST}" in out


def test_another_dtype_is_named(tp2: Path, capsys: pytest.CaptureFixture):
    """The same bytes under another dtype have the right hash."""
    path = tp2 / part_file(1, 2)
    spoil(path, Q_PROJ, lambda x: x.view(torch.bfloat16))
    with pytest.raises(UserError, match=f"{path}: {Q_PROJ} is torch.bfloat16"):
        load(tp2, TP(1, 2))
    assert main(["verify", str(tp2)]) == 1
    assert f"{path}: {Q_PROJ} is torch.bfloat16" in capsys.readouterr().out


def test_parts_without_their_manifest_are_refused(tp2: Path, capsys: pytest.CaptureFixture):
    (tp2 / MANIFEST).unlink()
    with pytest.raises(UserError, match="without their manifest"):
        load(tp2, TP(0, 2))
    assert main(["verify", str(tp2)]) == 2
    assert "without their manifest.json" in one_line(capsys)


@pytest.mark.parametrize("text", ["", "[]", '{"format_version": 99, "tensors": []}', '{"format_version": 1}', "\xff"])
def test_damaged_manifest(tp2: Path, text: str, capsys: pytest.CaptureFixture):
    (tp2 / MANIFEST).write_bytes(text.encode("latin1"))
    with pytest.raises(UserError, match=str(tp2 / MANIFEST)):
        load(tp2, TP(0, 2))
    assert main(["verify", str(tp2)]) == 1
    assert str(tp2 / MANIFEST) in capsys.readouterr().out


def test_manifest_whose_parts_do_not_tile(tp2: Path, capsys: pytest.CaptureFixture):
    manifest = load_manifest(tp2)
    entry = next(entry for entry in manifest.tensors if entry.name == Q_PROJ)
    entry.parts[1].ranges = [[50, 96]]
    save_manifest(manifest, tp2)
    assert main(["verify", str(tp2)]) == 1
    assert f"{Q_PROJ} rows 48 to 50 of dim 0 are in no part" in capsys.readouterr().out
    del entry.parts[1]
    save_manifest(manifest, tp2)
    assert main(["verify", str(tp2)]) == 1
    assert f"{Q_PROJ} is on ranks [0], a cut tensor is on [0, 1]" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"{Q_PROJ} has no part for rank 1"):
        load(tp2, TP(1, 2))


def test_tiling_counts_copies_once_and_sees_overlaps(splits: dict):
    manifest = load_manifest(splits["mistral", 8])
    entry = next(entry for entry in manifest.tensors if entry.placement == "copied")
    assert len({str(part.ranges) for part in entry.parts}) == 2
    assert list(tiling_gaps(entry, 8)) == []
    for part in entry.parts:
        part.ranges = [[max(0, first - 1), last] for first, last in part.ranges]
        part.shape[0] = part.ranges[0][1] - part.ranges[0][0]
    assert list(tiling_gaps(entry, 8)) == ["rows 11 to 12 of dim 0 are in parts that overlap"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_found_in_source_and_split(
    checkpoint: Path, tmp_path: Path, value: float, capsys: pytest.CaptureFixture
):
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    path = checkpoint / index[Q_PROJ]
    spoil(path, Q_PROJ, lambda x: x.index_put((torch.tensor(90), torch.tensor(5)), torch.tensor(value).half()))
    words = f"{Q_PROJ} has {int(value != value)} NaN and {int(value == value)} infinite values"
    assert main(["verify", str(checkpoint)]) == 1
    assert f"{path}: {words}" in capsys.readouterr().out
    dst = tmp_path / "dst"
    assert main(["split", str(checkpoint), "--ranks", "2", "--dst", str(dst)]) == 0
    assert main(["verify", str(dst)]) == 1
    out = capsys.readouterr().out
    assert f"{dst / part_file(1, 2)}: {words}" in out and part_file(0, 2) not in out.partition("KiB)")[2]


def test_verify_against_another_source(tp2: Path, checkpoint: Path, capsys: pytest.CaptureFixture):
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    path = checkpoint / index[Q_PROJ]
    spoil(path, Q_PROJ, lambda x: x + 1)
    extra = load_file(path) | {"extra": torch.zeros(1)}
    save_file(extra, path)
    (checkpoint / "tokenizer.json").write_text("{}")
    assert main(["verify", str(tp2), "--against", str(checkpoint)]) == 1
    out = capsys.readouterr().out
    assert f"{path}: {Q_PROJ} is not the tensor that was split" in out
    assert f"{path}: extra is in no part of {tp2}" in out
    assert f"{tp2 / 'tokenizer.json'}: missing or not the same" in out
    assert "3 problems" in out


def test_verify_against_sees_a_wrong_cut(tp2: Path, capsys: pytest.CaptureFixture):
    """Ranks exchanged, hashes included: whole in itself, but not a cut of the source."""
    files = [load_file(tp2 / part_file(rank, 2)) for rank in range(2)]
    files[0][Q_PROJ], files[1][Q_PROJ] = files[1][Q_PROJ], files[0][Q_PROJ]
    for rank in range(2):
        save_file(files[rank], tp2 / part_file(rank, 2))
    manifest = load_manifest(tp2)
    first, second = next(entry for entry in manifest.tensors if entry.name == Q_PROJ).parts
    first.sha256, second.sha256 = second.sha256, first.sha256
    save_manifest(manifest, tp2)
    assert main(["verify", str(tp2)]) == 0
    assert main(["verify", str(tp2), "--against", str(source())]) == 1
    assert f"{Q_PROJ} cut for rank 1 is not the part in the manifest" in capsys.readouterr().out


def test_verify_a_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture):
    assert main(["verify", str(checkpoint)]) == 0
    index = checkpoint / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    file = weight_map.pop(Q_PROJ)
    index.write_text(json.dumps({"weight_map": {**weight_map, "nothing": file}}))
    assert main(["verify", str(checkpoint)]) == 1
    out = capsys.readouterr().out
    assert f"nothing is listed in {file} but is not there" in out and f"{Q_PROJ} is in {file} but is not listed" in out
    path = checkpoint / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["verify", str(checkpoint)]) == 1
    assert f"{path}: truncated" in capsys.readouterr().out


def stop_after(monkeypatch: pytest.MonkeyPatch, num_writes: int, error: BaseException) -> None:
    write, count = PartFile.write, iter(range(num_writes))

    def stopping(self: PartFile, name: str, tensor: torch.Tensor) -> None:
        if next(count, None) is None:
            raise error
        write(self, name, tensor)

    monkeypatch.setattr(PartFile, "write", stopping)


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
        from weights_tools import split
        from weights_tools.cli import main
        from weights_tools.journal import Journal
        split.COMMIT_BYTES = 1
        commit = Journal.commit
        def killed(self):
            if len(self.done) == 10:
                self.file.write(b'{{"name": "half a li')
                self.file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            commit(self)
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
    "split no_such --ranks 2": "no_such: neither a folder nor a family; the families are: llava_next",
    "split llava_next --ranks 2 --src no_such": "no_such: no such folder",
    "split SRC --ranks 2 --src SRC": "with --src, MODEL is the name of a family",
    "split SPLIT --ranks 2": "split already, for 2 ranks",
    "split EMPTY --ranks 2": "no config.json",
    "verify no_such": "no_such: no such folder",
    "verify SPLIT --against no_such": "no_such: no such folder",
    "verify SRC --against SRC": "--against is for folders made by",
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


def test_inspect_a_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture):
    assert main(["inspect", str(checkpoint)]) == 0
    out = capsys.readouterr().out
    assert "llava_next" in out and "90 tensors in 3 files" in out and "legal world sizes: 1, 2, 4, 8" in out
    assert main(["inspect", str(checkpoint), "--ranks", "8", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    held = facts["bytes_by_placement"]
    copies = 8 // 2  # two KV heads on eight ranks
    total = held["cut"] + held["copied"] * copies + held["replicated"] * 8 + held["rank0"]
    assert sum(facts["bytes_per_rank"]) == total and sum(held.values()) == facts["num_bytes"]
    assert facts["missing"] == facts["unused"] == []


def test_inspect_names_what_does_not_fit(checkpoint: Path, capsys: pytest.CaptureFixture):
    """It is what the error about missing tensors tells people to run."""
    (path,) = checkpoint.glob("model-00003*")
    tensors = load_file(path)
    tensors["something.else"] = tensors.pop("language_model.model.norm.weight")
    save_file(tensors, path)
    with pytest.raises(UserError, match=f"weights_tools inspect {checkpoint}"):
        load(checkpoint, TP())
    for more in ([], ["--ranks", "4"]):
        assert main(["inspect", str(checkpoint), *more]) == 0
        out = capsys.readouterr().out
        assert "missing: 1\n  decoder.norm.weight\n" in out and "unused: 1\n  something.else\n" in out


def test_inspect_a_split_folder(tp2: Path, capsys: pytest.CaptureFixture):
    (tp2 / part_file(1, 2)).unlink()
    assert main(["inspect", str(tp2)]) == 0
    out = capsys.readouterr().out
    assert "split for world_size=2" in out and str(source()) in out and f"{part_file(1, 2)}  MISSING" in out


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


def peak_rss(*, reset: bool) -> int:
    """Most bytes of memory this process has had since the last reset (Linux, proc(5): clear_refs, VmHWM)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for the peak")
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
    make_split(tmp_path, "mistral", 4)  # what is imported on the way is no tensor
    dst = tmp_path / "dst"
    for argv in (
        ["split", str(checkpoint), "--ranks", "4", "--dst", str(dst)],
        ["verify", str(dst), "--against", str(checkpoint)],
    ):
        before = peak_rss(reset=True)
        assert main(argv) == 0
        assert peak_rss(reset=False) - before < 2.5 * largest < total / 4
