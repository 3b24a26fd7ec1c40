"""Words from the command line to a checked config; what is wrong is said in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Case
from hydra.core.override_parser.overrides_parser import OverridesParser

from mmdist import cli
from mmdist.compose import compose_config, quote_free_text
from mmdist.config import FREE_TEXT_KEYS, SamplingParams, UserError
from mmdist.shipped import CONF
from mmdist.usage import all_keys

LAUNCH = str(Path(__file__).parents[1] / "launch.py")
TEXTS = [
    "Red, blue: which {one}=left?", "it's \"quoted\" twice", "C:\\new\\", "cost: ${x} and \\${y} $z", "a=b,c=[d",
    "  spaces ", "émoji 🙂 #hash", "'", '"', "\\'", "null?", "(a)", "${oc.env:HOME}", "~!@%^&*", "line\nbreak\ttab",
    "\\\\${q}", "1,2",
]  # fmt: skip


def compose(*arguments: str) -> Any:
    return compose_config(quote_free_text(list(arguments)))


@pytest.mark.parametrize("text", TEXTS)
def test_free_text_arrives_as_typed(text: str) -> None:
    assert compose(f"prompt={text}").prompt == text
    assert compose(f"image=/data/{text}.png").image == f"/data/{text}.png"
    assert compose(f"checkpoint={text}", f"output_dir={text}").checkpoint == text


def test_quoting_is_idempotent_and_leaves_hydra_its_words() -> None:
    once = quote_free_text(["prompt=a, b", "world_size=2"])
    assert quote_free_text(once) == once and once[1] == "world_size=2"
    assert compose("prompt='a, b'").prompt == "a, b"
    assert compose("prompt=null").prompt is None
    assert compose("model.chat_template=a, b.jinja").model.chat_template == "a, b.jinja"


def test_a_sweep_over_free_text_is_written_as_choice() -> None:
    _, sweep, plain = quote_free_text(["-m", "prompt=choice('a, b', c)", "image=a,b.png"])
    parsed = OverridesParser.create().parse_override(sweep)
    assert parsed.is_sweep_override() and len(list(parsed.sweep_string_iterator())) == 2
    assert not OverridesParser.create().parse_override(plain).is_sweep_override()


def test_defaults_and_groups() -> None:
    config = compose()
    assert (config.task, config.model.name, config.hardware.device, config.world_size) == (
        "chat",
        "llava_next",
        "auto",
        "auto",
    )
    assert config.temperature == 0 and config.engine.max_num_seqs == 1
    assert compose("task=generate", "input=x", "hardware=cpu").hardware.device == "cpu"
    assert compose("engine=low_memory").engine.max_num_batched_tokens == 512
    assert compose("stop=['###', 'b']", "world_size=4").stop == ["###", "b"]
    assert compose("logit_bias={5:-100,7:1}").logit_bias == {5: -100.0, 7: 1.0}
    assert compose("json_schema={}").json_schema == "{}" and compose("regex=a{2},b").regex == "a{2},b"


def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["launch.py", *arguments])
    code = cli.main()
    return code, capsys.readouterr().err


WRONG = {
    "promt=hi": "did you mean prompt?",
    "engine.blocksize=4": "did you mean engine.block_size?",
    "task=serv": "Available options in 'task'",
    "model=gpt": "llava_next",
    "hardware=tpu": "Available options in 'hardware'",
    "hardware.device=tpu": "expected auto|cpu|cuda",
    "max_new_tokens=many": "'many' of type 'str' could not be converted to Integer",
    "max_new_tokens=0": "1 or above",
    "temperature=-1": "temperature=-1",
    "top_p=2": "top_p=2",
    "min_p=nan": "min_p=nan: expected a finite number",
    "temperature=inf": "temperature=inf: expected a finite number",
    "typical_p=0": "above 0, at most 1",
    "frequency_penalty=3": "-2 to 2",
    "logit_bias={5:101}": "-100 to 100",
    "logit_bias={a:5}": "Key a (str) is incompatible with (int)",
    "stop_token_ids=[-1]": "ids, 0 or above",
    "min_new_tokens=257": "at most max_new_tokens=256",
    "json_schema={": "json_schema is not JSON",
    "json_schema=[]": "expected a JSON object",
    "dtype=int8": "auto|float32|float16|bfloat16",
    "hardware.pin=0": "auto|none",
    "hardware.collectives=mpi": "auto|shm|gloo",
    "hardware.kernels=sse": "auto|plain|portable|avx2|avx512|avx512_bf16",
    "world_size=0": "world_size=0",
    "world_size=some": "world_size=some",
    "engine.block_size=0": "engine.block_size=0",
    "engine.max_num_batched_tokens=0": "above 0",
    "launcher.master_port=99999": "1 to 65535",
    "hardware.memory_utilization=2": "at most 1",
    "engine.max_model_len=999999": "at most 32768 tokens",
    "engine.num_blocks=1": "cannot hold one request",
    "model.chat_template=/nowhere.jinja": "/nowhere.jinja",
    "image=/nowhere.png": "no such picture",
}


@pytest.mark.parametrize("argument", WRONG)
def test_wrong_keys_and_values(mistral: Case, monkeypatch: Any, capsys: Any, argument: str) -> None:
    arguments = [f"checkpoint={mistral.checkpoint}", "prompt=hi", argument]
    arguments += [] if "world_size" in argument else ["world_size=1"]
    code, errors = main(monkeypatch, capsys, *arguments)
    lines = [line for line in errors.splitlines() if not line.startswith("INFO")]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and WRONG[argument] in lines[0], errors


def broken(source: Path, folder: Path, how: str) -> Path:
    """A copy of a checkpoint with one thing wrong."""
    if how == "no folder":
        return folder
    shutil.copytree(source, folder)
    file = folder / "model-00002-of-00003.safetensors"
    config = json.loads((folder / "config.json").read_text())
    if how == "no weights":
        for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
            path.unlink()
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "missing shard":
        file.unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "bad config":
        (folder / "config.json").write_text("{")
    elif how == "other family":
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "llava"}))
    elif how == "other size":
        config["text_config"]["intermediate_size"] = 128
        (folder / "config.json").write_text(json.dumps(config))
    elif how == "more layers":
        config["text_config"]["num_hidden_layers"] = 4
        (folder / "config.json").write_text(json.dumps(config))
    elif how == "fewer layers":
        config["text_config"]["num_hidden_layers"] = 2
        (folder / "config.json").write_text(json.dumps(config))
    elif how == "text model":
        config["text_config"]["model_type"] = "gemma"
        (folder / "config.json").write_text(json.dumps(config))
    elif how == "rope":
        config["text_config"]["rope_scaling"] = {"rope_type": "dynamic", "factor": 2.0}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


BROKEN = {
    "no folder": "no such folder",
    "no weights": "no *.safetensors",
    "truncated": "model-00002-of-00003.safetensors: truncated",
    "missing shard": "model-00002-of-00003.safetensors: missing",
    "no config": "no config.json",
    "bad config": "not JSON",
    "other family": "model_type is llava",
    "other size": "of different models",
    "more layers": "tensors of llava_next missing (first: decoder.layers.3",
    "fewer layers": "not used by it (first: language_model.model.layers.2",
    "text model": "expected llama, mistral",
    "rope": "rope_type=dynamic",
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_checkpoints(mistral: Case, tmp_path: Path, monkeypatch: Any, capsys: Any, how: str) -> None:
    folder = broken(mistral.checkpoint, tmp_path / "broken", how)
    code, errors = main(monkeypatch, capsys, f"checkpoint={folder}", "prompt=hi", "world_size=1")
    lines = [line for line in errors.splitlines() if not line.startswith("INFO")]
    assert code == 2 and len(lines) == 1 and BROKEN[how] in lines[0], errors


@pytest.mark.parametrize("size", (3, 5, 16))
def test_illegal_world_sizes_name_the_legal_ones(mistral: Case, monkeypatch: Any, capsys: Any, size: int) -> None:
    code, errors = main(monkeypatch, capsys, f"checkpoint={mistral.checkpoint}", "prompt=hi", f"world_size={size}")
    assert code == 2 and "legal sizes: 1, 2, 4, 8" in errors and "starting" not in errors


def test_help_names_every_key_and_group(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["launch.py", "--help"])
    assert cli.main() == 0
    text = capsys.readouterr().out
    for key in all_keys():
        assert f"  {key}=" in text, key
    for group in CONF.iterdir():
        assert group.is_file() or group.name in text
    assert "torchrun --nproc-per-node 2 launch.py" in text


def test_every_free_text_key_exists() -> None:
    assert set(FREE_TEXT_KEYS) <= set(all_keys())


def test_sampling_params_accept_one_stop_text() -> None:
    assert SamplingParams(stop="###").stop == ["###"]  # type: ignore[arg-type]
    with pytest.raises(UserError, match="stop"):
        SamplingParams(stop=[""])


WRONG_PARAMS: dict[str, dict[str, Any]] = {
    "temperature='1': expected float": {"temperature": "1"},
    "top_k=True: expected int": {"top_k": True},
    "top_p=nan": {"top_p": float("nan")},
    "presence_penalty=-3": {"presence_penalty": -3},
    "seed=18446744073709551616": {"seed": 2**64},
    r"logit_bias=\{'x': 1\}: expected dict\[int, float\]": {"logit_bias": {"x": 1}},
    "stop_token_ids=5": {"stop_token_ids": 5},
    "an answer follows one of them": {"json_schema": "{}", "regex": "a"},
    "ignore_eos does not go with regex": {"regex": "a", "ignore_eos": True},
    "min_new_tokens does not go with json_schema": {"json_schema": {}, "min_new_tokens": 1},
}


@pytest.mark.parametrize("words", WRONG_PARAMS)
def test_wrong_sampling_params(words: str) -> None:
    with pytest.raises(UserError, match=words):
        SamplingParams(**WRONG_PARAMS[words])


def test_sampling_params_as_json_has_them() -> None:
    params = SamplingParams(logit_bias={"5": -1}, json_schema={"type": "object"})  # type: ignore[dict-item,arg-type]
    assert params.logit_bias == {5: -1} and params.json_schema == '{"type": "object"}'
    assert SamplingParams(temperature=1e-7).temperature == 0


def test_busy_ports_are_said(mistral: Case) -> None:
    """A port that someone else listens on is refused when asked for."""
    import socket

    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        result = subprocess.run(
            [sys.executable, LAUNCH, f"checkpoint={mistral.checkpoint}", "prompt=hi", "world_size=2",
             f"launcher.master_port={port}"],
            capture_output=True, text=True, env=os.environ, timeout=60,
        )  # fmt: skip
    assert result.returncode == 2 and f"port {port} is in use" in result.stderr
