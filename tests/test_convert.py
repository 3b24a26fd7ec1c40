"""weights_tools convert: the plain folder it makes, and how it refuses, stops or is stopped."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN
from convert_cases import FILE, edit, refused, run
from safetensors import safe_open
from safetensors.torch import load_file
from split_cases import contents, flip_byte, kill_in_the_middle, one_line, stop_after, written_names

from mmdist.config import UserError
from mmdist.models.family import find_model, load_model_config
from weights_tools import convert
from weights_tools.cli import main
from weights_tools.folder import CONVERSION
from weights_tools.journal import JOURNAL
from weights_tools.layouts import find_layout, list_layouts
from weights_tools.part_file import PartFile


def test_plain_folder(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    dst = tmp_path / "plain"
    assert run(original, dst) == 0
    assert "26 entries known to be unused: text_embeddings.position_embeddings.weight, " in capsys.readouterr().out
    assert sorted(contents(dst)) == [
        "answer2label.txt", "config.json", CONVERSION, "model.safetensors", "vocab.txt",
    ]  # fmt: skip
    stored, plain = torch.load(original / FILE, weights_only=True), load_file(dst / "model.safetensors")
    assert torch.equal(plain["blocks.0.attn.qkv.weight"], stored["transformer.blocks.0.attn.qkv.weight"])
    assert {x.dtype for x in plain.values()} == {torch.float32}
    with safe_open(dst / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert load_model_config(find_model("vlmo"), dst).num_attention_heads == 8
    assert len(json.loads((dst / CONVERSION).read_text())["ignored"]) == 26
    assert main(["verify", str(dst)]) == 0


def test_dry_run_writes_nothing(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert run(original, tmp_path / "dst", "--dry-run") == 0
    said = capsys.readouterr().out
    assert said.endswith("; nothing was written\n") and [path.name for path in tmp_path.iterdir()] == ["original"]
    assert run(original, tmp_path / "dst") == 0
    path = tmp_path / "dst" / "model.safetensors"
    assert f"{path}: {path.stat().st_size / 1024:.1f} KiB" in said
    edit(original, lambda state: {name: x for name, x in state.items() if not name.endswith("pooler.dense.bias")})
    assert "1 missing (" in refused(original, tmp_path / "new", capsys, "--dry-run")


def test_several_files_to_choose_from(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    shutil.copyfile(original / FILE, original / "other.pt")
    line = refused(original, tmp_path / "dst", capsys)
    assert f"{original}: 2 to choose from: other.pt, {FILE}; add --set checkpoint=FILE" in line
    assert "no_such.pt: missing" in refused(original, tmp_path / "dst", capsys, "--set", "checkpoint=no_such.pt")
    assert run(original, tmp_path / "dst", "--set", "checkpoint=other.pt") == 0
    for path in original.glob("*.pt"):
        path.unlink()
    assert "no *.pt or *.ckpt in it; copy it there, or add --set checkpoint=FILE" in refused(
        original, tmp_path / "new", capsys
    )


MISTAKES = {
    "convert no_such --src SRC --dst DST": "no_such: no family with an original layout; convert knows: ",
    "convert llava --src SRC --dst DST": "llava_next_video, mllama are read as the Hugging Face folders they are",
    "convert vlmo --src no_such --dst DST": "no_such: no such folder; give the folder of vlmo's original files",
    "convert vlmo --src SRC": "required: --dst",
    "convert vlmo --dst DST": "required: --src",
    "convert vlmo --src SRC --dst DST --set heads=4": "vlmo has no such key; it has checkpoint: the .pt file",
    "convert vlmo --src SRC --dst DST --set num_heads": "num_heads is not KEY=VALUE",
    "convert vlmo --src SRC --dst DST --set num_heads=0": "num_heads=0: expected a whole number above 0",
    "convert vlmo --src SRC --dst DST --set num_heads=4 num_heads=8": "given twice",
    "convert vlmo --src EMPTY --dst DST": "add --set checkpoint=FILE",
    "convert vlmo --src SRC --dst SRC --force": "not a folder made by convert, so --force does not replace it",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_mistakes_are_one_line(command: str, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "empty").mkdir()
    places = {"SRC": original, "EMPTY": tmp_path / "empty", "DST": tmp_path / "dst"}
    try:
        code = main([str(places.get(word, word)) for word in command.split()])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    assert code == 2
    assert MISTAKES[command] in one_line(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "original"]


def test_missing_file(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (original / "vocab.txt").unlink()
    assert f"{original / 'vocab.txt'}: missing; copy it there" in refused(original, tmp_path / "dst", capsys)


def test_several_files_are_written(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert run(original, tmp_path / "one") == 0
    monkeypatch.setattr(convert, "FILE_BYTES", 200_000)
    assert run(original, tmp_path / "dst") == 0
    files = sorted((tmp_path / "dst").glob("*.safetensors"))
    assert [path.name for path in files] == [f"model-0000{n}-of-00004.safetensors" for n in range(1, 5)]
    assert all(path.stat().st_size < 210_000 for path in files)
    one = load_file(tmp_path / "one" / "model.safetensors")
    several = {name: x for path in files for name, x in load_file(path).items()}
    assert one.keys() == several.keys() and all(torch.equal(x, several[name]) for name, x in one.items())
    assert main(["verify", str(tmp_path / "dst")]) == 0


def test_what_is_there_is_replaced_only_when_asked(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    dst = tmp_path / "dst"
    assert run(original, dst) == 0
    before = contents(dst)
    edit(original, lambda state: state | {"pooler.dense.bias": torch.ones(48)})
    assert run(original, dst) == 2
    assert f"{dst}: is there already; choose another --dst, or --force" in one_line(capsys)
    assert contents(dst) == before
    assert run(original, dst, "--force") == 0
    assert contents(dst) != before and not list(tmp_path.glob("*.partial"))


def test_other_folders_and_other_runs_are_left_alone(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    partial = tmp_path / "dst.partial"
    partial.mkdir()
    (partial / "letters.txt").write_text("dear")
    assert run(original, tmp_path / "dst", "--force") == 2
    assert f"{partial}: in the way and not left by a convert" in one_line(capsys)
    with open(partial / JOURNAL, "w") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        assert run(original, tmp_path / "dst") == 2
    assert f"{partial}: another convert is writing it" in one_line(capsys)
    assert (partial / "letters.txt").read_text() == "dear"


def command_of(case: str, tmp_path: Path) -> list[str]:
    model, *settings = GOLDEN_FILES[case]
    return ["convert", model, "--src", str(GOLDEN / case / "checkpoint"), "--dst", str(tmp_path / "dst"), *settings]


@pytest.mark.parametrize("case", ["vlmo_vqa", "minigpt4", "llama_adapter"])
def test_goes_on_where_it_stopped(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    argv = command_of(case, tmp_path)
    with monkeypatch.context() as patched:
        stop_after(patched, 30, KeyboardInterrupt())
        assert main(argv) == 130
    assert "interrupted; run it again" in one_line(capsys)
    left = tmp_path / "dst.partial"
    assert [path.name for path in tmp_path.iterdir()] == ["dst.partial"]
    with pytest.raises(UserError, match=r"no config.json in it"):
        load_model_config(find_model(argv[1]), left)
    done = len((left / JOURNAL).read_text().splitlines()) - 1
    written = written_names(monkeypatch)
    assert main(argv) == 0
    made = json.loads((tmp_path / "dst" / CONVERSION).read_text())["sha256"]
    assert done >= 20 and len(written) == len(made) - done
    (tmp_path / "dst").rename(tmp_path / "stopped")
    assert main([*argv, "--jobs", "3"]) == 0
    assert contents(tmp_path / "dst") == contents(tmp_path / "stopped")


def test_killed_in_the_middle(original: Path, tmp_path: Path):
    """What is left is no model, and the same command goes on."""
    argv, left = ["convert", "vlmo", "--src", str(original), "--dst", str(tmp_path / "dst")], tmp_path / "dst.partial"
    kill_in_the_middle(argv, tmp_path / "dst")
    with pytest.raises(UserError, match=r"no config.json in it"):
        load_model_config(find_model("vlmo"), left)
    assert main(argv) == 0 and not left.exists()
    assert main(["verify", str(tmp_path / "dst")]) == 0


def test_source_changed_while_it_is_read(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    write = PartFile.write

    def touching(self: PartFile, name: str, tensor: torch.Tensor) -> None:
        os.utime(original / FILE, ns=(1, 1))
        write(self, name, tensor)

    monkeypatch.setattr(PartFile, "write", touching)
    assert run(original, tmp_path / "dst") == 2
    assert f"{original / FILE}: changed while it was read" in one_line(capsys)
    assert not (tmp_path / "dst").exists()


def test_verify_finds_a_flipped_byte(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert run(original, tmp_path / "dst") == 0
    flip_byte(tmp_path / "dst" / "model.safetensors", "blocks.0.attn.qkv.weight")
    assert main(["verify", str(tmp_path / "dst")]) == 1
    assert (
        "blocks.0.attn.qkv.weight is damaged: its sha256 is not the one in conversion.json" in capsys.readouterr().out
    )


def test_too_little_space(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 0, 100))
    assert "needed, 100 bytes free" in refused(original, tmp_path / "dst", capsys)


def test_memory_is_about_one_tensor(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Tensors of 12 MiB in one file; pages of the mapped file itself are the system's to take back."""
    narrow = {name: x for name, x in torch.load(original / FILE, weights_only=True).items() if 192 in x.shape}
    wide = {name: torch.ones([1 << 16 if size == 192 else size for size in x.shape]) for name, x in narrow.items()}
    largest, total = (count(x.nbytes for x in wide.values()) for count in (max, sum))
    edit(original, wide.__ror__)
    wide.clear()
    write, seen = PartFile.write, []

    def watching(self: PartFile, name: str, tensor: torch.Tensor) -> None:
        write(self, name, tensor)
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        seen.append(int(line.split()[1]) * 1024)

    monkeypatch.setattr(PartFile, "write", watching)
    assert run(original, tmp_path / "dst") == 0
    assert max(seen) - seen[0] < 2 * largest < total / 4


