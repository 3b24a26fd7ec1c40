"""Meta's own Llama files: dims, names, the order of rope's rows, model-parallel parts, and files that do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import GOLDEN
from safetensors.torch import load_file

from mmdist.config import UserError
from mmdist.models.family import find_model, load_model_config
from weights_tools.cli import main
from weights_tools.layouts.meta_llama import LAYER, OUTER, MetaLlama, half_split, intermediate_size, read_meta_llama
from weights_tools.layouts.source import Deferred, Source, Stored

HIDDEN, NUM_HEADS, HEAD_DIM = 48, 8, 6
# How model-parallel files cut each kind of tensor; the others are whole in each.
CUT_DIMS = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "tok_embeddings": 1, "output": 0}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """7B/{params.json, consolidated.00.pth}, and tokenizer.model above."""
    folder = tmp_path / "LLaMA"
    shutil.copytree(GOLDEN / "llama_adapter" / "checkpoint" / "LLaMA", folder, copy_function=shutil.copyfile)
    return folder / "7B"


def read(folder: Path) -> MetaLlama:
    return read_meta_llama(Source(folder, {}), folder, max_position_embeddings=2048)


def make(stored: Stored) -> torch.Tensor:
    return stored.make() if isinstance(stored, Deferred) else stored


def read_original(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "consolidated.00.pth", weights_only=True)


def set_params(folder: Path, **params: Any) -> None:
    path = folder / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | params))


def test_config_and_names(llama: Path):
    meta, state = read(llama), read_original(llama)
    config = transformers.LlamaConfig(**meta.text_config)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (400, HIDDEN, 144)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (3, 8, 8)
    assert (config.rms_norm_eps, config.max_position_embeddings, config.bos_token_id) == (1e-6, 2048, 1)
    assert config.rope_parameters["rope_theta"] == 10000
    assert meta.tokenizer == llama.parent / "tokenizer.model"
    with torch.device("meta"):
        reference = transformers.LlamaForCausalLM(config).state_dict()
    theirs = {name.replace("decoder.", "model."): tuple(stored.shape) for name, stored in meta.tensors.items()}
    assert theirs == {name: tuple(x.shape) for name, x in reference.items()}
    ours = {"mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "self_attn.o_proj": "attention.wo"}
    for name, stem in ours.items():
        assert torch.equal(make(meta.tensors[f"decoder.layers.2.{name}.weight"]), state[f"layers.2.{stem}.weight"])
    assert meta.tensors["decoder.norm.weight"].dtype == torch.float16


def turn_pairs(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Meta's rope: neighbouring numbers of a head are a complex one. x: (tokens, heads, head_dim)."""
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(turned).flatten(2)


