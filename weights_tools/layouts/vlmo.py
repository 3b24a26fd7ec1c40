"""VLMo as microsoft/unilm publishes it: one .pt file, vocab.txt and, for VQA, answer2label.txt."""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch

from mmdist.config import UserError
from mmdist.models.vlmo import VlmoConfig
from mmdist.models.vlmo_processor import ANSWERS, VOCABULARY, VlmoProcessor
from mmdist.weights import rename
from weights_tools.layouts.source import Converted, Source, Tensors

SETTINGS = {
    "checkpoint": "the .pt file, where there are several",
    "num_heads": "attention heads, where the file does not tell (no relative position bias)",
}
TABLE, POSITIONS = "relative_position_bias_table", "transformer.pos_embed"

RENAMES = {
    "transformer.blocks.": "blocks.",
    "transformer.patch_embed.": "embeddings.image.",
    "transformer.cls_token": "embeddings.image.cls_token",
    "transformer.pos_embed": "embeddings.image.pos_embed",
    "transformer.norm.": "output.norm.",
    "text_embeddings.": "embeddings.text.",
    "token_type_embeddings.": "embeddings.token_type_embeddings.",
    "relative_position_bias_table": "position_bias.table",
    "pooler.dense.": "output.pooler.",
    "vqa_classifier.": "output.classifier.",
    "itc_text_proj.fc.": "output.text_proj.",
    "itc_image_proj.fc.": "output.image_proj.",
    "logit_scale": "output.logit_scale",
}
# Tables that are computed, and heads of the training tasks that come before VQA and retrieval.
UNUSED = [
    "text_embeddings.position_ids", "*relative_position_index", "mlm_score.*", "itm_score.*", "nlvr2_classifier.*",
    "itc_vl_*", "logit_vl_scale",
]  # fmt: skip
UNUSED_BY_HEAD = {
    "vqa": ["itc_*", "logit_scale"],
    "retrieval": ["pooler.*", "*.mlp_vl.*", "*.norm2_vl.*"],
}
# Width -> attention heads of the published variants: base, large, base plus.
HEADS = {768: 12, 1024: 16, 544: 16}
INITIAL_TEXT_LEN = 196  # max_text_len_of_initckpt in all of upstream's configs
TEXT_LEN = 40


def read(source: Source) -> Converted:
    tensors = source.tensors(source.choose("checkpoint", "*.pt", "*.ckpt"), "state_dict", "module", "model")
    config = find_config(tensors, source.number("num_heads"))
    names = [VOCABULARY, ANSWERS] if config["head"] == "vqa" else [VOCABULARY]
    files = {name: source.path(name) for name in names}
    VlmoProcessor(source.folder, VlmoConfig(**config))  # refuses words or answers of another model
    ignored = tensors.drop(*unused_patterns(config))
    return Converted(config, {rename(name, RENAMES): tensor for name, tensor in tensors.items()}, files, ignored)


def find_config(tensors: Tensors, num_heads: int | None) -> dict[str, Any]:
    head = find_head(tensors)
    hidden_size, _, patch_size, _ = find(tensors, "transformer.patch_embed.proj.weight").shape
    intermediate_size = len(find(tensors, "transformer.blocks.0.mlp_text.fc1.weight"))
    num_layers = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("transformer.blocks."))
    fused = [int(name.split(".")[2]) for name in tensors if ".mlp_vl.fc1.weight" in name]
    text_positions = tensors.get("text_embeddings.position_embeddings.weight")
    return {
        "model_type": "vlmo",
        "head": head,
        "num_answers": len(find(tensors, "vqa_classifier.3.weight")) if head == "vqa" else 0,
        "vocab_size": len(find(tensors, "text_embeddings.word_embeddings.weight")),
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": find_num_heads(tensors, hidden_size, num_layers, num_heads),
        "vlffn_start": min(fused, default=num_layers),
        "image_size": patch_size * find_window(tensors),
        "patch_size": patch_size,
        "max_text_len": TEXT_LEN if text_positions is None else len(text_positions),
        "max_text_len_of_initckpt": INITIAL_TEXT_LEN,
        "relative_position_bias": TABLE in tensors,
        "absolute_positions": POSITIONS in tensors,
        "layer_scale": "transformer.blocks.0.gamma_1" in tensors,
    }


def find(tensors: Tensors, name: str) -> torch.Tensor:
    if name not in tensors:
        raise UserError(f"{tensors.path}: no {name} in it; expected a VLMo checkpoint for VQA or retrieval")
    return tensors[name]


def find_head(tensors: Tensors) -> str:
    if "vqa_classifier.3.weight" in tensors:
        return "vqa"
    if "itc_text_proj.fc.weight" in tensors:
        return "retrieval"
    raise UserError(f"{tensors.path}: no vqa_classifier and no itc_text_proj in it; expected VLMo for VQA or retrieval")


def find_num_heads(tensors: Tensors, width: int, num_layers: int, given: int | None) -> int:
    """The table of relative positions has a column for each layer and head; without it, the published variants."""
    table = tensors.get(TABLE)
    if table is not None:
        told = table.shape[1] // num_layers
        if given not in (None, told):
            raise UserError(f"--set num_heads={given}: {tensors.path} has {told} heads in its {TABLE}")
        return told
    if given is None and width not in HEADS:
        raise UserError(f"{tensors.path}: its tensors do not tell the number of attention heads; add --set num_heads=N")
    num_heads = given or HEADS[width]
    if width % num_heads:
        raise UserError(f"--set num_heads={num_heads}: the width {width} does not divide by it")
    return num_heads


def find_window(tensors: Tensors) -> int:
    """Patches along a side of the picture."""
    table, positions = tensors.get(TABLE), tensors.get(POSITIONS)
    if positions is not None:
        patches = positions.shape[1] - 1
        window = isqrt(patches)
        fits = window**2 == patches
    elif table is not None:
        distances = len(table) - 2 * INITIAL_TEXT_LEN - 2 - 3
        window = (isqrt(max(distances, 0)) + 1) // 2
        fits = (2 * window - 1) ** 2 == distances
    else:
        raise UserError(f"{tensors.path}: neither {TABLE} nor {POSITIONS} in it")
    if not fits:
        raise UserError(f"{tensors.path}: the positions are not those of a square of patches")
    return window


def unused_patterns(config: dict[str, Any]) -> list[str]:
    patterns = UNUSED + UNUSED_BY_HEAD[config["head"]]
    if not config["absolute_positions"]:
        patterns = [*patterns, "text_embeddings.position_embeddings.weight"]
    if config["head"] == "vqa":  # behind vlffn_start one expert serves text and picture
        layers = range(config["vlffn_start"], config["num_hidden_layers"])
        names = ("norm2_text", "mlp_text", "norm2_imag", "mlp_imag")
        patterns = [*patterns, *(f"transformer.blocks.{layer}.{name}.*" for layer in layers for name in names)]
    return patterns
