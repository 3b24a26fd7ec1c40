"""weights_tools export: split folders together again, decoders by themselves, and what cannot be exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import GOLDEN, Case
from PIL import Image
from safetensors.torch import load_file, save_file
from split_cases import (
    CASES,
    Q_PROJ,
    contents,
    flip_byte,
    kill_in_the_middle,
    one_line,
    source,
    stop_after,
    written_names,
)  # fmt: skip

from mmdist.manifest import MANIFEST, load_manifest, part_file, save_manifest
from mmdist.quant import Compressed, Scheme, quantize
from weights_tools.cli import main
from weights_tools.folder import EXPORT
from weights_tools.journal import JOURNAL

SETTINGS = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "symmetric": True, "strategy": "channel"}}}


def export(folder: Path, dst: Path, *more: str) -> int:
    return main(["export", str(folder), "--dst", str(dst), *more])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


def same_tensors(a: Path, b: Path) -> bool:
    first, second = tensors(a), tensors(b)
    return first.keys() == second.keys() and all(
        x.dtype == second[name].dtype and torch.equal(x, second[name]) for name, x in first.items()
    )


@pytest.mark.parametrize(("case", "size"), CASES)
def test_a_split_folder_is_its_source_again(splits: dict, case: str, size: int, tmp_path: Path):
    dst = tmp_path / "whole"
    assert export(splits[case, size], dst) == 0
    assert same_tensors(dst, source(case))
    assert {path.name for path in dst.iterdir()} == {path.name for path in source(case).iterdir()} | {EXPORT}
    assert main(["verify", str(dst)]) == 0
    assert main(["diff", str(dst), str(source(case))]) == 0
    hashes = json.loads((dst / EXPORT).read_text())["sha256"]
    assert hashes == {entry.name: entry.source_sha256 for entry in load_manifest(splits[case, size]).tensors}


def llava_next_logits(folder: Path) -> torch.Tensor:
    """transformers' own class about a shipped picture."""
    model = transformers.LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = transformers.LlavaNextProcessor.from_pretrained(folder)
    processor.patch_size, processor.num_additional_image_tokens = model.config.vision_config.patch_size, 1
    processor.vision_feature_select_strategy = model.config.vision_feature_select_strategy
    picture = Image.open(next((GOLDEN / "llava_next_mistral" / "inputs").glob("*.png"))).convert("RGB")
    inputs = processor(images=[picture], text=["<image>\nwhat ?"], return_tensors="pt")
    with torch.inference_mode():
        return model(**inputs).logits


def test_transformers_reads_it_and_answers_as_before(splits: dict, tmp_path: Path):
    assert export(splits["mistral", 8], tmp_path / "whole") == 0
    want, got = llava_next_logits(source()), llava_next_logits(tmp_path / "whole")
    assert want.shape[1] > 10 and torch.equal(want, got)


def test_the_golden_answers_of_the_exported_folder(splits: dict, tmp_path: Path, mistral: Case):
    """transformers on the exported folder gives the golden case's logits of its text-only request."""
    assert export(splits["mistral", 4], tmp_path / "whole") == 0
    model = transformers.LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    reference = mistral.reference()
    ids = next(i for i, item in mistral.items.items() if not item.get("images"))
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(reference[f"{ids}/input_ids"]).reshape(1, -1)).logits
    want = reference[f"{ids}/greedy_logits"].reshape(-1, logits.shape[-1])[0]
    assert np.abs(logits[0, -1].numpy() - want).max() < 1e-4


@pytest.mark.parametrize("case", ["mistral", "vicuna", "34b"])
def test_the_decoder_alone(splits: dict, case: str, tmp_path: Path):
    """From the whole folder and from its parts: the language model of transformers' class for all of it."""
    for number, folder in enumerate((source(case), splits[case, 4])):
        dst = tmp_path / str(number)
        assert export(folder, dst, "--part", "decoder") == 0
        got, info = transformers.AutoModelForCausalLM.from_pretrained(
            dst, dtype=torch.float32, output_loading_info=True
        )
        assert type(got).__name__ == ("MistralForCausalLM" if case == "mistral" else "LlamaForCausalLM")
        assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
        whole = transformers.LlavaNextForConditionalGeneration.from_pretrained(source(case), dtype=torch.float32)
        ids = torch.arange(1, 40)[None]
        with torch.inference_mode():
            assert torch.equal(got(ids).logits, whole(input_ids=ids).logits)
        assert transformers.AutoTokenizer.from_pretrained(dst)


@pytest.mark.parametrize("name", ["minigpt4", "minigpt4_llama2"])
def test_the_decoder_of_converted_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    """MiniGPT-4's language model, as transformers reads the authors' own files of it."""
    case = Case(name)
    assert export(case.checkpoint, tmp_path / "dst", "--part", "decoder") == 0
    assert "are not the decoder's)" in capsys.readouterr().out
    models = [
        transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (tmp_path / "dst", case.folder / "checkpoint" / "weights_language")
    ]
    ids = torch.arange(1, 40)[None]
    with torch.inference_mode():
        got, want = (model(ids).logits for model in models)
    assert torch.equal(got, want[..., : got.shape[-1]])


