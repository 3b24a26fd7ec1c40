"""weights_tools export --vision and vision.backend: the same answers from an exported tower, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import CPU, answers, config_for, run_engine
from safetensors.torch import load_file, save_file
from vision_cases import BATCHES, PICTURES, REPOSITORY, export, shapes_checkpoint

from mmdist.config import Config, SamplingParams, UserError, VisionConfig
from mmdist.engine.engine import Engine
from mmdist.engine.load import load_engine, open_model
from mmdist.engine.memory import rank_memory
from mmdist.tasks.requests import build_request
from mmdist.tp import TP
from mmdist.vision_folder import VISION_MANIFEST, graph_file, load_vision_manifest, split_batch
from weights_tools import vision
from weights_tools.cli import main
from weights_tools.journal import JOURNAL

ENTRIES = [
    ("shapes_square.png", "What is in the picture?"),
    ("shapes.png", "What is in the picture?"),
    ("shapes_single.png", "What is in the picture?"),
]
VIDEO = REPOSITORY / "assets" / "clips" / "shapes.npy"


def entries(family: str) -> list[dict[str, Any]]:
    """Requests as a user writes them."""
    made = []
    for number, (picture, question) in enumerate(ENTRIES):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        made.append({"id": str(number), "messages": messages, "images": [str(PICTURES / picture)]})
    if family == "llava_next_video":
        content = [{"type": "video"}, {"type": "text", "text": "Which object moves?"}]
        made.append({"id": "video", "messages": [{"role": "user", "content": content}], "video": str(VIDEO)})
    return made


def ask(engine: Engine, family: str) -> dict[str, list[int]]:
    params = SamplingParams(max_new_tokens=24)
    requests = [build_request(entry, engine.prompts, params, PICTURES) for entry in entries(family)]
    return {name: output.token_ids for name, output in answers(engine, requests).items()}


def config_of(family: str, checkpoint: Path, backend: str, folder: Path | None, dtype: str = "float32") -> Config:
    config = config_for(checkpoint, model=family, dtype=dtype)
    return replace(config, vision=VisionConfig(backend, str(folder) if folder else None))


def one_line(capsys: pytest.CaptureFixture) -> str:
    err = capsys.readouterr().err.strip()
    assert "Traceback" not in err and len(err.splitlines()) == 1, err
    return err


@pytest.mark.parametrize("family", BATCHES)
def test_the_same_tokens_as_torch_at_two_ranks(family: str, towers: dict) -> None:
    """And the torch tower is neither built nor loaded."""
    checkpoint, folder = towers[family]

    def work(engine: Engine) -> tuple[dict[str, list[int]], list[str]]:
        model = engine.runner.model
        below = [name for name, _ in model.named_parameters() if name.startswith(f"{model.tower_name}.")]
        return ask(engine, family), below

    want, weights = run_engine(2, config_of(family, checkpoint, "torch", None), work)
    got, none = run_engine(2, config_of(family, checkpoint, "onnx", folder), work)
    assert got == want and all(want.values())
    assert weights and none == []


@pytest.mark.parametrize("family", BATCHES)
def test_the_graph_is_torchs_function(family: str, towers: dict) -> None:
    """The report in the manifest; and each graph takes what it says, at its own size."""
    manifest = load_vision_manifest(towers[family][1])
    assert manifest.model == family and manifest.batch_sizes == tuple(map(int, BATCHES[family].split(",")))
    assert {len(node.shape) for node in manifest.inputs} == ({4, 0, 1} if family == "mllama" else {3})
    assert all(0 < errors["relative"] < 1e-5 for errors in manifest.errors.values())
    text = (towers[family][1] / graph_file(manifest.batch_sizes[0], "onnx")).read_bytes()
    assert b"site-packages" not in text and b".py" not in text


def test_a_job_of_two_processes_and_the_default_folder(towers: dict, tmp_path: Path) -> None:
    """python launch.py task=generate vision.backend=onnx, the tower where export puts it."""
    checkpoint, folder = towers["llava_next"]
    shutil.copytree(checkpoint, tmp_path / "model")
    shutil.copytree(folder, tmp_path / "model-vision-onnx")
    got = run_job("llava_next", tmp_path / "model", "vision.backend=onnx", "dtype=float32")
    assert got == run_engine(1, config_of("llava_next", checkpoint, "torch", None), lambda e: ask(e, "llava_next"))


def run_job(family: str, checkpoint: Path, *words: str, **env: str) -> dict[str, list[int]]:
    Path("in.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries(family)))
    command = [sys.executable, str(REPOSITORY / "launch.py"), "task=generate", "input=in.jsonl", "output=out.jsonl"]
    keys = [f"model={family}", f"checkpoint={checkpoint}", "world_size=2", "max_new_tokens=24", *words]
    job = subprocess.run([*command, *keys], capture_output=True, text=True, env={**os.environ, **env})
    assert job.returncode == 0, job.stderr
    lines = map(json.loads, Path("out.jsonl").read_text().splitlines())
    return {line["id"]: line["token_ids"] for line in lines}


def test_om_made_by_atc_and_run_by_ais_bench(atc: None, ais_bench: Path, tmp_path: Path) -> None:
    """The whole way to a job of two processes; static shapes, so the pictures are padded and looped over."""
    checkpoint = tmp_path / "minigpt4"
    shutil.copytree(shapes_checkpoint("minigpt4"), checkpoint)
    assert export(checkpoint, "--vision", "om", "--soc", "310P3", "--batch", "2") == 0
    folder = tmp_path / "minigpt4-vision-om"
    command = json.loads((folder / "vision_bs2.om").read_text())["command"]
    assert "--input_shape=input:2,3,84,84" in command and "--soc_version=Ascend310P3" in command
    assert {path.suffix for path in folder.iterdir()} == {".om", ".onnx", ".data", ".json"}
    assert load_vision_manifest(folder).dtype == "float16"
    got = run_job("minigpt4", checkpoint, "vision.backend=om", "dtype=float16", PYTHONPATH=str(ais_bench))
    want = config_of("minigpt4", checkpoint, "torch", None, "float16")
    assert got == run_engine(1, want, lambda engine: ask(engine, "minigpt4"))


def test_om_of_several_inputs(atc: None, ais_bench: Path, tmp_path: Path) -> None:
    checkpoint = shapes_checkpoint("mllama")
    assert export(checkpoint, "--vision", "om", "--hardware", "800i_a2", "--dst", str(tmp_path / "om")) == 0
    command = json.loads((tmp_path / "om" / "vision_bs1.om").read_text())["command"]
    shapes = "pixel_values:1,4,3,56,56;aspect_ratio_ids:1;aspect_ratio_mask:1,4"
    assert f"--input_shape={shapes}" in command and "--soc_version=Ascend910B3" in command
    want = run_engine(1, config_of("mllama", checkpoint, "torch", None, "float16"), lambda e: ask(e, "mllama"))
    got = run_engine(1, config_of("mllama", checkpoint, "om", tmp_path / "om", "float16"), lambda e: ask(e, "mllama"))
    assert got == want


def test_without_atc_the_command_is_printed(
    half: Path, atc: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Exit code 1, nothing claimed; the printed line is all that is missing, and a second run too finishes it."""
    folder, path = tmp_path / "om", os.environ["PATH"]
    shutil.copytree(half, folder)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    words = ("--vision", "om", "--hardware", "300i_duo", "--batch", "1,2", "--dst", str(folder))
    assert export(shapes_checkpoint("llava"), *words) == 1
    out, err = capfd.readouterr()
    commands = [line for line in out.splitlines() if line.startswith("cd ")]
    assert "no om was made (2 are missing)" in err and len(commands) == 2
    assert commands[0] == (
        f"cd {folder} && atc --framework=5 --model=vision_bs1.onnx --output=vision_bs1 "
        "--input_shape=input:1,3,84,84 --soc_version=Ascend310P3 --optypelist_for_implmode=Sigmoid,Gelu "
        "--op_select_implmode=high_performance --log=error"
    )
    monkeypatch.setenv("PATH", path)
    subprocess.run(commands[0], shell=True, check=True)
    monkeypatch.setenv("ATC_FAILS", "1")
    assert export(shapes_checkpoint("llava"), *words) == 1
    assert "atc ended with 1, vision_bs2.om was not made" in capfd.readouterr().err
    monkeypatch.delenv("ATC_FAILS")
    assert export(shapes_checkpoint("llava"), *words) == 0
    assert (folder / "vision_bs2.om").exists() and not list(folder.glob("*.partial*"))
    assert (folder / "vision_bs1.onnx").stat().st_mtime_ns == (half / "vision_bs1.onnx").stat().st_mtime_ns
    assert export(shapes_checkpoint("llava"), *words) == 2
    assert "is there already" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--vision", "om"), "for which chip? give --hardware 300i_duo|800i_a2, or --soc NAME"),
        (("--vision", "om", "--soc", "310P3", "--dtype", "float32"), "om is float16 only"),
        (("--vision", "onnx", "--soc", "310P3"), "--soc is of --vision om"),
        (("--batch", "2", "--dst", "x"), "--batch is of --vision onnx|om"),
        (("--vision", "onnx", "--part", "decoder"), "--vision: not with --part or --static"),
        ((), "--dst DIR is needed"),
        (("--vision", "onnx", "--batch", "2"), "mllama looks at 1 picture at a time; use 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_export_refuses(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture) -> None:
    assert export(shapes_checkpoint("mllama"), *words) == 2
    assert message in one_line(capsys)


def test_vlmo_has_no_tower(capsys: pytest.CaptureFixture) -> None:
    vlmo = shapes_checkpoint("vlmo")
    assert export(vlmo, "--vision", "onnx", "--dst", "x") == 2
    assert "vlmo has no vision tower of its own" in one_line(capsys)
    with pytest.raises(UserError, match="vlmo has no vision tower of its own"):
        open_model(config_of("vlmo", vlmo, "onnx", Path("x")), TP(), "cpu")


def copy_graph(whole: Path, batch: int, path: Path) -> None:
    for file in whole.glob(f"{graph_file(batch, 'onnx')}*"):
        shutil.copy(file, path.parent)


def test_a_graph_that_is_another_function_is_refused(
    towers: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    checkpoint, whole = towers["llava"]
    true = vision.run_tower
    monkeypatch.setattr(vision, "run_tower", lambda tower, batch: true(tower, batch) * 1.001)
    monkeypatch.setattr(vision, "write_graph", lambda tower, batch, path: copy_graph(whole, batch, path))
    assert export(checkpoint, "--vision", "onnx", "--dst", "x") == 2
    err = capsys.readouterr().err
    assert "1.0e-03 of the norm off torch's tower" in err and "not written" in err and not Path("x").exists()


def test_a_tower_too_wide_for_float16(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint = tmp_path / "model"
    shutil.copytree(shapes_checkpoint("llava"), checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    name = next(name for name in tensors if "vision" in name and "layers.2.mlp.fc2.weight" in name)
    tensors[name] = tensors[name].float() * 1e6
    save_file(tensors, checkpoint / "model.safetensors")
    assert export(checkpoint, "--vision", "onnx", "--dtype", "float16") == 2
    assert "numbers outside float16 in its result; export with --dtype float32" in capsys.readouterr().err


def test_killed_between_two_graphs(towers: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The next run writes only what was not finished, and the same."""
    checkpoint, whole = towers["llava_next"]
    written: list[int] = []

    def stop_at_two(tower: Any, batch: int, path: Path) -> None:
        written.append(batch)
        if len(written) == 2:
            raise KeyboardInterrupt
        copy_graph(whole, batch, path)

    monkeypatch.setattr(vision, "write_graph", stop_at_two)
    words = ("--vision", "onnx", "--batch", "1,2", "--dst", str(tmp_path / "dst"))
    assert export(checkpoint, *words) == 130
    assert (tmp_path / "dst.partial" / JOURNAL).exists() and not (tmp_path / "dst").exists()
    assert export(checkpoint, *words) == 0
    assert written == [1, 2, 2]
    assert load_vision_manifest(tmp_path / "dst") == load_vision_manifest(whole)


def edit_manifest(folder: Path, **values: Any) -> None:
    path = folder / VISION_MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_inputs(folder: Path, **values: Any) -> None:
    inputs = json.loads((folder / VISION_MANIFEST).read_text())["inputs"]
    edit_manifest(folder, inputs=[node | values for node in inputs])


def truncate(folder: Path) -> None:
    os.truncate(folder / "vision_bs1.onnx.data", 100)


MISFITS = {
    "no export": (shutil.rmtree, "no tower was exported there; run: weights_tools export"),
    "no manifest": (lambda f: (f / VISION_MANIFEST).write_text("{"), "not what weights_tools export --vision writes"),
    "another format": (lambda f: edit_manifest(f, format_version=9), "format_version 9, this mmdist reads 1"),
    "another family": (lambda f: edit_manifest(f, model="mllama"), "the tower of a mllama, the model is llava_next"),
    "another size": (lambda f: edit_inputs(f, shape=[3, 9, 9]), "takes input [3, 9, 9] a picture, the checkpoint's"),
    "no batches": (lambda f: edit_manifest(f, batch_sizes=[]), "not what weights_tools export --vision writes"),
    "another batch": (lambda f: edit_manifest(f, batch_sizes=[1, 7]), "vision_bs7.onnx: missing; run: weights_tools"),
    "float16": (
        lambda f: edit_manifest(f, dtype="float16") or edit_inputs(f, dtype="float16"),
        "the tower is float16, the model runs in float32; export it with --dtype float32",
    ),
    "truncated": (truncate, "vision_bs1.onnx.data: missing or truncated"),
    "other weights": (lambda f: edit_manifest(f, weights_sha256="0" * 64), "made from other weights"),
    "damaged graph": (lambda f: (f / "vision_bs1.onnx").write_bytes(b"x"), "onnxruntime does not load it"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_an_export_that_does_not_fit_is_refused(name: str, towers: dict, tmp_path: Path) -> None:
    spoil, message = MISFITS[name]
    checkpoint, whole = towers["llava_next"]
    folder = tmp_path / "tower"
    shutil.copytree(whole, folder)
    spoil(folder)
    if name == "damaged graph":
        files = json.loads((folder / VISION_MANIFEST).read_text())["files"]
        edit_manifest(folder, files=files | {"vision_bs1.onnx": 1})
    with pytest.raises(UserError) as caught:
        load_engine(config_of("llava_next", checkpoint, "onnx", folder), TP(), CPU)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_om_that_is_missing_or_of_other_shapes(half: Path, atc: None, ais_bench: Path, tmp_path: Path) -> None:
    checkpoint, folder = shapes_checkpoint("llava"), tmp_path / "om"
    shutil.copytree(half, folder)
    words = ("--vision", "om", "--soc", "310P3", "--batch", "1,2", "--dst", str(folder))
    assert export(checkpoint, *words) == 0
    config, om = config_of("llava", checkpoint, "om", folder, "float16"), folder / "vision_bs1.om"
    made = json.loads(om.read_text())
    om.write_text(json.dumps(made | {"shapes": [[4, 3, 84, 84]]}))
    with pytest.raises(UserError, match=r"takes inputs of shape \[\[4, 3, 84, 84\]\], expected \[\[1, 3, 84, 84\]\]"):
        load_engine(config, TP(), CPU)
    om.write_text("")
    with pytest.raises(UserError, match="ais_bench does not load it on device 0"):
        load_engine(config, TP(), CPU)
    om.unlink()
    with pytest.raises(
        UserError, match=r"vision_bs1.om: missing; run: weights_tools export .* --vision om .*--soc NAME"
    ):
        load_engine(config, TP(), CPU)


def test_a_split_folder_and_its_sources_tower(towers: dict, tmp_path: Path) -> None:
    """The same weights by its manifest; parts that are not loaded are checked all the same, once."""
    checkpoint, folder = towers["llava"]
    split = tmp_path / "split"
    assert main(["split", str(checkpoint), "--ranks", "2", "--dst", str(split)]) == 0
    config = config_of("llava", split, "onnx", folder)
    assert run_engine(2, config, lambda engine: ask(engine, "llava"))
    wanted = load_vision_manifest(folder).weights_sha256
    assert vision.VisionExport(split, "float32", (1,)).weights_sha256() == wanted
    path = next(split.glob("model-rank-00000*"))
    spoil_tower(path)
    with pytest.raises(UserError, match=r"vision.*is damaged"):
        run_engine(2, config, lambda engine: None)


def spoil_tower(path: Path) -> None:
    """Change the last byte of a weight of the tower."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        name = next(name for name in header if "vision" in name and name.endswith("fc1.weight"))
        place = 8 + length + header[name]["data_offsets"][1] - 1
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def test_the_plan_counts_the_files_instead_of_the_weights(towers: dict) -> None:
    checkpoint, folder = towers["llava_next"]
    needs = {}
    for backend in ("torch", "onnx"):
        config = config_of("llava_next", checkpoint, backend, folder if backend == "onnx" else None)
        model, plan, _, _ = open_model(config, TP(), "cpu")
        needs[backend] = rank_memory(model, plan, TP(), config.engine)
        rest = sum(x.nbytes for name, x in model.vision.named_parameters() if not name.startswith("tower."))
    files = sum(path.stat().st_size for path in folder.glob("*.onnx*"))
    assert needs["onnx"].vision_bytes == rest + files
    assert needs["onnx"].activation_bytes == needs["torch"].activation_bytes


def test_passes_of_fixed_sizes() -> None:
    assert split_batch(5, (1, 2)) == [(2, 2), (2, 2), (1, 1)]
    assert split_batch(5, (4,)) == [(4, 4), (4, 1)]
    assert split_batch(3, (2, 4)) == [(2, 2), (2, 1)]
    assert split_batch(1, (2, 4)) == [(2, 1)]


def test_keys_that_do_not_go_together() -> None:
    with pytest.raises(UserError, match=r"vision.backend=tensorrt: expected torch\|onnx\|om"):
        VisionConfig("tensorrt")
    with pytest.raises(UserError, match=r"vision.folder=x: expected vision.backend=onnx or om"):
        VisionConfig("torch", "x")
