"""Write the small LLaMA-Adapter as its authors publish theirs: Meta's LLaMA, an adapter file and OpenAI's CLIP."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import model_llama_adapter as m
from decoder_rows import stored_tensors
from mmdist.models.llama_adapter import LlamaAdapter
from weights_tools.layouts.llama_adapter import CLIP_LAYER_NAMES, CLIP_NAMES
from weights_tools.layouts.meta_llama import LAYER, OUTER, ROTARY

HEAD_DIM = m.PARAMS["dim"] // m.PARAMS["n_heads"]
TUNED_BIASES = ("attention.wq", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
NORMS = ("attention_norm", "ffn_norm")
CLIP_NUMBERS = {"input_resolution": m.FORM.tile, "context_length": 77, "vocab_size": 49408}
Tensors = dict[str, torch.Tensor]


def save_checkpoint(model: LlamaAdapter, folder: Path) -> None:
    """float16 throughout."""
    tensors = {name: value.half().clone() for name, value in stored_tensors(model).items()}
    llama = folder / "LLaMA"
    for path in (llama / "7B", folder / "clip"):
        path.mkdir(parents=True, exist_ok=True)
    (llama / "tokenizer.model").write_bytes(m.TOKENIZER)
    (llama / "7B" / "params.json").write_text(json.dumps(m.PARAMS))
    torch.save(llama_tensors(tensors), llama / "7B" / "consolidated.00.pth")
    config = {"w_bias": True, "w_lora": False, "lora_rank": 16}
    torch.save({"model": adapter_tensors(tensors, model), "config": config}, folder / "BIAS-7B.pth")
    save_archive(clip_tensors(tensors), folder / "clip" / "ViT-L-14.pt")
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)


def interleave(rows: torch.Tensor) -> torch.Tensor:
    """Rows of q or k from half-split pairs to neighbouring ones: undoes meta_llama.half_split."""
    halves = rows.view(-1, 2, HEAD_DIM // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def llama_tensors(tensors: Tensors) -> Tensors:
    found = {f"{meta}.weight": tensors[f"{ours}.weight"] for meta, (ours, _, _) in OUTER.items()}
    for layer in range(m.PARAMS["n_layers"]):
        for meta, (ours, _, _) in LAYER.items():
            value = tensors[f"decoder.layers.{layer}.{ours}.weight"]
            found[f"layers.{layer}.{meta}.weight"] = interleave(value) if meta in ROTARY else value
    frequencies = 10000.0 ** -(torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
    return found | {"rope.freqs": frequencies.half()}


def adapter_tensors(tensors: Tensors, model: LlamaAdapter) -> Tensors:
    """What LLaMA-Adapter trains, LLaMA's norms among it."""
    visual = ("vision.clip_proj", "vision.visual_")
    found = {name.removeprefix("vision."): value for name, value in tensors.items() if name.startswith(visual)}
    queries = [tensors[f"decoder.layers.{layer}.self_attn.adapter_query"] for layer in model.adapters]
    found["adapter_query.weight"] = torch.cat(queries)
    found["llama.norm.weight"] = tensors["decoder.norm.weight"]
    for layer in range(m.PARAMS["n_layers"]):
        ours, theirs = f"decoder.layers.{layer}.", f"llama.layers.{layer}."
        unused = torch.zeros(1, m.PARAMS["n_heads"], 1, 1).half()  # of a layer that does not look at the picture
        found[f"{theirs}attention.gate"] = tensors.get(f"{ours}self_attn.gate", unused)
        for meta in NORMS:
            found[f"{theirs}{meta}.weight"] = tensors[f"{ours}{LAYER[meta][0]}.weight"]
        for meta in TUNED_BIASES:
            value = tensors[f"{ours}{LAYER[meta][0]}.bias"]
            found[f"{theirs}{meta}.bias"] = interleave(value) if meta in ROTARY else value
    return found


def clip_tensors(tensors: Tensors) -> Tensors:
    """The vision tower under OpenAI's names, q, k and v in one."""
    prefix = "vision.tower.model."
    found = {"visual.proj": tensors["vision.projection.weight"].T.contiguous()}
    for theirs, ours in CLIP_NAMES.items():
        for name in [name for name in tensors if name.startswith(prefix + ours)]:
            found[theirs + name.removeprefix(prefix + ours)] = tensors[name]
    for layer in range(m.CLIP["num_hidden_layers"]):
        block, old = f"visual.transformer.resblocks.{layer}.", f"{prefix}encoder.layers.{layer}."
        for leaf in ("weight", "bias"):
            parts = [tensors[f"{old}self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            found[f"{block}attn.in_proj_{leaf}"] = torch.cat(parts)
            for theirs, ours in CLIP_LAYER_NAMES.items():
                found[f"{block}{theirs}{leaf}"] = tensors[f"{old}{ours}{leaf}"]
    return found


class Archive(nn.Module):
    """Tensors by their dotted names, so that a TorchScript archive of it has OpenAI's state dict."""

    def __init__(self, tensors: Tensors):
        super().__init__()
        for name, value in tensors.items():
            *modules, leaf = name.split(".")
            module: Any = self
            for word in modules:
                if word not in module._modules:
                    module.add_module(word, nn.Module())
                module = module._modules[word]
            module.register_buffer(leaf, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def save_archive(tensors: Tensors, path: Path) -> None:
    numbers = {name: torch.tensor(value) for name, value in CLIP_NUMBERS.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and OpenAI's CLIP is distributed no other way
        torch.jit.script(Archive(tensors | numbers)).save(path)
