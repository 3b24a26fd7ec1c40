"""weights_tools convert minigpt4: what it makes of the original files, and everything it refuses in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, GOLDEN, config_for
from safetensors.torch import load_file, save_file
from split_cases import one_line

from mmdist.engine.load import load_engine
from mmdist.media import load_image
from mmdist.tp import TP
from weights_tools.cli import main
from weights_tools.folder import CONVERSION

IMAGE, LANGUAGE, LINEAR = Path("weights_image"), Path("weights_language"), Path("weights_linear")
EVA, BLIP2, BERT = IMAGE / "eva_vit_g.pth", IMAGE / "blip2_pretrained_flant5xxl.pth", IMAGE / "bert-base-uncased"
PROJECTION = LINEAR / "pretrained_minigpt4_7b.pth"


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """The Vicuna variant's original files, to spoil."""
    return Path(shutil.copytree(GOLDEN / "minigpt4" / "checkpoint", tmp_path / "original"))


def convert(src: Path, dst: Path, *more: str) -> int:
    sets = [word for setting in more for word in ("--set", setting)]
    return main(["convert", "minigpt4", "--src", str(src), "--dst", str(dst), *sets])


def refusal(src: Path, capsys: pytest.CaptureFixture, *more: str) -> str:
    """The line of a convert that writes nothing."""
    dst = src.with_name("dst")
    assert convert(src, dst, *more) == 2
    assert not dst.exists()
    return one_line(capsys)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    torch.save(change(torch.load(path, weights_only=True)), path)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_convert_writes(original: Path, tmp_path: Path) -> None:
    """Values and dtypes as stored, ignored entries named, and the folder splits and verifies."""
    plain, split = tmp_path / "plain", tmp_path / "split"
    assert convert(original, plain) == 0
    tensors = load_file(plain / "model.safetensors")
    eva = torch.load(original / EVA, weights_only=True)
    assert torch.equal(tensors["vision.tower.blocks.3.attn.q_bias"], eva["blocks.3.attn.q_bias"])
    assert tensors["vision.tower.pos_embed"].dtype == torch.float16
    assert tensors["vision.qformer.query_tokens"].dtype == torch.float32
    ignored = json.loads((plain / CONVERSION).read_text())["ignored"]
    assert {"t5_proj.weight", "Qformer.bert.embeddings.position_ids", "optimizer", "epoch"} <= set(ignored)
    assert sum(name.endswith("rotary_emb.inv_freq") for name in ignored) == 3
    assert main(["verify", str(plain)]) == 0
    assert main(["split", "minigpt4", "--ranks", "2", "--src", str(plain), "--dst", str(split)]) == 0
    assert main(["verify", str(split), "--against", str(plain)]) == 0


def test_entries_upstream_passes_over(original: Path, tmp_path: Path) -> None:
    """EVA's 40th block, head and norms, and the Q-Former's text branch: named, and no tensor changed."""
    assert convert(original, tmp_path / "bare") == 0

    def add_blocks(state: dict[str, Any]) -> dict[str, Any]:
        first = {name.removeprefix("blocks.0."): x for name, x in state.items() if name.startswith("blocks.0.")}
        more = {f"blocks.{i}.{name}": x for i in range(4, 40) for name, x in first.items()}
        return state | more | {"head.weight": torch.ones(2, 88), "norm.bias": torch.ones(88)}

    edit(original / EVA, add_blocks)
    layer = "Qformer.bert.encoder.layer.4."
    text_branch = (f"{layer}intermediate.dense.bias", f"{layer}output.LayerNorm.bias", f"{layer}output.dense.bias")
    more = {name: torch.ones(3) for name in (*text_branch, "Qformer.bert.embeddings.word_embeddings.weight")}
    edit(original / BLIP2, lambda content: {"model": content["model"] | more})
    assert convert(original, tmp_path / "four", "num_vision_layers=4") == 0
    bare, four = (load_file(tmp_path / name / "model.safetensors") for name in ("bare", "four"))
    assert bare.keys() == four.keys() and all(torch.equal(bare[name], four[name]) for name in bare)
    assert convert(original, tmp_path / "all") == 0
    assert json.loads((tmp_path / "all" / "config.json").read_text())["vision_num_layers"] == 39
    ignored = set(json.loads((tmp_path / "all" / CONVERSION).read_text())["ignored"])
    assert {*more, "blocks.39.attn.qkv.weight", "head.weight", "norm.bias"} <= ignored


