"""Checkpoint files as others wrote them: every form that is read, and what is refused without a byte of it executed."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from convert_cases import FILE, Edit, edit, refused, run
from safetensors.torch import save_file
from split_cases import contents

from mmdist.config import UserError
from weights_tools.folder import CONVERSION
from weights_tools.layouts.source import Source, Tensors

CLASSIFIER = "vqa_classifier.3.weight"


def with_ddp(state: dict) -> dict:
    return {f"module.{name}": x for name, x in state.items()}


WRAPPED: dict[str, tuple[Edit, dict]] = {
    "state_dict": (lambda state: {"state_dict": state, "epoch": 3}, {}),
    "module": (lambda state: {"module": with_ddp(state)}, {}),
    "model": (lambda state: {"model": state, "optimizer": {"step": torch.ones(2)}, "epoch": 3}, {}),
    "prefix": (with_ddp, {}),
    "not_a_zip": (lambda state: state, {"_use_new_zipfile_serialization": False}),
    "parameters": (lambda state: {name: torch.nn.Parameter(x, x.is_floating_point()) for name, x in state.items()}, {}),
    "strided": (lambda state: {name: x.mT.contiguous().mT if x.ndim == 2 else x for name, x in state.items()}, {}),
}


@pytest.mark.parametrize("form", WRAPPED)
def test_every_form_of_a_state_dict_gives_the_same(original: Path, tmp_path: Path, form: str):
    assert run(original, tmp_path / "flat") == 0
    change, save = WRAPPED[form]
    edit(original, change, **save)
    assert run(original, tmp_path / "dst") == 0
    flat, dst = contents(tmp_path / "flat"), contents(tmp_path / "dst")
    ignored = json.loads(dst.pop(CONVERSION))["ignored"]
    flat.pop(CONVERSION)
    assert dst == flat
    assert ("epoch" in ignored) == (form in ("state_dict", "model")) and ("optimizer" in ignored) == (form == "model")


class Touch:
    """Unpickled without care, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_executed(original: Path, tmp_path: Path, zipped: bool, capsys: pytest.CaptureFixture):
    witness = tmp_path / "executed"
    edit(original, lambda state: {**state, "epoch": Touch(witness)}, _use_new_zipfile_serialization=zipped)
    line = refused(original, tmp_path / "dst", capsys)
    assert f"{original / FILE}: contains code (GLOBAL posix.mkdir); refused, nothing was executed" in line
    (original / FILE).write_bytes(pickle.dumps(Touch(witness)))
    assert "no checkpoint of torch.save" in refused(original, tmp_path / "dst", capsys)
    assert not witness.exists()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript_where_a_state_dict_is_expected(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), original / FILE)
    line = refused(original, tmp_path / "dst", capsys)
    assert f"{FILE}: a TorchScript archive where a state dict is expected" in line


DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (lambda raw: raw[: len(raw) // 2], "truncated; copy it again"),
    "flipped": (lambda raw: raw.replace(b"transformer.blocks.0", b"transformer\xff\xfe\xfdocks.0", 1), "damaged"),
    "pointer": (
        lambda raw: b"version https://git-lfs.github.com/spec/v1\n",
        "damaged, or no checkpoint of torch.save",
    ),
    "empty": (lambda raw: b"", "damaged, or no checkpoint of torch.save"),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_damaged_file(original: Path, tmp_path: Path, how: str, capsys: pytest.CaptureFixture):
    damage, words = DAMAGED[how]
    (original / FILE).write_bytes(damage((original / FILE).read_bytes()))
    assert f"{original / FILE}: {words}" in refused(original, tmp_path / "dst", capsys)


def without(name: str) -> Edit:
    return lambda state: {key: x for key, x in state.items() if key != name}


CONTENTS: dict[str, tuple[Edit, str]] = {
    "missing": (without("pooler.dense.bias"), "one vlmo: 1 missing (output.pooler.bias)"),
    "unexpected": (lambda s: s | {f"x{n}": torch.ones(1) for n in range(4)}, "4 unexpected (x0, x1, x2, …)"),
    "shape": (
        lambda s: s | {"pooler.dense.bias": torch.ones(7)},
        "1 of another shape (output.pooler.bias is [7], expected [48])",
    ),
    "number": (lambda s: s | {"epoch": 3}, "1 unexpected (epoch); 1 that are no tensors (epoch)"),
    "dtype": (
        lambda s: s | {CLASSIFIER: s[CLASSIFIER].to(torch.complex64)},
        "output.classifier.3.weight is torch.complex64; mmdist reads",
    ),
    "beside": (lambda s: {"model": s, "head": torch.ones(1)}, "1 tensors beside 'model', expected all in it: head"),
    "list": (lambda s: [s], "holds a list, expected a state dict"),
}


@pytest.mark.parametrize("what", CONTENTS)
def test_wrong_contents(original: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture):
    change, words = CONTENTS[what]
    edit(original, change)
    assert words in refused(original, tmp_path / "dst", capsys)


@pytest.fixture
def shards(original: Path, tmp_path: Path) -> Path:
    """The tensors in three .bin files with an index, as transformers wrote them before safetensors."""
    folder = tmp_path / "shards"
    folder.mkdir()
    state = torch.load(original / FILE, weights_only=True)
    weight_map = {name: f"pytorch_model-0000{1 + n % 3}-of-00003.bin" for n, name in enumerate(sorted(state))}
    for file in set(weight_map.values()):
        torch.save({name: state[name] for name in state if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards_of_every_kind_give_the_same(original: Path, shards: Path, tmp_path: Path):
    state = torch.load(original / FILE, weights_only=True)
    one, safe = tmp_path / "one", tmp_path / "safe"
    for folder in (one, safe):
        folder.mkdir()
    torch.save(state, one / "pytorch_model.bin")
    save_file(state, safe / "model.safetensors")
    for folder in (shards, one, safe):
        tensors = Source(folder, {}).sharded(folder)
        assert tensors.keys() == state.keys() and all(torch.equal(x, state[name]) for name, x in tensors.items())


def test_damaged_shards(shards: Path):
    index, last = shards / "pytorch_model.bin.index.json", shards / "pytorch_model-00003-of-00003.bin"

    def words() -> str:
        with pytest.raises(UserError) as caught:
            Source(shards, {}).sharded(shards)
        return str(caught.value)

    torch.save(torch.load(last, weights_only=True) | {"vqa_classifier.3.bias": torch.ones(1)}, last)
    assert f"{last}: vqa_classifier.3.bias in another shard too" in words()
    last.unlink()
    assert f"{last}: missing, although {index.name} names it" in words()
    torch.save({}, last)
    assert "32 tensors are in no shard: " in words()
    index.write_text("{}")
    assert f"{index}: no weight_map in it" in words()
    index.write_text("[1]")
    assert f"{index}: expected a JSON object, found a list" in words()
    index.unlink()
    assert f"{shards}: no weights in it, expected one of model.safetensors.index.json, " in words()


def test_what_is_taken_and_what_is_left():
    tensors = Tensors(
        {"a": torch.ones(1), "b.x": torch.ones(1), "b.y": torch.ones(1), "c": torch.ones(1)}, Path("f.pt")
    )
    assert tensors.take("a").shape == (1,) and tensors.drop("b.*") == ["b.x", "b.y"]
    with pytest.raises(UserError, match=r"^f.pt: no tensor a in it"):
        tensors.take("a")
    with pytest.raises(UserError, match=r"^f.pt: 1 unexpected: c; "):
        tensors.finish()