def turn_halves(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Hugging Face's rope, which our decoder has."""
    first, second = x.chunk(2, -1)
    both = torch.cat([angles, angles], -1)[:, None]
    return x * both.cos() + torch.cat([-second, first], -1) * both.sin()


def test_scores_are_those_of_interleaved_rope():
    """Weights, biases and the second factor of a LoRA, turned both ways, give the same attention scores."""
    torch.manual_seed(0)
    x = torch.randn(7, HIDDEN, dtype=torch.float64)
    angles = torch.arange(7).double()[:, None] / 10000 ** (torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM)
    weights = [torch.randn(HIDDEN, HIDDEN).double() for _ in "qk"]
    biases = [torch.randn(HIDDEN).double() for _ in "qk"]
    down, up = torch.randn(4, HIDDEN).double(), torch.randn(HIDDEN, 4).double()

    def scores(turn: Callable, reorder: Callable) -> torch.Tensor:
        q, k = (x @ reorder(w).T + reorder(b) for w, b in zip(weights, biases, strict=True))
        q = q + x @ down.T @ reorder(up).T
        q, k = (turn(states.unflatten(-1, (NUM_HEADS, HEAD_DIM)), angles) for states in (q, k))
        return torch.einsum("qhd,khd->hqk", q, k)

    wanted = scores(turn_pairs, lambda rows: rows)
    torch.testing.assert_close(scores(turn_halves, lambda rows: half_split(rows, HEAD_DIM)), wanted)


@pytest.mark.parametrize("num_parts", [2, 4])
def test_model_parallel_files(llama: Path, num_parts: int):
    set_params(llama, n_kv_heads=4)
    state = read_original(llama)
    for name in [name for name in state if ".wk." in name or ".wv." in name]:
        state[name] = state[name][: 4 * HEAD_DIM].clone()
    torch.save(state, llama / "consolidated.00.pth")
    whole = {name: make(stored).clone() for name, stored in read(llama).tensors.items()}  # the file is written anew
    for part in range(num_parts):
        pieces = {name: x.clone() for name, x in state.items()}
        for name, x in state.items():
            dim = CUT_DIMS.get(name.split(".")[-2])
            if dim is not None:
                pieces[name] = x.chunk(num_parts, dim)[part].clone()
        torch.save(pieces, llama / f"consolidated.{part:02d}.pth")
    meta = read(llama)
    assert all(torch.equal(make(stored), whole[name]) for name, stored in meta.tensors.items())
    (llama / "consolidated.01.pth").unlink()
    expected = f"expected {', '.join(f'consolidated.{n:02d}.pth' for n in range(num_parts - 1))}, found consolidated.00"
    with pytest.raises(UserError, match="not all there" if num_parts == 2 else expected):
        read(llama)


def interleaved(rows: torch.Tensor) -> torch.Tensor:
    """Rows of q or k from half-split to neighbouring pairs."""
    return rows.view(-1, 2, HEAD_DIM // 2, HIDDEN).transpose(1, 2).reshape(rows.shape)


def write_as_meta(hub: Path) -> None:
    """Turn a Hugging Face Llama of 3 layers into Meta's files, in place."""
    state = {}
    stored = load_file(hub / "model.safetensors")
    for name, x in [(name, x) for name, x in stored.items() if "inv_freq" not in name]:
        for stem, (ours, _, _) in (OUTER | LAYER).items():
            name = name.replace(f"{ours.replace('decoder.', 'model.')}.weight", f"{stem}.weight")
        rotary = ".wq." in name or ".wk." in name
        state[name.removeprefix("model.")] = interleaved(x) if rotary else x.clone()
    torch.save(state | {"rope.freqs": torch.ones(HEAD_DIM // 2)}, hub / "consolidated.00.pth")
    dims = {"dim": HIDDEN, "n_layers": 3, "n_heads": NUM_HEADS, "norm_eps": 1e-5}
    params = dims | {"vocab_size": -1, "multiple_of": 104, "ffn_dim_multiplier": 0.8}
    (hub / "params.json").write_text(json.dumps(params))
    for path in (hub / "model.safetensors", hub / "config.json"):
        path.unlink()


def test_language_model_of_minigpt4_in_metas_files(tmp_path: Path):
    """The same plain folder as from the Hugging Face files."""
    src = tmp_path / "original"
    shutil.copytree(GOLDEN / "minigpt4_llama2" / "checkpoint", src, copy_function=shutil.copyfile)
    argv = ["convert", "minigpt4", "--src", str(src), "--dst"]
    assert main([*argv, str(tmp_path / "hub")]) == 0
    write_as_meta(src / "weights_language")
    assert main([*argv, str(tmp_path / "meta")]) == 0
    hub, meta = (load_file(tmp_path / name / "model.safetensors") for name in ("hub", "meta"))
    assert hub.keys() == meta.keys() and all(torch.equal(x, meta[name]) for name, x in hub.items())
    family = find_model("minigpt4")
    configs = [load_model_config(family, tmp_path / name).text_config.to_dict() for name in ("hub", "meta")]
    assert configs[0] | {"max_position_embeddings": 4096} == configs[1]  # Llama 2's; Meta's files do not say


def test_intermediate_sizes_of_the_published_models():
    for dim, size in {4096: 11008, 5120: 13824, 6656: 17920, 8192: 22016}.items():  # 7B, 13B, 30B, 65B
        assert intermediate_size({"dim": dim, "multiple_of": 256}) == size
    assert intermediate_size({"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}) == 28672  # Llama-2-70B


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "no params": (lambda f: (f / "params.json").unlink(), "params.json: missing"),
    "no dim": (lambda f: (f / "params.json").write_text('{"dim": 48}'), "no multiple_of, n_heads, n_layers, norm_eps"),
    "not json": (lambda f: (f / "params.json").write_text("{"), "params.json: not JSON"),
    "llama 3": (lambda f: set_params(f, use_scaled_rope=True), "unknown key use_scaled_rope; expected Llama 1 or 2"),
    "heads": (lambda f: set_params(f, n_heads=7), "dim 48 does not divide into 7 heads"),
    "a word": (lambda f: set_params(f, dim="48"), "dim is '48', expected a whole number above 0"),
    "no eps": (lambda f: set_params(f, norm_eps=None), "norm_eps is None, expected a number above 0"),
    "vocabulary": (lambda f: set_params(f, vocab_size=32000), "vocab_size 32000, but "),
    "feed-forward": (
        lambda f: set_params(f, multiple_of=256),
        r"layers.0.feed_forward.w1.weight is \[144, 48\], params.json and tokenizer.model ask for \[256, 48\]",
    ),
    "layers": (lambda f: set_params(f, n_layers=2), "9 unexpected: layers.2.attention.wk.weight, "),
    "more layers": (lambda f: set_params(f, n_layers=4), "no tensor layers.3.attention.wq.weight in it"),
    "no weights": (lambda f: (f / "consolidated.00.pth").unlink(), "expected consolidated.00.pth, found none"),
    "no tokenizer": (lambda f: (f.parent / "tokenizer.model").unlink(), "no tokenizer.model in it or in "),
    "bad tokenizer": (lambda f: (f / "tokenizer.model").write_bytes(b"{}"), "no sentencepiece model; copy it again"),
}


@pytest.mark.parametrize("what", WRONG)
def test_files_that_do_not_fit(llama: Path, what: str):
    spoil, words = WRONG[what]
    spoil(llama)
    with pytest.raises(UserError, match=words):
        read(llama)
