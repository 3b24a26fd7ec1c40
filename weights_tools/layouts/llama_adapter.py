"""LLaMA-Adapter v2 multimodal as its authors publish it: Meta's LLaMA, an adapter file and OpenAI's CLIP.

LLaMA/7B/{params.json, consolidated.00.pth}, LLaMA/tokenizer.model, BIAS-7B.pth or the like, and ViT-L-14.pt (OpenAI's
TorchScript archive or a plain state dict) anywhere below the folder.
Source: OpenGVLab/LLaMA-Adapter, llama_adapter_v2_multimodal7b/llama/{llama,llama_adapter}.py; openai/CLIP, model.py.
"""

from __future__ import annotations

import re
from math import isqrt
from pathlib import Path
from typing import Any

import torch

from mmdist.config import UserError
from mmdist.models.llama_adapter_processor import TOKENIZER
from weights_tools.layouts.meta_llama import LAYER, ROTARY, half_split, read_meta_llama
from weights_tools.layouts.source import Converted, Source, Tensors

SETTINGS = {
    "adapter": "the adapter's .pth file, where there are several",
    "clip": "CLIP's .pt file, where there are several",
    "llama": "the folder of the base model's params.json, where there are several",
    "v_num_heads": "attention heads of the blocks that read CLIP's tokens (the published code has 16)",
}
MAX_POSITIONS = 2048  # the first LLaMA's
V_NUM_HEADS = 16
CLIP_HEAD_DIM = 64
# The text tower, and numbers that OpenAI's archive keeps beside the weights.
CLIP_UNUSED = (
    "positional_embedding", "text_projection", "logit_scale", "transformer.*", "token_embedding.*", "ln_final.*",
    "input_resolution", "context_length", "vocab_size",
)  # fmt: skip
CLIP_NAMES = {
    "visual.class_embedding": "embeddings.class_embedding",
    "visual.positional_embedding": "embeddings.position_embedding.weight",
    "visual.conv1.weight": "embeddings.patch_embedding.weight",
    "visual.ln_pre.": "pre_layrnorm.",
    "visual.ln_post.": "post_layernorm.",
}
CLIP_LAYER_NAMES = {
    "attn.out_proj.": "self_attn.out_proj.",
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
LORA_PARTS = {"l1": "lora_a", "l2": "lora_b"}


def read(source: Source) -> Converted:
    adapter_path, clip_path = source.choose("adapter", "*.pth"), source.choose("clip", "**/*.pt")
    adapter = source.tensors(adapter_path, "model")
    clip = source.tensors(clip_path, "state_dict", allow_torchscript=True)
    llama = read_meta_llama(source, find_llama(source), max_position_embeddings=MAX_POSITIONS)
    text_config = llama.text_config | {"attention_bias": has_bias(adapter), "mlp_bias": has_bias(adapter)}
    check_base(adapter, text_config)
    ignored = clip.drop(*CLIP_UNUSED)
    vision_config, vision = read_clip(clip)
    check_clip(adapter, clip, vision_config)
    config = {
        "model_type": "llama_adapter",
        "text_config": text_config,
        "vision_config": vision_config,
        **visual_sizes(adapter, source.number("v_num_heads", V_NUM_HEADS)),
        "lora_rank": find_lora_rank(adapter),
    }
    check_switches(adapter, config)
    ignored += drop_unused_gates(adapter, config)
    tensors = {**llama.tensors, **vision, **visual_tensors(adapter), **adapter_tensors(adapter, config)}
    adapter.finish()
    return Converted(config, tensors, {TOKENIZER: llama.tokenizer}, [*llama.ignored, *ignored])


def find_llama(source: Source) -> Path:
    path = source.choose("llama", "**/params.json")
    return path if path.is_dir() else path.parent


def has_bias(adapter: Tensors) -> bool:
    return "llama.layers.0.attention.wq.bias" in adapter


def find_lora_rank(adapter: Tensors) -> int | None:
    inner = adapter.get("llama.layers.0.attention.lora_wq_l1.weight")
    return None if inner is None else len(inner)


def find(adapter: Tensors, name: str) -> torch.Tensor:
    if name not in adapter:
        raise UserError(f"{adapter.path}: no {name} in it; expected an adapter of LLaMA-Adapter v2 multimodal")
    return adapter[name]


def check_base(adapter: Tensors, text_config: dict[str, Any]) -> None:
    """Refuse another base model than the adapter's."""
    layers = [int(found[1]) for name in adapter if (found := re.match(r"llama\.layers\.(\d+)\.", name))]
    made_for = (find(adapter, "adapter_query.weight").shape[1], 1 + max(layers, default=-1))
    base = (text_config["hidden_size"], text_config["num_hidden_layers"])
    if made_for != base:
        raise UserError(
            f"{adapter.path}: made for a LLaMA of width {made_for[0]} and {made_for[1]} layers, the base model has "
            f"width {base[0]} and {base[1]} layers; take the adapter of this base model"
        )
    if text_config["num_key_value_heads"] != text_config["num_attention_heads"]:
        raise UserError(f"{adapter.path}: its base model has as many KV heads as heads; this one has fewer")


def check_clip(adapter: Tensors, clip: Tensors, vision_config: dict[str, Any]) -> None:
    wanted, found = find(adapter, "clip_proj.weight").shape[1], vision_config["projection_dim"]
    if wanted != found:
        raise UserError(
            f"{clip.path}: its features have width {found}, {adapter.path.name} was trained on {wanted}; "
            "take the CLIP it was trained with (ViT-L/14 for the published ones)"
        )


def check_switches(adapter: Tensors, config: dict[str, Any]) -> None:
    """The adapter file says itself what is in it; refuse one whose tensors say otherwise."""
    switches = adapter.beside.pop("config", {})
    if not isinstance(switches, dict):
        raise UserError(
            f"{adapter.path}: config is a {type(switches).__name__}, expected names and values; copy it again"
        )
    found = {"w_bias": config["text_config"]["attention_bias"], "w_lora": config["lora_rank"] is not None}
    if config["lora_rank"] is not None:
        found["lora_rank"] = config["lora_rank"]
    for name, value in found.items():
        if switches.get(name, value) != value:
            raise UserError(
                f"{adapter.path}: config says {name}={switches[name]}, its tensors {name}={value}; the file is damaged"
            )


def visual_sizes(adapter: Tensors, v_num_heads: int | None) -> dict[str, Any]:
    query_len, width = find(adapter, "visual_query.weight").shape
    prompts = len(find(adapter, "adapter_query.weight"))
    if prompts % query_len:
        raise UserError(f"{adapter.path}: {prompts} adapter queries are not whole layers of {query_len}")
    if v_num_heads is None or width % v_num_heads:
        raise UserError(f"{adapter.path}: its blocks of width {width} do not divide into v_num_heads={v_num_heads}")
    blocks = {name.split(".")[1] for name in adapter if name.startswith("visual_blocks.")}
    return {
        "query_len": query_len,
        "query_layer": prompts // query_len,
        "v_embed_dim": width,
        "v_intermediate_size": len(find(adapter, "visual_blocks.0.mlp.fc1.weight")),
        "v_depth": len(blocks),
        "v_num_heads": v_num_heads,
    }


def drop_unused_gates(adapter: Tensors, config: dict[str, Any]) -> list[str]:
    """Layers that do not look at the picture have gates all the same."""
    first = config["text_config"]["num_hidden_layers"] - config["query_layer"]
    return [name for layer in range(first) for name in adapter.drop(f"llama.layers.{layer}.attention.*gate")]


def visual_tensors(adapter: Tensors) -> dict[str, torch.Tensor]:
    names = [name for name in adapter if name.startswith(("clip_proj", "visual_"))]
    return {f"vision.{name}": adapter.take(name) for name in names}


def adapter_tensors(adapter: Tensors, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What the adapter adds to LLaMA's layers, norms that take the place of LLaMA's among it."""
    text_config = config["text_config"]
    head_dim = text_config["hidden_size"] // text_config["num_attention_heads"]
    tensors = {"decoder.norm.weight": adapter.take("llama.norm.weight")}
    queries = adapter.take("adapter_query.weight").split(config["query_len"])
    for number, query in enumerate(queries, text_config["num_hidden_layers"] - config["query_layer"]):
        tensors[f"decoder.layers.{number}.self_attn.adapter_query"] = query
    for name in [name for name in adapter if name.startswith("llama.layers.")]:
        _, _, layer, rest = name.split(".", 3)
        ours, is_rotary = layer_name(rest, adapter)
        value = adapter.take(name)
        tensors[f"decoder.layers.{layer}.{ours}"] = half_split(value, head_dim) if is_rotary else value
    if text_config["attention_bias"]:  # LLaMA-Adapter tunes biases of q, not of k and v
        for name in [name for name in tensors if name.endswith("q_proj.bias")]:
            for other in "kv":
                tensors[name.replace("q_proj", f"{other}_proj")] = torch.zeros_like(tensors[name])
    return tensors


def layer_name(name: str, adapter: Tensors) -> tuple[str, bool]:
    """attention.lora_wq_l2.weight -> self_attn.q_proj.lora_b, and True where the rows are those of rotated heads."""
    block, *leaf = name.split(".")
    if name in ("attention.gate", "attention.new_gate"):
        return f"self_attn.{leaf[0]}", False
    lora = re.fullmatch(r"lora_(w\w)_(l1|l2)", leaf[0]) if leaf else None
    stem = f"{block}.{lora[1]}" if lora else name.rpartition(".")[0]
    if stem not in LAYER:
        raise UserError(f"{adapter.path}: unexpected llama.layers.*.{name}; the file is of another model")
    if lora:
        return f"{LAYER[stem][0]}.{LORA_PARTS[lora[2]]}", stem in ROTARY and lora[2] == "l2"
    return f"{LAYER[stem][0]}.{leaf[-1]}", stem in ROTARY


def read_clip(clip: Tensors) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """OpenAI's names as transformers': config and tensors; q, k and v are stored apart there."""
    projection = clip.take("visual.proj")
    tensors = {"vision.projection.weight": projection.T.contiguous()}
    for name in list(clip):
        for ours, value in clip_tensors(name, clip.pop(name)):
            tensors[f"vision.tower.model.{ours}"] = value
    return clip_config(tensors, clip.path) | {"projection_dim": projection.shape[1]}, tensors


def clip_tensors(name: str, value: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    found = re.fullmatch(r"visual\.transformer\.resblocks\.(\d+)\.(.*)", name)
    if found is None:
        prefix = next((prefix for prefix in CLIP_NAMES if name.startswith(prefix)), None)
        return [(name if prefix is None else CLIP_NAMES[prefix] + name.removeprefix(prefix), value)]
    layer, rest = f"encoder.layers.{found[1]}.", found[2]
    if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
        leaf = rest.removeprefix("attn.in_proj_")
        return [
            (f"{layer}self_attn.{part}_proj.{leaf}", rows) for part, rows in zip("qkv", value.chunk(3), strict=True)
        ]
    prefix = next((prefix for prefix in CLIP_LAYER_NAMES if rest.startswith(prefix)), rest)
    return [(layer + CLIP_LAYER_NAMES.get(prefix, rest) + rest.removeprefix(prefix), value)]


def clip_config(tensors: dict[str, torch.Tensor], path: Path) -> dict[str, Any]:
    names = (
        "embeddings.patch_embedding.weight",
        "embeddings.position_embedding.weight",
        "encoder.layers.0.mlp.fc1.weight",
    )
    for name in names:
        if f"vision.tower.model.{name}" not in tensors:
            raise UserError(f"{path}: no vision transformer of CLIP in it; expected OpenAI's ViT-L-14.pt")
    patch, positions, inner = (tensors[f"vision.tower.model.{name}"].shape for name in names)
    if patch[0] % CLIP_HEAD_DIM:
        raise UserError(f"{path}: its width {patch[0]} is not whole heads of {CLIP_HEAD_DIM}; expected OpenAI's CLIP")
    layers = {name.split(".")[5] for name in tensors if ".encoder.layers." in name}
    return {
        "model_type": "clip_vision_model",
        "hidden_size": patch[0],
        "intermediate_size": inner[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": patch[0] // CLIP_HEAD_DIM,
        "image_size": patch[-1] * isqrt(positions[0] - 1),
        "patch_size": patch[-1],
        "hidden_act": "quick_gelu",
    }
