"""weights_tools verify of quantised folders: errors against the plain source, what else differs, and --deep."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Case, answers, config_for, run_engine
from convert_cases import run as convert_vlmo
from safetensors.torch import load_file, save_file
from split_cases import one_line, source, spoil

from mmdist.config import SamplingParams
from mmdist.engine.engine import Engine
from mmdist.tasks.requests import build_request
from weights_tools.cli import main
from weights_tools.deep import PICTURE, Question

REPOSITORY = Path(__file__).parents[1]
W8A16, FILE = Case("llava_next_mistral_w8a16").checkpoint, "quant_model_weight_w8a16.safetensors"
LAYER = "language_model.model.layers.1.mlp.down_proj"


@pytest.fixture
def quantised(tmp_path: Path) -> Path:
    """The W8A16 case, to spoil."""
    return Path(shutil.copytree(W8A16, tmp_path / "quantised", copy_function=shutil.copyfile))


def verify(*argv: object, capsys: pytest.CaptureFixture) -> tuple[int, dict]:
    capsys.readouterr()
    code = main(["verify", *map(str, argv), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_errors_of_every_quantised_layer(capsys: pytest.CaptureFixture):
    """Beside numpy's, from the tensors as they are stored."""
    code, facts = verify(W8A16, "--against", source(), capsys=capsys)
    assert code == 0 and facts["problems"] == [] and facts["deep"] is None
    layers = {entry["layer"]: entry for entry in facts["layers"]}
    assert len(layers) == 21
    stored = load_file(W8A16 / FILE)
    plain = {name: x for path in source().glob("*.safetensors") for name, x in load_file(path).items()}
    for layer, entry in layers.items():
        q, scale = stored[f"{layer}.weight"].double().numpy(), stored[f"{layer}.weight_scale"].double().numpy()
        error, wanted = q * scale - (w := plain[f"{layer}.weight"].double().numpy()), (q * scale).ravel()
        assert math.isclose(entry["max_abs"], np.abs(error).max(), rel_tol=1e-4)
        assert math.isclose(entry["rms"], np.sqrt(np.mean(error**2)), rel_tol=1e-4)
        assert abs(entry["cosine"] - wanted @ w.ravel() / np.linalg.norm(wanted) / np.linalg.norm(w)) < 1e-7
        assert 0.45 < entry["max_steps"] < 0.501
    assert main(["verify", str(W8A16), "--against", str(source())]) == 0
    out = capsys.readouterr().out
    assert out.startswith("layer ") and LAYER in out and out.endswith("all is well\n")


