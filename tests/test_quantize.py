"""weights_tools quantize: the folders it makes, who reads them, and how it ends when something goes wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Case, answers, config_for, run_engine
from quant_cases import W4, description, golden, quantize, tensors
from safetensors.torch import load_file, save_file
from split_cases import one_line, source, spoil

from mmdist.config import QuantConfig, UserError
from mmdist.engine.engine import Engine
from mmdist.engine.load import open_model
from mmdist.tp import TP
from weights_tools import convert
from weights_tools.cli import main


def test_ascend_folder_is_the_golden_one(w8a16: Path) -> None:
    """Tensor for tensor, type for type, file for file."""
    wanted = golden().checkpoint
    ours, theirs = tensors(w8a16), tensors(wanted)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    assert description(w8a16) == {**description(wanted), "metadata": {}, "optional": {}}
    config = (json.loads((folder / "config.json").read_text()) for folder in (w8a16, wanted))
    assert next(config) == next(config)
    others = {path.name for path in wanted.iterdir()} - {"quant_model_description.json", "config.json"}
    for name in others:
        if not name.endswith(".safetensors"):
            assert (w8a16 / name).read_bytes() == (wanted / name).read_bytes()
    assert {path.name for path in w8a16.iterdir()} == {path.name for path in wanted.iterdir()} | {"quantization.json"}


@pytest.mark.parametrize("size", (1, 2, 4, 8))
def test_goldens_whole_and_split(w8a16: Path, tmp_path: Path, size: int) -> None:
    """Tokens and log probabilities of the golden W8A16 case, from our folder and from our folder cut by split."""
    case = golden()
    reference, folders = case.reference(), [w8a16]
    if size > 1:
        folders.append(tmp_path / "split")
        assert main(["split", str(w8a16), "--ranks", str(size), "--dst", str(folders[1])]) == 0
        assert main(["verify", str(folders[1]), "--against", str(w8a16)]) == 0
    for folder in folders:

        def work(engine: Engine) -> Any:
            requests = [case.request(engine, i, max_new_tokens=12, ignore_eos=True, logprobs=1) for i in case.items]
            return answers(engine, requests)

        for item_id, output in run_engine(size, config_for(folder), work).items():
            assert output.token_ids == reference[f"{item_id}/greedy_ids"].ravel().tolist()
            wanted = torch.from_numpy(reference[f"{item_id}/greedy_logits"]).reshape(12, -1).log_softmax(-1).amax(-1)
            assert np.abs([entry["logprob"] for entry in output.logprobs] - wanted.numpy()).max() <= 1e-4


def first_answer(case: Case, config: Any) -> Any:
    """Tokens and their log probabilities of a case's first item, at 2 ranks."""

    def work(engine: Engine) -> Any:
        item_id = next(iter(case.items))
        params = {"max_new_tokens": 6, "ignore_eos": True, "logprobs": 1}
        return answers(engine, [case.request(engine, item_id, **params)])[item_id]

    output = run_engine(2, config, work)
    return output.token_ids, [entry["logprob"] for entry in output.logprobs]


@pytest.mark.parametrize("scheme", ("w8a16", "w4a16"))
def test_every_family(case: Case, scheme: str, tmp_path: Path) -> None:
    """A quantised folder answers as the float one quantised on loading does, converted folders included."""
    if case.name == golden().name:
        pytest.skip("quantised already")
    folder = quantize(case.checkpoint, tmp_path / "q", "--scheme", scheme, "--group-size", "0", model=case.model)
    asked = config_for(case, quant=QuantConfig(scheme))
    assert first_answer(case, config_for(folder, model=case.model)) == first_answer(case, asked)
    assert main(["verify", str(folder)]) == 0
    assert main(["inspect", str(folder), "--ranks", "2"]) == 0


@pytest.mark.parametrize("format", ("ascend", "compressed-tensors"))
def test_groups_whole_and_split(mistral: Case, tmp_path: Path, format: str) -> None:
    """4 bits in groups of 16 columns, at 2 ranks; in Ascend's format it is what quantising on loading gives."""
    flags = ("--scheme", "w4a16", "--group-size", "16", "--format", format)
    folder = quantize(source(), tmp_path / "q", *flags)
    assert main(["split", str(folder), "--ranks", "2", "--dst", str(tmp_path / "split")]) == 0
    answer = first_answer(mistral, config_for(folder))
    assert first_answer(mistral, config_for(tmp_path / "split")) == answer
    if format == "ascend":
        assert first_answer(mistral, config_for(mistral, quant=QuantConfig("w4a16", 16))) == answer


