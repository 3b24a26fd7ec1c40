"""A split folder loads to the same parameters as its source; what is wrong in one is refused or found, by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import config_for
from safetensors.torch import load_file, save_file
from split_cases import CASES, Q_PROJ, flip_byte, load, one_line, source, spoil

from mmdist.config import Config, ModelConfig, UserError
from mmdist.engine.load import asked_world_size, open_model
from mmdist.kernels.kernels import Kernels
from mmdist.loading import load_weights
from mmdist.manifest import MANIFEST, load_manifest, part_file, save_manifest
from mmdist.plan import Piece, Placement
from mmdist.rank_file import RankFile
from mmdist.tp import TP
from weights_tools.cli import main
from weights_tools.part_file import PartFile
from weights_tools.split_checks import tiling_gaps


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


def test_auto_is_the_size_it_was_cut_for(splits: dict):
    config = Config(checkpoint=str(splits["mistral", 4]), model=ModelConfig(name="llava_next"))
    assert asked_world_size(config, [1, 2, 4, 8], "cpu") == 4


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


def test_part_of_another_model_is_named(tp2: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """The same names and shapes, cut for the same world size from other weights."""
    other = Path(shutil.copytree(source(), tmp_path / "other"))
    for file in other.glob("*.safetensors"):
        save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    assert main(["split", str(other), "--ranks", "2", "--dst", str(tmp_path / "other-tp2")]) == 0
    path = tp2 / part_file(1, 2)
    shutil.copyfile(tmp_path / "other-tp2" / path.name, path)
    with pytest.raises(UserError, match=f"{path}: .* is damaged"):
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


def test_whole_parameters_lie_in_the_file(splits: dict) -> None:
    """What makes one parameter lies together: in the file's own dtype nothing is copied, fused rows neither."""
    model, plan, checkpoint, _ = open_model(config_for(splits["mistral", 2], dtype="float16"), TP(1, 2), "cpu")
    load_weights(model, checkpoint, plan, TP(1, 2), Kernels(torch.device("cpu")))
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if "rank-00001" in line]
    files = [line.split()[0].split("-") for line in lines]
    mapped = [range(int(first, 16), int(last, 16)) for first, last in files]
    layer = model.decoder.layers[0]
    for weight in (layer.self_attn.qkv_proj.weight, layer.mlp.gate_up_proj.weight, layer.mlp.down_proj.weight):
        assert any(weight.data_ptr() in pages for pages in mapped)


def test_rows_that_lie_apart_are_copied(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 4), "b": torch.ones(3, 4), "c": torch.full((1, 4), 2.0)}, tmp_path / "x.safetensors")
    file = RankFile(tmp_path / "x.safetensors")
    joined = file.map_rows(["a", "b"])
    assert joined is not None and torch.equal(joined, torch.cat((file.map("a"), file.map("b"))))
    assert file.map_rows(["a", "c"]) is None and file.map_rows(["b", "a"]) is None