def test_parts_of_a_quantised_folder(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Against the quantised folder it was cut from, and against the plain one that was made from."""
    assert main(["split", str(W8A16), "--ranks", "4", "--dst", str(tmp_path / "tp4")]) == 0
    whole = verify(W8A16, "--against", source(), capsys=capsys)[1]["layers"]
    assert verify(tmp_path / "tp4", "--against", W8A16, capsys=capsys)[0] == 0
    code, facts = verify(tmp_path / "tp4", "--against", source(), capsys=capsys)
    assert code == 0 and facts["layers"] == whole


CHANGES = {
    "integer": (f"{LAYER}.weight", lambda x: x.index_fill(1, torch.tensor([7]), 127), f"{LAYER}.weight is up to "),
    "scale": (
        f"{LAYER}.weight_scale",
        lambda x: x * 1.1,
        "steps off, rounding explains 0.501: made from other weights",
    ),
    "offset": (f"{LAYER}.weight_offset", lambda x: x + 1, "is up to 1.5 steps off"),
    "norm": ("language_model.model.norm.weight", lambda x: x + 1, "but 96 of 96 values are not those in"),
    "shape": ("language_model.model.norm.weight", lambda x: x[:-1].contiguous(), "has shape [95]"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_rounding_does_not_explain(quantised: Path, change: str, capsys: pytest.CaptureFixture):
    name, edit, words = CHANGES[change]
    spoil(quantised / FILE, name, edit)
    code, facts = verify(quantised, "--against", source(), capsys=capsys)
    assert code == 1 and len(facts["problems"]) == 1 and words in facts["problems"][0]


def make_uneven(folder: Path) -> None:
    """Some columns meet inputs far larger than others', as in trained models, so that calibration scales them."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, x in tensors.items():
            if "language_model" in name and name.endswith(("layernorm.weight", "up_proj.weight")):
                x[3::31] *= 16
        save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("asked", [("w8a16", "0"), ("w4a16", "16"), ("w4a16", "0")], ids="-".join)
def test_calibrated_folders(asked: tuple[str, str], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Scaled norms and columns are seen for what they are; a change that is none of calibration's is not."""
    make_uneven(checkpoint)
    requests, dst = tmp_path / "requests.jsonl", tmp_path / "calibrated"
    requests.write_text(json.dumps(Question("what ?", PICTURE, "").entry()) + "\n")
    flags = ["--scheme", asked[0], "--group-size", asked[1], "--calibration", str(requests)]
    assert main(["quantize", str(checkpoint), "--dst", str(dst), *flags]) == 0
    code, facts = verify(dst, "--against", checkpoint, "--deep", capsys=capsys)
    assert code == 0 and len(facts["layers"]) == 21 and facts["deep"]["num_rows"] == 32
    assert min(entry["cosine"] for entry in facts["layers"]) > (0.999 if asked[0] == "w8a16" else 0.95)
    plain = {name: x for path in checkpoint.glob("*.safetensors") for name, x in load_file(path).items()}
    (file,) = dst.glob("*.safetensors")
    scaled = [n for n, x in load_file(file).items() if n in plain and "norm" in n and not torch.equal(x, plain[n])]
    assert scaled  # powers of two, which verify took for what they are
    spoil(file, scaled[0], lambda x: x * 1.01)
    (dst / "quantization.json").write_text(json.dumps({"tensors": [], "calibration_sha256": "0"}))
    code, facts = verify(dst, "--against", checkpoint, capsys=capsys)
    assert code == 1 and f"{scaled[0]} is not quantised, but " in facts["problems"][0]


def test_missing_and_extra_tensors(quantised: Path, checkpoint: Path, capsys: pytest.CaptureFixture):
    path = checkpoint / "model-00001-of-00003.safetensors"
    tensors = load_file(path)
    tensors["extra"] = tensors.pop("image_newline")
    save_file(tensors, path, {"format": "pt"})
    (checkpoint / "model.safetensors.index.json").unlink()
    code, facts = verify(quantised, "--against", checkpoint, capsys=capsys)
    assert code == 1 and len(facts["problems"]) == 2
    assert "extra is missing" in facts["problems"][0] and "image_newline is not in" in facts["problems"][1]


def test_a_folder_that_disagrees_with_its_description(quantised: Path, capsys: pytest.CaptureFixture):
    description = quantised / "quant_model_description.json"
    types = json.loads(description.read_text())
    description.write_text(json.dumps(types | {f"{LAYER}.weight": "FLOAT"}))
    code, facts = verify(quantised, "--against", source(), "--deep", capsys=capsys)
    assert code == 1 and facts["deep"] is None and facts["layers"] == []
    assert f"{LAYER}.weight is FLOAT there, I8 in its file" in facts["problems"][0]


def test_deep(capsys: pytest.CaptureFixture):
    """Both answers are the engine's own; logits of the same folder twice are equal, of the quantised one close."""
    code, facts = verify(W8A16, "--against", source(), "--deep", capsys=capsys)
    deep = facts["deep"]
    assert code == 0 and len(facts["layers"]) == 21
    assert deep["num_rows"] == deep["greedy_tokens"] == 32 and deep["top1_agreement"] > 28
    assert 0 < deep["rms"] < deep["max_abs"] < 0.05 * deep["largest_logit"]

    def work(engine: Engine) -> str:
        request = build_request(Question("What is in the picture?", PICTURE, "").entry(), engine.prompts,
                                SamplingParams(max_new_tokens=32), REPOSITORY)  # fmt: skip
        return answers(engine, [request])["deep"].text

    for folder, text in zip((W8A16, source()), deep["answers"], strict=True):
        assert run_engine(1, config_for(folder, max_model_len=4096), work) == text
    assert main(["verify", str(W8A16), "--against", str(source()), "--deep", "--prompt", "why ?"]) == 0
    out = capsys.readouterr().out
    assert "about 'why ?'" in out and "top-1 agrees in " in out and "greedy tokens agree up to " in out


@pytest.mark.parametrize("name", ["mllama", "llama_adapter_bias", "minigpt4"])
def test_deep_of_every_kind_of_model(name: str, capsys: pytest.CaptureFixture):
    folder = Case(name).checkpoint
    code, facts = verify(folder, "--against", folder, "--deep", "--prompt", "what ?", capsys=capsys)
    deep = facts["deep"]
    assert code == 0 and deep["max_abs"] == 0 and deep["top1_agreement"] == deep["num_rows"] >= 1
    assert deep["greedy_tokens_equal"] == deep["greedy_tokens"] and deep["answers"][0] == deep["answers"][1]


def test_deep_of_a_model_that_answers_at_once(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert convert_vlmo(original, tmp_path / "vlmo") == 0
    code, facts = verify(tmp_path / "vlmo", "--against", tmp_path / "vlmo", "--deep", capsys=capsys)
    assert code == 0 and facts["deep"]["num_rows"] == facts["deep"]["top1_agreement"] == 1
    assert facts["deep"]["answers"][0]


def test_deep_takes_whole_folders(splits: dict, capsys: pytest.CaptureFixture):
    assert verify(splits["mistral", 1], "--against", source(), "--deep", capsys=capsys)[1]["deep"]["max_abs"] == 0
    assert main(["verify", str(splits["mistral", 2]), "--against", str(source()), "--deep"]) == 2
    assert "split for 2 ranks, --deep runs on one; export it first" in one_line(capsys)
    assert main(["verify", str(Case("llava_15").checkpoint), "--against", str(source()), "--deep"]) == 2
    assert "is a llava, " in one_line(capsys)


MISTAKES = {
    "SRC --deep": "--deep: asks two checkpoints the same; give the other one as --against SRC",
    "SRC --prompt why": "--prompt: says what --deep asks; add --deep",
    "SRC --against SRC --image no_such.png": "--image: says what --deep asks; add --deep",
    "SRC --against SRC --deep --image no_such.png": "no_such.png: no such picture",
    "SRC --against SRC --deep --image JSON": "not a picture",
    "W8A16 --against EMPTY": "not JSON",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_mistakes_are_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "empty").mkdir()
    places = {"SRC": source(), "W8A16": W8A16, "EMPTY": tmp_path / "empty", "JSON": source() / "config.json"}
    assert main(["verify", *(str(places.get(word, word)) for word in command.split())]) == 2
    assert MISTAKES[command] in one_line(capsys)
