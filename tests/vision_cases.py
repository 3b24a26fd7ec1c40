"""Exported vision towers for the tests, and the two programs of Ascend's that are not here: atc and ais_bench.

They are stood in for at their own doors: an executable `atc` in PATH, and the class InferSession. Both are as strict
as their originals about what they are given, and the arithmetic of an om is its graph's, by onnxruntime.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import convert

from weights_tools.cli import main
from weights_tools.layouts import list_layouts

REPOSITORY = Path(__file__).parents[1]
PICTURES = REPOSITORY / "assets" / "pictures"
# Family -> sizes of batch: llava_next's 5 tiles in passes of 2, 2 and 1; minigpt4's pictures with padding.
BATCHES = {
    "llava": "1", "llava_next": "1,2", "llava_next_video": "3", "mllama": "1", "minigpt4": "2", "llama_adapter": "1",
}  # fmt: skip

ATC = """\
import json, os, sys
words = dict(word[2:].split("=", 1) for word in sys.argv[1:])
known = {"framework", "model", "output", "input_shape", "soc_version", "log", "input_format", "precision_mode",
         "optypelist_for_implmode", "op_select_implmode"}
assert set(words) <= known, words
assert words["framework"] == "5" and words["soc_version"].startswith("Ascend") and os.path.exists(words["model"])
shapes = [[int(size) for size in one.split(":")[1].split(",")] for one in words["input_shape"].split(";")]
if os.environ.get("ATC_FAILS"):
    print("E10001: failed", file=sys.stderr)
    sys.exit(1)
with open(words["output"] + ".om", "w") as file:
    json.dump({"onnx": os.path.abspath(words["model"]), "shapes": shapes, "command": sys.argv[1:]}, file)
"""

INFER_SESSION = """\
import json, threading
from types import SimpleNamespace
import numpy, onnxruntime

class InferSession:
    def __init__(self, device_id, model_path):
        assert type(device_id) is int and type(model_path) is str, (device_id, model_path)
        with open(model_path) as file:
            om = json.load(file)
        self.session = onnxruntime.InferenceSession(om["onnx"], providers=["CPUExecutionProvider"])
        self.nodes = [SimpleNamespace(name=node.name, shape=shape)
                      for node, shape in zip(self.session.get_inputs(), om["shapes"], strict=True)]
        self.thread = threading.get_ident()  # ACL's context is bound to it

    def get_inputs(self):
        return self.nodes

    def infer(self, feeds, mode="static"):
        assert mode == "static" and threading.get_ident() == self.thread
        kinds = {"tensor(float16)": "float16", "tensor(float)": "float32", "tensor(int64)": "int64"}
        for feed, node, wanted in zip(feeds, self.nodes, self.session.get_inputs(), strict=True):
            assert isinstance(feed, numpy.ndarray) and feed.flags.c_contiguous
            assert list(feed.shape) == node.shape and feed.dtype == kinds[wanted.type], (feed.shape, feed.dtype)
        return self.session.run(None, {node.name: feed for node, feed in zip(self.nodes, feeds)})
"""


def shapes_checkpoint(family: str) -> Path:
    source = REPOSITORY / "assets" / f"{family}-shapes"
    return convert(family, source, ()) if family in list_layouts() else source


def export(checkpoint: Path, *words: str) -> int:
    return main(["export", str(checkpoint), *words])


@pytest.fixture(scope="session")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Family -> (its shipped checkpoint, that one's tower in float32)."""
    found = {}
    for family, batches in BATCHES.items():
        checkpoint, dst = shapes_checkpoint(family), tmp_path_factory.mktemp("towers") / family
        assert export(checkpoint, "--vision", "onnx", "--batch", batches, "--dst", str(dst)) == 0
        found[family] = checkpoint, dst
    return found


@pytest.fixture(scope="session")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llava's tower in float16, as om is made of it."""
    dst = tmp_path_factory.mktemp("towers") / "half"
    words = ("--vision", "onnx", "--dtype", "float16", "--batch", "1,2", "--dst", str(dst))
    assert export(shapes_checkpoint("llava"), *words) == 0
    return dst


@pytest.fixture
def atc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """atc is in PATH."""
    path = tmp_path / "bin" / "atc"
    path.parent.mkdir()
    path.write_text(f"#!{sys.executable}\n{ATC}")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent), prepend=":")


@pytest.fixture
def ais_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ais_bench can be imported, here and with this folder in PYTHONPATH."""
    package = tmp_path / "ais" / "ais_bench" / "infer"
    package.mkdir(parents=True)
    for init in (package, package.parent):
        (init / "__init__.py").touch()
    (package / "interface.py").write_text(INFER_SESSION)
    monkeypatch.syspath_prepend(tmp_path / "ais")
    return tmp_path / "ais"
