"""MiniGPT-4 as its authors publish it: weights_image/ (EVA, BLIP-2, BERT's config), weights_language/, weights_linear/.

Upstream loads these files loosely (strict=False); what it passes over on purpose is named here, anything else refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mmdist.config import UserError
from mmdist.models.minigpt4 import JOINED_PATCHES
from mmdist.models.minigpt4_processor import TOKENIZER, load_tokenizer
from mmdist.weights import rename
from weights_tools.layouts.meta_llama import is_meta_llama, read_meta_llama
from weights_tools.layouts.source import Converted, Deferred, Source, Stored, Tensors

SETTINGS = {
    "projection": "the file in weights_linear/, where there are several",
    "blip2": "the file with the Q-Former in weights_image/, where there are several",
    "num_heads": "attention heads of the Q-Former, where bert-base-uncased/config.json is missing",
    "num_vision_layers": "blocks of EVA to use; default: all, of 40 the first 39",
    "image_size": "pixels along a side; default: what EVA's positions were made for",
    "language": "any: a Llama other than the one the projection was trained with",
}
EVA, BERT, LANGUAGE = "weights_image/eva_vit_g.pth", "weights_image/bert-base-uncased/config.json", "weights_language"
EVA_HEAD_WIDTH = 88
EVA_FILE_LAYERS, EVA_LAYERS = 40, 39  # BLIP-2 leaves the last block out
EVA_UNUSED = ("norm.*", "fc_norm.*", "head.*")
POSITIONS = "pos_embed"

QFORMER_LAYER = "Qformer.bert.encoder.layer."
CROSS_ATTENTION_FREQUENCY = 2
# BLIP-2's own language side, and what the Q-Former has for text: embeddings, head, a feed-forward block in each layer.
BLIP2_UNUSED = (
    "t5_proj.*", "opt_proj.*", "Qformer.cls.*", "Qformer.bert.embeddings.position_ids",
    "Qformer.bert.embeddings.word_embeddings.*", "Qformer.bert.embeddings.position_embeddings.*",
)  # fmt: skip
LAYER_UNUSED = ("intermediate.dense.*", "output.dense.*", "output.LayerNorm.*")
QFORMER_NAMES = {
    "Qformer.bert.embeddings.LayerNorm.": "norm.",
    QFORMER_LAYER: "layers.",
    ".self.": ".",
    ".output.dense.": ".dense.",
    ".output.LayerNorm.": ".norm.",
    ".intermediate_query.dense.": ".mlp.fc1.",
    ".output_query.dense.": ".mlp.fc2.",
    ".output_query.LayerNorm.": ".norm.",
}

LANGUAGE_NAMES = {"model.": "decoder."}
LANGUAGE_UNUSED = "*.rotary_emb.inv_freq"  # a table that follows from the config
TEXT_KEYS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta",
    "rope_scaling", "attention_bias", "mlp_bias", "tie_word_embeddings",
)  # fmt: skip
PAD = "[PAD]"  # Vicuna v0 has it behind its tokenizer's pieces, no later Vicuna has
LLAMA_1_LENGTH, LLAMA_2_LENGTH = 2048, 4096  # tokens


@dataclass
class Part:
    """config: keys of MiniGPT4Config. tensors: by the plan's names."""

    config: dict[str, Any]
    tensors: dict[str, Stored]
    ignored: list[str]


@dataclass
class Language:
    text_config: dict[str, Any]
    tensors: Mapping[str, Stored]
    tokenizer: Path
    ignored: list[str]


def read(source: Source) -> Converted:
    eva = read_eva(source)
    projection = source.tensors(source.choose("projection", "weights_linear/*.pth"), "model")
    weight, bias = projection.take("llama_proj.weight"), projection.take("llama_proj.bias")
    projection.finish()
    has_qformer = weight.shape[1] != JOINED_PATCHES * eva.config["vision_width"]
    qformer = read_qformer(source) if has_qformer else Part({}, {}, [])
    check_width(projection.path, weight.shape[1], eva.config, qformer.config)
    language = read_language(source, LLAMA_1_LENGTH if has_qformer else LLAMA_2_LENGTH)
    check_language(source, projection.path, weight, language, has_qformer)
    return Converted(
        config={
            "model_type": "minigpt4",
            "has_qformer": has_qformer,
            **eva.config,
            **qformer.config,
            "text_config": language.text_config,
        },
        tensors={
            **eva.tensors,
            **qformer.tensors,
            "vision.llama_proj.weight": weight,
            "vision.llama_proj.bias": bias,
            **language.tensors,
        },
        files={TOKENIZER: language.tokenizer},
        ignored=[*eva.ignored, *qformer.ignored, *language.ignored],
    )


