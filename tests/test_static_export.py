"""weights_tools export --static: the files' shapes, the job that writes them, the compiler's modes and compile.sh."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import Case
from safetensors.torch import load_file
from split_cases import contents, flip_byte, one_line, stop_after, written_names
from static_cases import GOLDEN_LENGTH, export

from weights_tools.cli import main
from weights_tools.folder import EXPORT
from weights_tools.journal import JOURNAL
from weights_tools.static import check, job
from weights_tools.static.modes import MODES

REPOSITORY = Path(__file__).parents[1]
# Of golden: 5 blocks of which 2 and 4 look at the picture.
NETWORKS = ["vision_transformer", "embedding", "embedding_cache", "lm_head", "greedy_head", "penalty_sample_head",
            *(f"block_{number}" for number in range(5)), *(f"block_cache_{number}" for number in range(5))]  # fmt: skip
# What TPU-MLIR's converter has (transform/OnnxConverter.py of 1.30) and shapes that follow from nothing computed.
OPERATORS = {
    "Add", "Cast", "Concat", "Conv", "CumSum", "Div", "Erf", "Expand", "Gather", "GatherElements", "LayerNormalization",
    "Less", "MatMul", "Mul", "Neg", "Pow", "ReduceMean", "ReduceSum", "Reshape", "ScatterElements", "Sigmoid", "Slice",
    "Softmax", "Sqrt", "Sub", "TopK", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip


def shapes_of(values: list[onnx.ValueInfoProto]) -> dict[str, list[int]]:
    return {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in values}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_shape_is_fixed(static_golden: Path, name: str) -> None:
    model = onnx.load(static_golden / f"{name}.onnx", load_external_data=False)
    assert model.opset_import[0].version == 17 and model.ir_version == 8
    assert {node.op_type for node in model.graph.node} <= OPERATORS
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    shapes = shapes_of(inferred.graph.value_info)
    assert len(shapes) == len([out for node in model.graph.node for out in node.output]) - len(model.graph.output)
    assert all(size > 0 for shape in shapes.values() for size in shape)


def test_what_the_networks_take_and_give(static_golden: Path) -> None:
    length, hidden, kv, head_dim = GOLDEN_LENGTH, 80, 4, 10
    tiles, patches = 4, 26
    past, history = [1, length, kv, head_dim], [1, kv, tiles * patches, head_dim]
    wanted = {
        "block_0": (
            {"input_states": [1, length, hidden], "position_ids": [1, length],
             "attention_mask": [1, 1, length, length]},
            {"hidden_states": [1, length, hidden], "past_k": past, "past_v": past},
        ),
        "block_cache_0": (
            {"input_states": [1, 1, hidden], "position_ids": [1, 1], "attention_mask": [1, 1, 1, length + 1],
             "history_k": past, "history_v": past},
            {"hidden_states": [1, 1, hidden], "past_k": [1, 1, kv, head_dim], "past_v": [1, 1, kv, head_dim]},
        ),
        "block_2": (
            {"input_states": [1, length, hidden], "cross_attention_states": [tiles, patches, hidden],
             "text_row_mask": [1, length, 1], "attention_mask": [1, 1, length, tiles * patches]},
            {"hidden_states": [1, length, hidden], "past_k": history, "past_v": history},
        ),
        "block_cache_2": (
            {"input_states": [1, 1, hidden], "attention_mask": [1, 1, 1, tiles * patches],
             "history_k": history, "history_v": history},
            {"hidden_states": [1, 1, hidden]},
        ),
        "lm_head": ({"hidden_states": [1, hidden]}, {"m_logits": [1, 336]}),
        "penalty_sample_head": (
            {"m_logits": [1, 336], "input_ids": [1, length], "top_p": [1], "temperature": [1], "penalty": [1]},
            {"probs": [1, 50], "token": [1, 50]},
        ),
    }  # fmt: skip
    for name, (inputs, outputs) in wanted.items():
        graph = onnx.load(static_golden / f"{name}.onnx", load_external_data=False).graph
        assert (shapes_of(graph.input), shapes_of(graph.output)) == (inputs, outputs), name


def test_both_forms_of_a_block_share_their_weights(static_golden: Path) -> None:
    assert len(list(static_golden.glob("*.safetensors"))) == 5 + 3
    stored = load_file(Case("mllama").checkpoint / "model-00001-of-00003.safetensors")
    name = "language_model.model.layers.0.mlp.down_proj.weight"
    found = load_file(static_golden / "block_0.safetensors")[name]
    if name in stored:
        assert torch.equal(found, stored[name].float().t())
    for network in ("block_0", "block_cache_0"):
        graph = onnx.load(static_golden / f"{network}.onnx").graph  # with its weights
        (weight,) = (tensor for tensor in graph.initializer if tensor.name == name)
        assert np.array_equal(onnx.numpy_helper.to_array(weight), found.numpy())


def test_goes_on_where_it_stopped(static_golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped among the tensors, then among the checks; what was done stays done."""
    source = Case("mllama").checkpoint
    with monkeypatch.context() as patched:
        stop_after(patched, 30, KeyboardInterrupt())
        assert export(source, tmp_path / "dst") == 130
    assert [path.name for path in tmp_path.iterdir()] == ["dst.partial"]
    checked: list[str] = []

    def check_part(part: str, *rest: object) -> None:
        if len(checked) == 3:
            raise OSError(28, "No space left on device")
        checked.append(part)
        check.check_part(part, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(job, "check_part", check_part)
        written = written_names(patched)
        assert export(source, tmp_path / "dst") == 2
    assert len(checked) == 3 and not (tmp_path / "dst").exists()
    lines = (tmp_path / "dst.partial" / JOURNAL).read_text().splitlines()
    assert 0 < len(written) <= len(lines) - 1 - 25
    again: list[str] = []
    monkeypatch.setattr(job, "check_part", lambda part, *rest: again.append(part))
    assert export(source, tmp_path / "dst") == 0
    assert not set(again) & set(checked) and len(again) == 8 - 3
    assert contents(tmp_path / "dst") == contents(static_golden)


def test_a_file_that_computes_something_else_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Gates as they are stored, without their tanh."""
    changed = job.changed
    monkeypatch.setattr(job, "changed", lambda name, x: x.float() if "mlp_gate" in name else changed(name, x))
    assert export(Case("mllama").checkpoint, tmp_path / "dst") == 2
    assert "block_2.onnx: in onnxruntime" in one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["dst.partial"]


def test_dry_run_and_force(static_golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = Case("mllama").checkpoint
    assert export(source, tmp_path / "dst", "--dry-run") == 0
    assert "16 ONNX files" in capsys.readouterr().out and not list(tmp_path.iterdir())
    assert export(source, static_golden) == 2
    assert f"{static_golden}: is there already; choose another --dst, or --force" in one_line(capsys)


def test_verify_knows_the_files(static_golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "dst"
    subprocess.run(["cp", "-r", str(static_golden), str(folder)], check=True)
    assert main(["verify", str(folder)]) == 0
    name = "language_model.model.layers.0.mlp.down_proj.weight"
    flip_byte(folder / "block_0.safetensors", name)
    (folder / "block_1.onnx").write_bytes((folder / "block_0.onnx").read_bytes())
    (folder / "lm_head.onnx").unlink()
    capsys.readouterr()
    assert main(["verify", str(folder)]) == 1
    out = capsys.readouterr().out
    assert f"block_0.safetensors: {name} is damaged" in out and "3 problems" in out
    assert "block_1.onnx is damaged" in out and "lm_head.onnx is missing" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--int4"], "int4: groups of 64 weights, hidden_size is 80; use --int8 or --bf16"),
        (["--int8", "--bf16"], "--int8 and --bf16: both are for all blocks; say after one of them for which"),
        (["--int8", "1-9"], "--int8 1-9: 1-9 is no block; give numbers or ranges up to 4, lm_head"),
        (["--int8", "3-1"], "--int8 3-1: 3-1 is no block"),
        (["--int8", "head"], "--int8 head: head is no block"),
        (["--int8", "1,2", "--bf16", "2"], "--bf16 2: 2 is in --int8 too; give it one mode"),
        (["--int4", "0"], "--int4 0: the others are int4 too; add --int8 or --bf16 for them"),
        (["--int8", "--seq-length", "200000"], "--seq-length 200000: this checkpoint was trained for 131072 at most"),
        (["--int8", "--part", "decoder"], "--part decoder: not with --static"),
        (["--int8", "--seq-length", "0"], "0 is not a whole number above 0"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, argv: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    command = ["export", str(Case("mllama").checkpoint), "--static", "--dst", str(tmp_path / "dst"), *argv]
    try:
        assert main(command) == 2
    except SystemExit as stop:
        assert stop.code == 2
    assert words in one_line(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("llava_next", "--static: written for mllama, "),
        ("no_such", "no_such: neither a folder nor a family"),
    ],
)
def test_what_has_no_static_files(tmp_path: Path, model: str, words: str, capsys: pytest.CaptureFixture) -> None:
    assert export(model, tmp_path / "dst") == 2
    assert words in one_line(capsys)


@pytest.mark.parametrize("option", [["--int8"], ["--seq-length", "64"]])
def test_options_of_static_alone(tmp_path: Path, option: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(["export", str(Case("mllama").checkpoint), "--dst", str(tmp_path / "dst"), *option]) == 2
    assert f"{option[0]} is of --static; leave it out, or add that" in one_line(capsys)


# Stand-ins for TPU-MLIR's programs: they note how they are called and make the file that is asked for.
TOOL = """#!/bin/bash
echo "$(basename $0) $*" >> "$CALLS"
while [[ $# -gt 0 ]]; do
    case $1 in
    --model_def) [[ -e $2 ]] || exit 1 ;;
    --mlir|--model|-o) [[ -n $FAIL && $2 == $FAIL ]] && exit 1; echo made > "$2" ;;
    esac
    shift
done
"""


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file the calls are noted in."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("model_transform.py", "model_deploy.py", "model_tool"):
        (folder / name).write_text(TOOL)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path / "calls"


def compile_all(folder: Path, *argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([str(folder / "compile.sh"), *argv], capture_output=True, text=True)


def copied(folder: Path, tmp_path: Path) -> Path:
    subprocess.run(["cp", "-r", str(folder), str(tmp_path / "export")], check=True)
    return tmp_path / "export"


def deployed(calls: Path) -> dict[str, str]:
    """Network -> what model_deploy.py was told of it, besides the files."""
    lines = [line.split() for line in calls.read_text().splitlines() if line.startswith("model_deploy.py")]
    return {line[2].removesuffix(".mlir"): " ".join(line[3 : line.index("--chip")]) for line in lines}


def test_compile_sh_is_the_published_one(static_shapes: Path, tmp_path: Path, tools: Path) -> None:
    """Modes per network and the order they are put together in, of the published script; blocks 1, 3, 5 look."""
    folder = copied(static_shapes, tmp_path)
    done = compile_all(folder, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    blocks = {f"{kind}_{number}" for kind in ("block", "block_cache") for number in range(8)}
    inside, outside = "--quantize BF16 --quant_output", f"{MODES['int4']} --quant_input"
    assert deployed(tools) == {
        "embedding": inside, "embedding_cache": inside, "vit": inside, "lm_head": outside,
        "greedy_head": "", "penalty_sample_head": "", **dict.fromkeys(blocks, f"{outside} --quant_output"),
    }  # fmt: skip
    *_, combine = tools.read_text().splitlines()
    words = combine.split()
    assert words[:2] == ["model_tool", "--combine"]
    assert words[-2:] == ["-o", str(folder / "llama3.2-11b-vision_int4_128seq.bmodel")]
    order = [Path(word).stem for word in words[2:-2]]
    assert order == ["embedding", "embedding_cache", "lm_head", "greedy_head", "penalty_sample_head",
                     *(f"{kind}_{number}" for number in (0, 2, 4, 6, 7, 1, 3, 5) for kind in ("block", "block_cache")),
                     "vit"]  # fmt: skip


def test_compile_sh_takes_the_published_options(static_golden: Path, tmp_path: Path, tools: Path) -> None:
    folder = copied(static_golden, tmp_path)
    options = ["--mode", "bf16", "--name", "small", "--seq_length", str(GOLDEN_LENGTH), "--addr_mode", "io_alone"]
    assert compile_all(folder, *options).returncode == 0
    assert (folder / f"small-vision_bf16_{GOLDEN_LENGTH}seq.bmodel").exists()
    found = deployed(tools)
    assert found["lm_head"] == "--quantize BF16 --quant_input"
    assert found["block_0"] == "--quantize BF16 --quant_input --quant_output"
    assert found["block_cache_2"] == "--quantize BF16 --quant_input --quant_output --addr_mode io_alone"


def test_compile_sh_goes_on_where_it_stopped(
    static_golden: Path, tmp_path: Path, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(static_golden, tmp_path)
    monkeypatch.setenv("FAIL", "block_cache_1.bmodel")
    assert compile_all(folder).returncode != 0
    assert "model_tool" not in tools.read_text() and not list(folder.glob("*.bmodel"))
    tools.unlink()
    monkeypatch.setenv("FAIL", "")
    assert compile_all(folder).returncode == 0
    assert deployed(tools).keys() <= {"block_cache_1", "block_cache_4", "vit"} and "block_cache_1" in deployed(tools)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--seq_length", "512"], f"--seq_length 512: the files are of {GOLDEN_LENGTH}; export them anew"),
        (["--mode", "fp8"], "--mode fp8: int4|int8|bf16"),
        (["--addr_mode", "x"], "--addr_mode x: io_alone or nothing"),
        (["--fast"], "--fast: no such option"),
        (["--mode"], "--mode: needs a value"),
    ],
)
def test_compile_sh_refuses(static_golden: Path, tools: Path, argv: list[str], words: str) -> None:
    done = compile_all(static_golden, *argv)
    assert done.returncode == 2 and words in done.stderr and not tools.exists()


def test_modes_by_block(tmp_path: Path, tools: Path) -> None:
    dst = tmp_path / "dst"
    assert export("mllama", dst, "--int8", "--bf16", "0-1,lm_head", "--int4", "7") == 0
    assert compile_all(dst).returncode == 0
    found = deployed(tools)
    modes = {
        name: next(mode for mode, words in MODES.items() if words in found[name])
        for name in found
        if "head" not in name
    }
    assert modes["block_0"] == modes["block_cache_1"] == "bf16" and modes["block_cache_7"] == "int4"
    assert {modes[f"block_{number}"] for number in range(2, 7)} == {"int8"}
    assert found["lm_head"] == "--quantize BF16 --quant_input"
    assert (dst / f"llama3.2-11b-vision_mixed_{GOLDEN_LENGTH}seq.bmodel").exists()
    record = json.loads((dst / EXPORT).read_text())
    assert record["static"]["modes"] == {"0": "bf16", "1": "bf16", "7": "int4", "lm_head": "bf16"}
    assert record["source"] == str(REPOSITORY / "assets" / "mllama-shapes")
