"""LLaMA-Adapter's original files: what convert makes of them, and the lines it refuses others with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, Case
from safetensors.torch import load_file
from split_cases import one_line

from weights_tools.cli import main
from weights_tools.layouts.meta_llama import half_split

ORIGINAL = GOLDEN / "llama_adapter" / "checkpoint"
BIAS, LORA = Case("llama_adapter_bias"), Case("llama_adapter_lora")
CHOICES = ("--set", "adapter=BIAS-7B.pth", "clip=clip/ViT-L-14.pt")


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """The original files, to spoil."""
    folder = tmp_path / "original"
    shutil.copytree(ORIGINAL, folder, copy_function=shutil.copyfile)
    return folder


def convert(src: Path, dst: Path, *more: str) -> int:
    return main(["convert", "llama_adapter", "--src", str(src), "--dst", str(dst), *more])


def refused(src: Path, tmp_path: Path, capsys: pytest.CaptureFixture, *more: str) -> str:
    """The line of a convert that writes nothing."""
    assert convert(src, tmp_path / "dst", *(more or CHOICES)) == 2
    assert not (tmp_path / "dst").exists()
    return one_line(capsys)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    torch.save(change(torch.load(path, weights_only=True)), path)


def test_converted_tensors() -> None:
    """Stored dtypes stay; rows of q and k turn from neighbouring pairs to half-split; the adapter's norms win."""
    plain = load_file(LORA.checkpoint / "model.safetensors")
    llama = torch.load(ORIGINAL / "LLaMA/7B/consolidated.00.pth", weights_only=True)
    adapter = torch.load(ORIGINAL / "LORA-BIAS-7B.pth", weights_only=True)["model"]
    attention = "decoder.layers.1.self_attn."
    assert plain[f"{attention}q_proj.weight"].dtype == torch.float16
    assert torch.equal(plain[f"{attention}q_proj.weight"], half_split(llama["layers.1.attention.wq.weight"], 6))
    assert torch.equal(plain[f"{attention}q_proj.bias"], half_split(adapter["llama.layers.1.attention.wq.bias"], 6))
    inner, outer = (adapter[f"llama.layers.1.attention.lora_wk_{part}.weight"] for part in ("l1", "l2"))
    assert torch.equal(plain[f"{attention}k_proj.lora_a"], inner)
    assert torch.equal(plain[f"{attention}k_proj.lora_b"], half_split(outer, 6))
    assert not plain[f"{attention}k_proj.bias"].any() and not plain[f"{attention}v_proj.bias"].any()
    assert torch.equal(plain["decoder.norm.weight"], adapter["llama.norm.weight"])
    assert "decoder.layers.0.self_attn.gate" not in plain
    conversion = json.loads((LORA.checkpoint / "conversion.json").read_text())
    assert {"llama.layers.0.attention.gate", "llama.layers.0.attention.new_gate", "logit_scale"} <= set(
        conversion["ignored"]
    )


def test_both_forms_of_clip_give_the_same(tmp_path: Path) -> None:
    assert convert(ORIGINAL, tmp_path / "plain", "--set", "adapter=BIAS-7B.pth", "clip=clip_plain/ViT-L-14.pt") == 0
    left, right = (load_file(folder / "model.safetensors") for folder in (BIAS.checkpoint, tmp_path / "plain"))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    ignored = json.loads((BIAS.checkpoint / "conversion.json").read_text())["ignored"]
    assert {"input_resolution", "context_length", "vocab_size", "rope.freqs"} <= set(ignored)