def read_eva(source: Source) -> Part:
    tensors = source.tensors(source.path(EVA))
    width, _, patch_size, _ = look_up(tensors, "patch_embed.proj.weight").shape
    in_file = count_layers(tensors, "blocks.")
    used = source.number("num_vision_layers", EVA_LAYERS if in_file == EVA_FILE_LAYERS else in_file)
    assert used is not None, "the default is a number"
    if used > in_file:
        raise UserError(f"--set num_vision_layers={used}: {tensors.path} has {in_file} blocks")
    if width % EVA_HEAD_WIDTH:
        raise UserError(f"{tensors.path}: width {width}, expected EVA's heads of {EVA_HEAD_WIDTH}; it is another tower")
    ignored = tensors.drop(*EVA_UNUSED, *(f"blocks.{layer}.*" for layer in range(used, in_file)))
    side = find_side(source, look_up(tensors, POSITIONS), patch_size)
    config = {
        "image_size": side * patch_size,
        "patch_size": patch_size,
        "vision_width": width,
        "vision_intermediate_size": len(look_up(tensors, "blocks.0.mlp.fc1.weight")),
        "vision_num_layers": used,
        "vision_num_heads": width // EVA_HEAD_WIDTH,
    }
    stored: dict[str, Stored] = {f"vision.tower.{name}": tensor for name, tensor in tensors.items()}
    stored[f"vision.tower.{POSITIONS}"] = resize_positions(tensors[POSITIONS], side)
    return Part(config, stored, ignored)


def look_up(tensors: Tensors, name: str) -> torch.Tensor:
    """A tensor that stays where it is."""
    tensor = tensors.take(name)
    tensors[name] = tensor
    return tensor


def count_layers(tensors: Tensors, prefix: str) -> int:
    numbers = {int(found[1]) for name in tensors if (found := re.match(re.escape(prefix) + r"(\d+)\.", name))}
    return max(numbers, default=-1) + 1


def find_side(source: Source, positions: torch.Tensor, patch_size: int) -> int:
    """Patches along a side of the picture."""
    image_size = source.number("image_size")
    if image_size is None:
        return isqrt(positions.shape[1] - 1)
    if image_size % patch_size:
        raise UserError(f"--set image_size={image_size}: expected a multiple of the patches' {patch_size} pixels")
    return image_size // patch_size


def resize_positions(positions: torch.Tensor, side: int) -> Stored:
    """(1, 1 + patches, width) -> for side * side patches, as upstream's interpolate_pos_embed."""
    if positions.shape[1] == 1 + side * side:
        return positions
    return Deferred(partial(interpolate, side=side), positions)


def interpolate(positions: torch.Tensor, side: int) -> torch.Tensor:
    old = isqrt(positions.shape[1] - 1)
    grid = positions[:, 1:].float().transpose(1, 2).unflatten(2, (old, old))
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat((positions[:, :1], grid.flatten(2).transpose(1, 2).to(positions)), dim=1)


def read_qformer(source: Source) -> Part:
    tensors = source.tensors(source.choose("blip2", "weights_image/blip2*.pth"), "model")
    num_layers = count_layers(tensors, QFORMER_LAYER)
    text_branch = [f"{QFORMER_LAYER}{layer}.{name}" for layer in range(num_layers) for name in LAYER_UNUSED]
    ignored = tensors.drop(*BLIP2_UNUSED, *text_branch)
    queries = look_up(tensors, "query_tokens")
    config = {
        "num_query_tokens": queries.shape[1],
        "qformer_width": queries.shape[2],
        "qformer_intermediate_size": len(look_up(tensors, f"{QFORMER_LAYER}0.intermediate_query.dense.weight")),
        "qformer_num_layers": num_layers,
        "cross_attention_frequency": CROSS_ATTENTION_FREQUENCY,
        **read_bert(source, queries.shape[2]),
    }
    return Part(config, {qformer_name(name): tensor for name, tensor in tensors.items()}, ignored)