GOLDEN_FILES = {
    "minigpt4": ("minigpt4",),
    "minigpt4_llama2": ("minigpt4",),
    "llama_adapter": ("llama_adapter", "--set", "adapter=BIAS-7B.pth", "clip=clip/ViT-L-14.pt"),
    "vlmo_vqa": ("vlmo",),
    "vlmo_vqa_plus": ("vlmo", "--set", "num_heads=8"),
    "vlmo_retrieval": ("vlmo",),
}


@pytest.mark.parametrize("case", GOLDEN_FILES)
def test_every_original_is_converted_then_split(case: str, tmp_path: Path):
    model, *settings = GOLDEN_FILES[case]
    plain, parts = str(tmp_path / "plain"), str(tmp_path / "parts")
    assert main(["convert", model, "--src", str(GOLDEN / case / "checkpoint"), "--dst", plain, *settings]) == 0
    assert main(["verify", plain]) == 0
    assert main(["split", plain, "--ranks", "2", "--dst", parts]) == 0
    assert main(["verify", parts, "--against", plain]) == 0
    assert not (tmp_path / "parts" / CONVERSION).exists()


def test_config_that_makes_no_model(tmp_path: Path, capsys: pytest.CaptureFixture):
    src = tmp_path / "original"
    shutil.copytree(GOLDEN / "minigpt4" / "checkpoint", src, copy_function=shutil.copyfile)
    path = src / "weights_language" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_attention_heads": 7}))
    assert main(["convert", "minigpt4", "--src", str(src), "--dst", str(tmp_path / "dst")]) == 2
    line = one_line(capsys)
    assert (
        f"{src}: makes no minigpt4 config: " in line and "not a multiple of the number of attention heads (7)" in line
    )


@pytest.mark.parametrize("family", list_layouts())
def test_a_layout_is_a_family_with_settings_explained(family: str) -> None:
    layout = find_layout(family)
    assert callable(layout.read)
    assert all(isinstance(line, str) and line for line in layout.SETTINGS.values())