def test_a_split_of_converted_files_is_the_converted_folder(tmp_path: Path):
    folder = Case("minigpt4").checkpoint
    assert main(["split", str(folder), "--ranks", "2", "--dst", str(tmp_path / "tp2")]) == 0
    assert export(tmp_path / "tp2", tmp_path / "dst") == 0
    assert same_tensors(tmp_path / "dst", folder)
    assert main(["verify", str(tmp_path / "dst")]) == 0


def test_quantised_parts_keep_their_files_and_their_description(tmp_path: Path):
    folder = Case("llava_next_mistral_w8a16").checkpoint
    assert main(["split", str(folder), "--ranks", "4", "--dst", str(tmp_path / "tp4")]) == 0
    assert export(tmp_path / "tp4", tmp_path / "dst") == 0
    assert {path.name for path in tmp_path.joinpath("dst").iterdir()} == {p.name for p in folder.iterdir()} | {EXPORT}
    assert same_tensors(tmp_path / "dst", folder)


@pytest.fixture
def compressed(tmp_path: Path) -> Path:
    """The float case with its decoder as compressed-tensors packs it."""
    folder = tmp_path / "compressed"
    folder.mkdir()
    for path in source().iterdir():
        if "safetensors" not in path.name:
            shutil.copyfile(path, folder / path.name)
    stored = tensors(source())
    for name in [name for name in stored if "language_model" in name and "_proj.weight" in name]:
        packed = Compressed(Scheme(4)).write(quantize(stored.pop(name), Scheme(4)))
        stored |= {f"{name.removesuffix('weight')}{leaf}": x for leaf, x in packed.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    method = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": SETTINGS}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
    return folder


def test_shapes_that_follow_from_others_are_written_again(compressed: Path, tmp_path: Path):
    """compressed-tensors' weight_shape says nothing new and is not split; other readers want it."""
    assert main(["split", str(compressed), "--ranks", "2", "--dst", str(tmp_path / "tp2")]) == 0
    assert export(tmp_path / "tp2", tmp_path / "dst") == 0
    assert same_tensors(tmp_path / "dst", compressed)
    assert main(["diff", str(tmp_path / "dst"), str(compressed)]) == 0


def test_names_that_transformers_would_not_look_for(checkpoint: Path, tmp_path: Path):
    shutil.move(checkpoint / "model-00001-of-00003.safetensors", checkpoint / "a.safetensors")
    for path in checkpoint.glob("model*"):
        path.unlink() if path.suffix == ".json" else path.rename(checkpoint / f"{path.name[10]}.safetensors")
    assert main(["split", str(checkpoint), "--ranks", "2", "--dst", str(tmp_path / "tp2")]) == 0
    assert export(tmp_path / "tp2", tmp_path / "dst") == 0
    assert [path.name for path in (tmp_path / "dst").glob("*safetensors*")] == ["model.safetensors"]
    assert same_tensors(tmp_path / "dst", source())


def test_dry_run_writes_nothing(splits: dict, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert export(splits["mistral", 2], tmp_path / "dst", "--dry-run") == 0
    said = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert export(splits["mistral", 2], tmp_path / "dst") == 0
    for path in (tmp_path / "dst").glob("*.safetensors"):
        assert f"{path}: {path.stat().st_size / 1024:.1f} KiB" in said


def test_what_is_there_is_replaced_only_when_asked(splits: dict, tmp_path: Path, capsys: pytest.CaptureFixture):
    dst = tmp_path / "dst"
    assert export(splits["mistral", 2], dst) == 0
    before = contents(dst)
    assert export(splits["34b", 2], dst) == 2
    assert f"{dst}: is there already; choose another --dst, or --force" in one_line(capsys)
    assert contents(dst) == before
    assert export(splits["34b", 2], dst, "--force") == 0
    assert same_tensors(dst, source("34b")) and [path.name for path in tmp_path.iterdir()] == ["dst"]


def test_source_and_target_the_same(tp2: Path, capsys: pytest.CaptureFixture):
    before = contents(tp2)
    assert export(tp2, tp2, "--force") == 2
    assert "source and target are the same folder; choose another --dst" in one_line(capsys)
    assert export(tp2, tp2.parent, "--force") == 2
    assert "not a folder made by export, so --force does not replace it" in one_line(capsys)
    assert contents(tp2) == before


def test_verify_knows_the_hashes(splits: dict, tmp_path: Path, capsys: pytest.CaptureFixture):
    dst = tmp_path / "dst"
    assert export(splits["mistral", 2], dst) == 0
    path = dst / json.loads((dst / "model.safetensors.index.json").read_text())["weight_map"][Q_PROJ]
    flip_byte(path, Q_PROJ)
    assert main(["verify", str(dst)]) == 1
    assert f"{path}: {Q_PROJ} is damaged: its sha256 is not the one in {EXPORT}" in capsys.readouterr().out


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("part", [[], ["--part", "decoder"]], ids=["all", "decoder"])
def test_goes_on_where_it_stopped(
    splits: dict,
    tmp_path: Path,
    error: BaseException,
    part: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    with monkeypatch.context() as patched:
        stop_after(patched, 20, error)
        code = 130 if isinstance(error, KeyboardInterrupt) else 2
        assert export(splits["mistral", 2], tmp_path / "dst", *part) == code
    one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["dst.partial"]
    done = len((tmp_path / "dst.partial" / JOURNAL).read_text().splitlines()) - 1
    written = written_names(monkeypatch)
    assert export(splits["mistral", 2], tmp_path / "dst", *part) == 0
    assert done >= 15 and len(written) == len(tensors(tmp_path / "dst")) - done
    (tmp_path / "dst").rename(tmp_path / "stopped")
    assert export(splits["mistral", 2], tmp_path / "dst", *part, "--jobs", "3") == 0
    assert contents(tmp_path / "dst") == contents(tmp_path / "stopped")
    assert main(["verify", str(tmp_path / "stopped")]) == 0 or part  # a decoder alone is of no family here


def test_killed_in_the_middle(splits: dict, tmp_path: Path):
    argv = ["export", str(splits["mistral", 4]), "--dst", str(tmp_path / "dst")]
    kill_in_the_middle(argv, tmp_path / "dst")
    assert main(argv) == 0
    assert same_tensors(tmp_path / "dst", source()) and [path.name for path in tmp_path.iterdir()] == ["dst"]


def damage(folder: Path, what: str) -> str:
    """Spoil a split folder for 2; the words that say so."""
    path, manifest = folder / part_file(1, 2), load_manifest(folder)
    entry = next(entry for entry in manifest.tensors if entry.name == Q_PROJ)
    if what == "flipped byte":
        flip_byte(path, Q_PROJ)
        return f"{path}: {Q_PROJ} is damaged"
    if what == "lost tensor":
        save_file({name: x for name, x in load_file(path).items() if name != Q_PROJ}, path)
        return f"{path}: {Q_PROJ} is missing"
    if what == "lost part":
        path.unlink()
        return f"{path}: missing"
    if what == "lost manifest":
        (folder / MANIFEST).unlink()
        return "without their manifest.json"
    if what == "rows in no part":
        entry.parts[1].ranges = [[50, 96]]
    elif what == "exchanged":
        first, second = entry.parts
        first.ranges, second.ranges = second.ranges, first.ranges
    save_manifest(manifest, folder)
    if what == "exchanged":
        return f"{Q_PROJ} put together is not what was split"
    return f"{folder / MANIFEST}: {Q_PROJ} has shape [48, 96] on rank 1"


@pytest.mark.parametrize(
    "what", ["flipped byte", "lost tensor", "lost part", "lost manifest", "rows in no part", "exchanged"]
)
def test_damaged_parts_are_refused(tp2: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture):
    words = damage(tp2, what)
    assert export(tp2, tmp_path / "dst") == 2
    assert words in one_line(capsys)
    assert not (tmp_path / "dst").exists()


NO_EXPORT = {
    ("llava_next_mistral",): "whole already, a Hugging Face folder",
    ("minigpt4",): "transformers has no class for minigpt4",
    ("llama_adapter_bias", "--part", "decoder"): "its decoder is no LlamaForCausalLM",
    ("llama_adapter_lora", "--part", "decoder"): "its decoder is no LlamaForCausalLM",
    ("mllama", "--part", "decoder"): "a decoder of type mllama_text_model; export writes llama, mistral",
    ("llava_next_mistral_w8a16", "--part", "decoder"): "weight_offset",
}


@pytest.mark.parametrize("asked", NO_EXPORT, ids="-".join)
def test_what_has_no_stock_folder(asked: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = Case(asked[0]).checkpoint
    capsys.readouterr()
    assert export(folder, tmp_path / "dst", *asked[1:]) == 2
    assert NO_EXPORT[asked] in one_line(capsys)
    assert not list(tmp_path.iterdir())


def test_mistakes_are_one_line(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert export(tmp_path / "no_such", tmp_path / "dst") == 2
    assert "no_such: no such folder" in one_line(capsys)
    assert main(["convert", "vlmo", "--src", str(original), "--dst", str(tmp_path / "vlmo")]) == 0
    capsys.readouterr()
    assert export(tmp_path / "vlmo", tmp_path / "dst", "--part", "decoder") == 2
    assert "vlmo has no decoder" in one_line(capsys)