def qformer_name(name: str) -> str:
    if name.startswith("ln_vision."):
        return f"vision.tower.{name}"
    for theirs, ours in QFORMER_NAMES.items():
        name = name.replace(theirs, ours)
    return f"vision.qformer.{name}"


def read_bert(source: Source, width: int) -> dict[str, Any]:
    """The Q-Former's number of heads and its norms' eps: what its tensors do not tell."""
    num_heads, eps = source.number("num_heads"), 1e-12
    if num_heads is None:
        path = source.path(BERT)
        bert = source.json(path)
        if bert.get("hidden_size") != width:
            raise UserError(
                f"{path}: hidden_size {bert.get('hidden_size')}, the Q-Former has {width}; one belongs to another model"
            )
        num_heads, eps = bert["num_attention_heads"], bert.get("layer_norm_eps", eps)
    if width % num_heads:
        raise UserError(
            f"{num_heads} attention heads do not divide the Q-Former's width {width}; check --set num_heads"
        )
    return {"qformer_num_heads": num_heads, "qformer_norm_eps": eps}


def read_language(source: Source, llama_length: int) -> Language:
    """A Hugging Face folder, or Meta's own files, which do not tell their length."""
    folder = source.path(LANGUAGE)
    if is_meta_llama(folder):
        llama = read_meta_llama(source, folder, max_position_embeddings=llama_length)
        return Language(llama.text_config, llama.tensors, llama.tokenizer, llama.ignored)
    path = source.path(f"{LANGUAGE}/config.json")
    stored = source.json(path)
    if stored.get("model_type") != "llama" or "vocab_size" not in stored:
        raise UserError(f"{path}: model_type {stored.get('model_type')}, expected the config of a llama")
    tokenizer = source.path(f"{LANGUAGE}/{TOKENIZER}")
    pieces = load_tokenizer(tokenizer, stored["vocab_size"])
    tensors = source.sharded(folder)
    ignored = tensors.drop(LANGUAGE_UNUSED)
    text_config = {key: stored[key] for key in TEXT_KEYS if key in stored}
    text_config |= {"bos_token_id": pieces.bos_id(), "eos_token_id": pieces.eos_id()}
    renamed = {rename(name, LANGUAGE_NAMES): tensor for name, tensor in tensors.items()}
    return Language(text_config, renamed, tokenizer, ignored)


def check_width(path: Path, width: int, eva: dict[str, Any], qformer: dict[str, Any]) -> None:
    if qformer and qformer["qformer_width"] != width:
        raise UserError(
            f"{path}: takes {width} numbers, expected the Q-Former's {qformer['qformer_width']} or, without one, "
            f"{JOINED_PATCHES} patches of {eva['vision_width']}; the files are of different models"
        )
    patches = (eva["image_size"] // eva["patch_size"]) ** 2
    if not qformer and patches % JOINED_PATCHES:
        raise UserError(f"{patches} patches cannot be joined by {JOINED_PATCHES}; choose another --set image_size")


def check_language(source: Source, path: Path, weight: torch.Tensor, language: Language, has_qformer: bool) -> None:
    """Is it the Llama that the projection was trained with, as far as files can tell?"""
    hidden_size = language.text_config.get("hidden_size")
    if len(weight) != hidden_size:
        raise UserError(
            f"{path}: projects to {len(weight)} numbers, {LANGUAGE} has a hidden_size of {hidden_size}; "
            "it was trained with another language model"
        )
    choice = source.settings.get("language")
    if choice not in (None, "any"):
        raise UserError(f"--set language={choice}: expected any")
    if choice is None and is_vicuna_v0(language) != has_qformer:
        wanted, found = ("Vicuna v0, which has", "has not") if has_qformer else ("Llama 2, which has not", "has")
        raise UserError(
            f"{path}: trained with {wanted} {PAD} behind its tokenizer's pieces; the model in {LANGUAGE} {found}; "
            "take the right one, or add --set language=any"
        )


def is_vicuna_v0(language: Language) -> bool:
    vocab_size = language.text_config["vocab_size"]
    return vocab_size == 1 + load_tokenizer(language.tokenizer, vocab_size).vocab_size()
