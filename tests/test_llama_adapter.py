"""LLaMA-Adapter: the picture's way to the layers, conversion and its refusals, split folders, prompts and chats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, GOLDEN, Case, answers, config_for, run_engine
from PIL import Image
from safetensors.torch import load_file
from split_cases import one_line

from mmdist.config import Config, EngineConfig, ModelConfig, SamplingParams, UserError
from mmdist.engine.engine import Engine
from mmdist.engine.load import load_engine
from mmdist.models.llama_adapter_processor import alpaca_prompt, clip_pixels
from mmdist.models.original import MEAN, STD
from mmdist.tasks import chat
from mmdist.tasks.media import load_image
from mmdist.tasks.requests import build_request
from mmdist.tp import TP
from weights_tools.cli import main
from weights_tools.layouts.meta_llama import half_split

ORIGINAL = GOLDEN / "llama_adapter" / "checkpoint"
BIAS, LORA = Case("llama_adapter_bias"), Case("llama_adapter_lora")
TOLERANCE = 1e-4
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


def engine_config(folder: Path, **engine: int) -> Config:
    settings = EngineConfig(**{"max_model_len": 512, "max_num_seqs": 3, **engine})
    return Config(checkpoint=str(folder), model=ModelConfig(name="llama_adapter"), dtype="float32", engine=settings)


@pytest.mark.parametrize("case", (BIAS, LORA), ids=("bias", "lora"))
def test_picture_to_prompts(case: Case) -> None:
    """Pixels, CLIP's features and the rows the layers look at."""
    reference = case.reference()
    engine = load_engine(config_for(case), TP(), CPU)
    vision: Any = engine.runner.model.vision
    for item_id in case.items:
        of_bias = item_id.replace("lora/", "bias/")  # the same for both, stored once
        pixels = case.request(engine, item_id).prompt.vision["pixel_values"]
        assert np.abs(pixels.numpy() - reference[f"{of_bias}/pixel_values"]).max() <= 1e-6
        features = vision.clip_features(pixels)
        assert np.abs(features.numpy() - reference[f"{of_bias}/clip_feats"]).max() <= TOLERANCE
        assert np.abs(vision.ask(features).numpy() - reference[f"{item_id}/visual_query"]).max() <= TOLERANCE


def test_clip_pixels_round_as_torchvision() -> None:
    """An odd number of left-over pixels: half of 5 is cut at 2, half of 7 at 4 (halves go to the even number)."""
    for width, left in ((75, 2), (77, 4)):
        columns = np.tile(np.arange(width, dtype=np.uint8)[None, :, None], (70, 1, 3))
        red = clip_pixels(Image.fromarray(columns), 70)[0, 0, 0] * STD[0] + MEAN[0]
        assert [round(float(value) * 255) for value in red[:2]] == [left, left + 1]


@pytest.mark.parametrize("size", (2, 8))
def test_split_verify_and_load_split(size: int, tmp_path: Path) -> None:
    dst = tmp_path / "split"
    assert main(["split", str(LORA.checkpoint), "--ranks", str(size), "--dst", str(dst)]) == 0
    assert main(["verify", str(dst)]) == 0
    reference = LORA.reference()

    def work(engine: Engine) -> Any:
        return answers(engine, [LORA.request(engine, i, max_new_tokens=12, ignore_eos=True) for i in LORA.items])

    for item_id, output in run_engine(size, engine_config(dst), work).items():
        assert output.token_ids == reference[f"{item_id}/greedy_ids"].tolist()


def test_chunked_prefill_and_waiting_keep_the_picture() -> None:
    """Prompts computed in pieces, one picture remembered at a time, cache blocks for one request."""
    reference = BIAS.reference()

    def work(engine: Engine) -> Any:
        return answers(engine, [BIAS.request(engine, i, max_new_tokens=12, ignore_eos=True) for i in BIAS.items])

    for settings in ({"max_num_batched_tokens": 50}, {"max_pictures": 1}, {"num_blocks": 16, "block_size": 16}):
        config = engine_config(BIAS.checkpoint, **({"max_model_len": 256} | settings))
        for item_id, output in run_engine(2, config, work).items():
            assert output.token_ids == reference[f"{item_id}/greedy_ids"].tolist(), settings


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
    assert {"input_resolution", "context_length", "vocab_size"} <= set(ignored)


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


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load_engine(engine_config(BIAS.checkpoint), TP(), CPU)


def build(engine: Engine, **entry: Any) -> Any:
    return build_request({"id": "a", **entry}, engine.prompts, SamplingParams(), GOLDEN / "llama_adapter" / "inputs")


def say(*texts: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}, *({"type": "text", "text": text} for text in texts)]}


def test_raw_prompt(engine: Engine) -> None:
    """As it stands, with the begin-of-sequence token; there is no placeholder to write."""
    item = json.loads((GOLDEN / "llama_adapter" / "golden.json").read_text())["items"]["bias/column"]
    request = build(engine, prompt=item["prompt"], images=["column.png"])
    assert request.prompt.token_ids == item["input_ids"]


def test_requests_that_are_refused(engine: Engine) -> None:
    pictures = {"images": ["column.png"]}
    for count in (0, 2):
        with pytest.raises(UserError, match=f"exactly one picture, {count} are given"):
            build(engine, prompt="What is this?", images=["column.png"] * count)
    turns = [say("What?"), {"role": "assistant", "content": "A door."}, {"role": "user", "content": "Sure?"}]
    with pytest.raises(UserError, match="no conversation: give one message of a user; found user, assistant, user"):
        build(engine, messages=turns, **pictures)
    with pytest.raises(UserError, match="found system, user"):
        build(engine, messages=[{"role": "system", "content": "Be brief."}, say("What?")], **pictures)
    with pytest.raises(UserError, match="3 texts in the message; the first is the instruction, a second one its input"):
        build(engine, messages=[say("What?", "This", "That")], **pictures)


def test_braces_in_a_question_are_kept() -> None:
    text = alpaca_prompt([say("What is {input}?", "{instruction}")])
    assert "### Instruction:\nWhat is {input}?\n\n### Input:\n{instruction}\n\n### Response:" in text


def test_chat_asks_each_question_by_itself(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = chat.Conversation(engine, SamplingParams(max_new_tokens=2, ignore_eos=True), 8)
    prompts: list[dict] = []
    ask = type(engine.prompts).prompt
    monkeypatch.setattr(type(engine.prompts), "prompt", lambda self, **k: prompts.append(k) or ask(self, **k))
    inputs = GOLDEN / "llama_adapter" / "inputs"
    for line in (
        f"/image {inputs / 'column.png'}",
        "What is it?",
        "Sure?",
        f"/image {inputs / 'postcard.png'}",
        "And?",
    ):
        assert chat.obey(line, conversation)
    assert [len(prompt["messages"]) for prompt in prompts] == [1, 1, 1]
    assert [prompt["images"][0].size for prompt in prompts[1:]] == [
        load_image(inputs / name).size for name in ("column.png", "postcard.png")
    ]


def test_folder_problems(tmp_path: Path) -> None:
    folder = shutil.copytree(BIAS.checkpoint, tmp_path / "folder")
    options = engine_config(folder)
    options.model = ModelConfig(name="llama_adapter", chat_template="mine.jinja")
    with pytest.raises(UserError, match=r"model\.chat_template: LLaMA-Adapter has one prompt"):
        load_engine(options, TP(), CPU)
    (folder / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="truncated, or no sentencepiece model"):
        load_engine(engine_config(folder), TP(), CPU)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.model: no such file"):
        load_engine(engine_config(folder), TP(), CPU)