def test_another_picture_size(original: Path, tmp_path: Path) -> None:
    """Positions are interpolated as upstream does it when the size differs."""
    assert convert(original, tmp_path / "larger", "image_size=98") == 0
    config = json.loads((tmp_path / "larger" / "config.json").read_text())
    found = load_file(tmp_path / "larger" / "model.safetensors")["vision.tower.pos_embed"]
    stored = torch.load(original / EVA, weights_only=True)["pos_embed"]
    grid = stored[:, 1:].float().reshape(1, 5, 5, 88).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(grid, size=(7, 7), mode="bicubic", align_corners=False)
    assert config["image_size"] == 98 and torch.equal(found[:, :1], stored[:, :1])
    assert torch.equal(found[:, 1:], want.permute(0, 2, 3, 1).flatten(1, 2).half())
    engine = load_engine(config_for(tmp_path / "larger", model="minigpt4"), TP(), CPU)
    image = load_image(GOLDEN / "minigpt4" / "inputs" / "column.png")
    assert (
        engine.runner.model.encode_images(engine.prompts.prompt(images=[image], text="<ImageHere>").vision)
        .isfinite()
        .all()
    )


def test_language_model_in_safetensors(original: Path, tmp_path: Path) -> None:
    assert convert(original, tmp_path / "bin") == 0
    weights: dict[str, torch.Tensor] = {}
    for path in (original / LANGUAGE).glob("*.bin"):
        weights |= torch.load(path, weights_only=True)
        path.unlink()
    (original / LANGUAGE / "pytorch_model.bin.index.json").unlink()
    save_file(weights, original / LANGUAGE / "model.safetensors")
    assert convert(original, tmp_path / "safe") == 0
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("bin", "safe"))
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