# vllm-ascend (quantization/modelslim_config.py) and MindIE (atb_llm/utils/quantize): what they ask of a description.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@pytest.mark.parametrize("flags", [(), W4], ids=["w8a16", "w4a16"])
def test_description_is_what_ascend_software_asks_for(tmp_path: Path, flags: tuple[str, ...]) -> None:
    folder = quantize(source(), tmp_path / "q", *flags)
    found, stored = description(folder), tensors(folder)
    kind, group_size = ("W4A16", 32) if flags else ("W8A16", 0)
    assert (found["model_quant_type"], found["version"], found["group_size"]) == (kind, "1.0.0", group_size)
    types = {name: value for name, value in found.items() if name in stored}
    assert types.keys() == stored.keys() and set(types.values()) == {kind, "FLOAT"}
    linears = {name.removesuffix(".weight") for name in types if name.endswith(".weight")}
    for linear in linears:
        for parts in FUSED:
            if linear.endswith(parts) and "language_model" in linear:
                parent = linear.rpartition(".")[0]
                assert {types[f"{parent}.{part}.weight"] for part in parts} == {kind}
        if types[f"{linear}.weight"] == kind:
            scale, offset = stored[f"{linear}.weight_scale"], stored[f"{linear}.weight_offset"]
            assert {types[f"{linear}.weight_scale"], types[f"{linear}.weight_offset"]} == {kind}
            assert stored[f"{linear}.weight"].dtype == torch.int8 and scale.dtype == offset.dtype == torch.float32
            assert scale.shape == offset.shape and not offset.any()
            assert len(stored[f"{linear}.weight"]) == len(scale) // (2 if flags else 1)  # two rows share a byte
    assert json.loads((folder / "config.json").read_text())["quantize"] == kind.lower()


def test_large_checkpoints_are_several_files(w8a16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "FILE_BYTES", 200_000)
    folder = quantize(source(), tmp_path / "q")
    index = json.loads((folder / "quant_model_weight_w8a16.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files[0].startswith("quant_model_weight_w8a16-00001-of-0000") and len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    whole = tensors(w8a16)
    assert index["weight_map"].keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in tensors(folder).items())
    assert main(["verify", str(folder)]) == 0
    open_model(config_for(folder), TP(), "cpu")
    (folder / files[1]).unlink()
    with pytest.raises(UserError, match="missing, although the checkpoint's index"):
        open_model(config_for(folder), TP(), "cpu")


def test_offsets_that_are_not_zero(w8a16: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """(q - offset) * scale, as msmodelslim means it; not to be quantised once more, as its NPU operator adds."""
    folder, moved = Path(shutil.copytree(w8a16, tmp_path / "asymmetric")), 3
    (file,) = folder.glob("*.safetensors")
    for name in (name for name in tensors(folder) if name.endswith(".weight_offset")):
        spoil(file, name, lambda offset: offset + moved)
        spoil(file, name.removesuffix("_offset"), lambda q: q.clamp(max=127 - moved) + moved)
    case, answer = golden(), first_answer(golden(), config_for(w8a16))
    found = first_answer(case, config_for(folder))
    assert found[0] == answer[0] and np.abs(np.subtract(found[1], answer[1])).max() < 0.05  # what 127 - 3 cut off
    capsys.readouterr()
    assert main(["quantize", str(folder), "--scheme", "w8a16", "--dst", str(tmp_path / "again")]) == 2
    words = "quantised already, as w8a16, with offsets that are not zero: msmodelslim's formula subtracts them"
    assert words in one_line(capsys)
    (folder / "quantization.json").unlink()  # with the hashes of what was there before
    assert main(["split", str(folder), "--ranks", "2", "--dst", str(tmp_path / "tp2")]) == 0
    for asymmetric in (folder, tmp_path / "tp2"):
        capsys.readouterr()
        assert main(["verify", str(asymmetric)]) == 0
        said = capsys.readouterr().out
        assert f"warning: {asymmetric}: 21 offsets are not zero" in said and "the NPU's operator adds them" in said
    assert main(["verify", str(w8a16)]) == 0
    assert "warning" not in capsys.readouterr().out


def test_files_as_msmodelslims_writers_name_them(tmp_path: Path) -> None:
    """The older Calibrator's, and the command line's parts with their index; files that may only be read."""
    wanted = first_answer(golden(), config_for(golden()))
    older, parts = (Path(shutil.copytree(golden().checkpoint, tmp_path / name)) for name in ("older", "parts"))
    (older / "quant_model_description.json").rename(older / "quant_model_description_w8a16.json")
    (file,) = parts.glob("*.safetensors")
    stored = sorted(load_file(file).items())
    names = [f"quant_model_weights-{n:05d}-of-00002.safetensors" for n in (1, 2)]
    for name, part in zip(names, (stored[:70], stored[70:]), strict=True):
        save_file(dict(part), parts / name)
        (parts / name).chmod(0o400)
    file.unlink()
    weight_map = {key: names[number >= 70] for number, (key, _) in enumerate(stored)}
    (parts / "quant_model_weights.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for folder in (older, parts):
        assert first_answer(golden(), config_for(folder)) == wanted
        assert main(["verify", str(folder)]) == 0


def test_quantised_and_cut_in_one_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--ranks writes what split makes of the quantised folder, and refuses at once a size that it cannot be cut for."""
    words = ["quantize", str(source()), "--dst", str(tmp_path / "q"), "--scheme", "w4a16", "--group-size", "32"]
    assert main([*words, "--ranks", "8"]) == 2
    assert "legal sizes: 1" in capsys.readouterr().err and not (tmp_path / "q").exists()
    assert main([*words[:-2], "--group-size", "0", "--ranks", "2"]) == 0
    assert main(["split", str(tmp_path / "q"), "--ranks", "2", "--dst", str(tmp_path / "apart")]) == 0
    for file in (tmp_path / "apart").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "q-tp2" / file.name).read_bytes()