def test_several_files_to_choose_from(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    line = refused(original, tmp_path, capsys, "--set", "clip=clip/ViT-L-14.pt")
    assert f"{original}: 2 to choose from: BIAS-7B.pth, LORA-BIAS-7B.pth; add --set adapter=FILE" in line
    line = refused(original, tmp_path, capsys, "--set", "adapter=BIAS-7B.pth")
    assert "2 to choose from: clip/ViT-L-14.pt, clip_plain/ViT-L-14.pt; add --set clip=FILE" in line
    shutil.copytree(original / "LLaMA" / "7B", original / "LLaMA" / "13B")
    line = refused(original, tmp_path, capsys)
    assert "LLaMA/13B/params.json, LLaMA/7B/params.json; add --set llama=FILE" in line
    assert convert(original, tmp_path / "dst", *CHOICES, "llama=LLaMA/13B") == 0


def narrow_base(original: Path) -> None:
    """LLaMA of another width under the adapter."""
    path = original / "LLaMA" / "7B" / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dim": 24, "n_heads": 4, "multiple_of": 24}))
    edit(path.parent / "consolidated.00.pth", lambda state: {name: shrink(name, x) for name, x in state.items()})


def shrink(name: str, tensor: torch.Tensor) -> torch.Tensor:
    sizes = {48: 24, 144: 72}
    return tensor[tuple(slice(sizes.get(size, size)) for size in tensor.shape)].clone()


def without(prefix: str) -> Callable[[dict], dict]:
    def change(saved: dict) -> dict:
        kept = {name: tensor for name, tensor in saved["model"].items() if not name.startswith(prefix)}
        return saved | {"model": kept}

    return change


def archive(path: Path) -> None:
    module = torch.nn.Linear(2, 2)
    torch.jit.save(torch.jit.script(module), path)


MISTAKES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another base": (
        narrow_base,
        "BIAS-7B.pth: made for a LLaMA of width 48 and 3 layers, the base model has width 24",
    ),
    "another clip": (
        lambda folder: edit_clip(folder, lambda clip: clip | {"visual.proj": clip["visual.proj"][:, :32].clone()}),
        "ViT-L-14.pt: its features have width 32, BIAS-7B.pth was trained on 40; take the CLIP it was trained with",
    ),
    "no clip": (lambda folder: (folder / "clip" / "ViT-L-14.pt").unlink(), "clip/ViT-L-14.pt: missing; copy it there"),
    "no vision": (
        lambda folder: edit_clip(folder, lambda clip: {n: x for n, x in clip.items() if "conv1" not in n}),
        "no vision transformer of CLIP in it; expected OpenAI's ViT-L-14.pt",
    ),
    "no params": (lambda folder: (folder / "LLaMA/7B/params.json").unlink(), "no **/params.json in it"),
    "no tokenizer": (lambda folder: (folder / "LLaMA/tokenizer.model").unlink(), "no tokenizer.model in it or in"),
    "torchscript": (
        lambda folder: archive(folder / "BIAS-7B.pth"),
        "BIAS-7B.pth: a TorchScript archive where a state dict is expected",
    ),
    "code": (lambda folder: torch.save({"model": print}, folder / "BIAS-7B.pth"), "BIAS-7B.pth: contains code"),
    "not an adapter": (
        lambda folder: edit(folder / "BIAS-7B.pth", without("adapter_query")),
        "BIAS-7B.pth: no adapter_query.weight in it; expected an adapter of LLaMA-Adapter v2 multimodal",
    ),
    "a missing tensor": (
        lambda folder: edit(folder / "BIAS-7B.pth", without("llama.layers.1.attention.gate")),
        "1 missing (decoder.layers.1.self_attn.gate)",
    ),
    "an unexpected tensor": (
        lambda folder: edit(
            folder / "BIAS-7B.pth", lambda saved: saved | {"model": saved["model"] | {"audio_proj": torch.ones(1)}}
        ),
        "BIAS-7B.pth: 1 unexpected: audio_proj",
    ),
    "a strange layer": (
        lambda folder: edit(
            folder / "BIAS-7B.pth",
            lambda saved: saved | {"model": saved["model"] | {"llama.layers.1.attention.wz.bias": torch.ones(1)}},
        ),
        "unexpected llama.layers.*.attention.wz.bias",
    ),
    "switches": (
        lambda folder: edit(folder / "BIAS-7B.pth", lambda saved: saved | {"config": {"w_bias": True, "w_lora": True}}),
        "BIAS-7B.pth: config says w_lora=True, its tensors w_lora=False",
    ),
}


def edit_clip(folder: Path, change: Callable[[dict], Any]) -> None:
    """The plain form takes the archive's place."""
    shutil.copyfile(folder / "clip_plain" / "ViT-L-14.pt", folder / "clip" / "ViT-L-14.pt")
    edit(folder / "clip" / "ViT-L-14.pt", change)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake: str, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    spoil, words = MISTAKES[mistake]
    spoil(original)
    assert words in refused(original, tmp_path, capsys)


def test_visual_heads(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    line = refused(original, tmp_path, capsys, *CHOICES, "v_num_heads=5")
    assert "its blocks of width 32 do not divide into v_num_heads=5" in line
    assert convert(original, tmp_path / "dst", *CHOICES, "v_num_heads=8") == 0
    assert json.loads((tmp_path / "dst" / "config.json").read_text())["v_num_heads"] == 8