def test_one_of_several_projections(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    other = LINEAR / "finetuned.pth"
    shutil.copy(original / PROJECTION, original / other)
    line = refusal(original, capsys)
    assert f"2 to choose from: {other}, {PROJECTION}; add --set projection=FILE" in line
    assert convert(original, tmp_path / "plain", f"projection={other}") == 0


def project(src: Path, rows: int, columns: int) -> None:
    weights = {"llama_proj.weight": torch.ones(rows, columns), "llama_proj.bias": torch.ones(rows)}
    torch.save({"model": weights}, src / PROJECTION)


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing eva": (lambda src: (src / EVA).unlink(), "eva_vit_g.pth: missing"),
    "missing blip2": (lambda src: (src / BLIP2).unlink(), "no weights_image/blip2*.pth in it"),
    "missing bert": (lambda src: shutil.rmtree(src / BERT), "bert-base-uncased/config.json: missing"),
    "missing projection": (lambda src: (src / PROJECTION).unlink(), "no weights_linear/*.pth in it"),
    "missing language": (lambda src: shutil.rmtree(src / LANGUAGE), "weights_language: missing"),
    "missing tokenizer": (lambda src: (src / LANGUAGE / "tokenizer.model").unlink(), "tokenizer.model: missing"),
    "projection of a 13B": (
        lambda src: project(src, 100, 48),
        "projects to 100 numbers, weights_language has a hidden_size of 80; it was trained with another language model",
    ),
    "projection of another Q-Former": (
        lambda src: project(src, 80, 47),
        "takes 47 numbers, expected the Q-Former's 48 or, without one, 4 patches of 88",
    ),
    "projection with more": (
        lambda src: edit(src / PROJECTION, lambda c: {"model": c["model"] | {"query_tokens": torch.ones(1)}}),
        "1 unexpected: query_tokens",
    ),
    "eva of another width": (
        lambda src: edit(src / EVA, lambda c: c | {"patch_embed.proj.weight": torch.ones(90, 3, 14, 14)}),
        "width 90, expected EVA's heads of 88",
    ),
    "eva without a tensor": (
        lambda src: edit(src / EVA, lambda c: {name: x for name, x in c.items() if name != "blocks.2.attn.v_bias"}),
        "1 missing (vision.tower.blocks.2.attn.v_bias)",
    ),
    "blip2 with another eva": (
        lambda src: edit(src / BLIP2, lambda c: {"model": c["model"] | {"ln_vision.bias": torch.ones(96)}}),
        "vision.tower.ln_vision.bias is [96], expected [88]",
    ),
    "blip2 with more": (
        lambda src: edit(src / BLIP2, lambda c: {"model": c["model"] | {"something.weight": torch.ones(2)}}),
        "1 unexpected (vision.qformer.something.weight)",
    ),
    "bert of another width": (
        lambda src: edit_json(src / BERT / "config.json", hidden_size=768),
        "hidden_size 768, the Q-Former has 48",
    ),
    "heads that do not divide": (
        lambda src: edit_json(src / BERT / "config.json", num_attention_heads=7),
        "7 attention heads do not divide the Q-Former's width 48",
    ),
    "another kind of language model": (
        lambda src: edit_json(src / LANGUAGE / "config.json", model_type="mistral"),
        "model_type mistral, expected the config of a llama",
    ),
    "a model of another vocabulary": (
        lambda src: edit_json(src / LANGUAGE / "config.json", vocab_size=300),
        "400 pieces, the model has 300",
    ),
    "TorchScript": (
        lambda src: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), src / EVA),
        "a TorchScript archive where a state dict is expected",
    ),
    "a tensor alone": (lambda src: torch.save(torch.ones(2), src / BLIP2), "holds a Tensor, expected a state dict"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_files_are_named_in_one_line(original: Path, capsys: pytest.CaptureFixture, wrong: str) -> None:
    spoil, words = WRONG[wrong]
    spoil(original)
    assert words in refusal(original, capsys)


WRONG_SETTINGS = {
    "num_vision_layers=5": "eva_vit_g.pth has 4 blocks",
    "image_size=71": "expected a multiple of the patches' 14 pixels",
    "num_heads=7": "7 attention heads do not divide",
    "language=v1.5": "expected any",
    "projection=weights_linear/none.pth": "none.pth: missing",
    "clip=x": "minigpt4 has no such key; it has projection: ",
}


@pytest.mark.parametrize("setting", WRONG_SETTINGS)
def test_wrong_settings(original: Path, capsys: pytest.CaptureFixture, setting: str) -> None:
    assert WRONG_SETTINGS[setting] in refusal(original, capsys, setting)


def test_a_later_vicuna_under_a_v0_projection(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Vicuna v1.5 has v0's sizes but for [PAD]; upstream loads it and talks nonsense."""
    for path in (original / LANGUAGE).glob("*.bin"):
        edit(path, lambda state: {name: x[:400] if len(x) == 401 else x for name, x in state.items()})
    edit_json(original / LANGUAGE / "config.json", vocab_size=400)
    line = refusal(original, capsys)
    assert (
        "trained with Vicuna v0, which has [PAD] behind its tokenizer's pieces; the model in weights_language has not"
        in line
    )
    assert "--set language=any" in line
    assert convert(original, tmp_path / "plain", "language=any") == 0


def test_vicuna_v0_under_a_llama_2_projection(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    original = Path(shutil.copytree(GOLDEN / "minigpt4_llama2" / "checkpoint", tmp_path / "original"))
    edit_json(original / LANGUAGE / "config.json", vocab_size=401)
    assert "trained with Llama 2, which has not [PAD]" in refusal(original, capsys)
