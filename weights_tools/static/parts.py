"""Which file each tensor of the checkpoint goes to, and the networks that are made of each file's weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmdist.config import UserError
from mmdist.kernels.kernels import PLAIN
from mmdist.models.mllama import Mllama
from mmdist.models.mllama_vision import PATCH_MULTIPLE
from weights_tools.static import heads
from weights_tools.static.blocks import StaticShape, cross_block, cross_block_cached, self_block
from weights_tools.static.graph import Graph, WeightFile
from weights_tools.static.vision import Tower

VISION, EMBEDDING, LM_HEAD = "vision_transformer", "embedding", "lm_head"
LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
# A product takes W^T as it lies, and nothing is left for a compiler to fold into constants.
TRANSPOSED = re.compile(r"(_proj|fc1|fc2|lm_head|projector)\.weight")
SQUASHED = re.compile(r"(cross_attn_(attn|mlp)_)?gate|gate_(attn|ffn)")


@dataclass(frozen=True)
class Place:
    """Where a tensor of the checkpoint goes: a part, and its name in that part's graphs."""

    part: str
    local: str


def find_place(name: str) -> Place:
    """From our name of a tensor."""
    layer = LAYER.match(name)
    if layer is not None:
        return Place(f"block_{layer[1]}", name[layer.end() :])
    if name.startswith("vision."):
        return Place(VISION, name.removeprefix("vision.").removeprefix("tower.model."))
    if name.startswith("decoder.embed_tokens."):
        return Place(EMBEDDING, name.removeprefix("decoder."))
    return Place(LM_HEAD, name)


def changed(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A stored tensor as the files have it."""
    tensor, leaf = tensor.float(), find_place(name).local
    if TRANSPOSED.search(leaf):
        return tensor.t()
    return tensor.tanh() if SQUASHED.fullmatch(leaf.rpartition(".")[2]) else tensor


def changed_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[::-1] if TRANSPOSED.search(find_place(name).local) else shape


def weight_files(stored: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, WeightFile]:
    """Part -> its file. stored: our name -> the checkpoint's, which the file keeps."""
    files: dict[str, WeightFile] = {}
    for name in stored:
        place = find_place(name)
        file = files.setdefault(place.part, WeightFile(f"{place.part}.safetensors"))
        file.layout.append((stored[name], "F32", changed_shape(name, shapes[name])))
        file.names[place.local] = stored[name]
    return files


def static_shape(model: Mllama, seq_length: int) -> StaticShape:
    decoder, vision = model.decoder.shape, model.config.vision_config
    if seq_length > decoder.max_model_len:
        raise UserError(f"--seq-length {seq_length}: this checkpoint was trained for {decoder.max_model_len} at most")
    for what, found, known in (("text", decoder.activation, "silu"), ("vision", vision.hidden_act, "gelu")):
        if found != known:
            raise UserError(f"{what}_config.hidden_act={found} in config.json: static files are written for {known}")
    return StaticShape(
        seq_length=seq_length,
        hidden_size=decoder.hidden_size,
        num_heads=decoder.num_heads,
        num_kv_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        vocab_size=decoder.vocab_size,
        eps=decoder.rms_norm_eps,
        num_tiles=vision.max_num_tiles,
        num_patches=model.vision.num_patches,
    )


def build_graphs(model: Mllama, s: StaticShape, files: Mapping[str, WeightFile]) -> dict[str, dict[str, Graph]]:
    """Part -> name of an ONNX file -> what is in it. The samplers have no weights and stand beside the head."""
    rope = rope_tables(model, s.seq_length)
    graphs: dict[str, dict[str, Graph]] = {VISION: {VISION: build_tower(model, s, files[VISION])}}
    graphs[EMBEDDING] = {
        name: heads.embedding(name, s, files[EMBEDDING], rows)
        for name, rows in (("embedding", s.seq_length), ("embedding_cache", 1))
    }
    for number in range(model.num_layers):
        whole, cached = f"block_{number}", f"block_cache_{number}"
        weights = files[whole]
        if number in model.cross_layers:
            made = cross_block(whole, s, weights), cross_block_cached(cached, s, weights)
        else:
            made = (
                self_block(whole, s, weights, rope, cached=False),
                self_block(cached, s, weights, rope, cached=True),
            )
        graphs[whole] = dict(zip((whole, cached), made, strict=True))
    samplers = (heads.greedy_head(s), heads.penalty_sample_head(s))
    graphs[LM_HEAD] = {graph.name: graph for graph in (heads.lm_head(s, files[LM_HEAD]), *samplers)}
    return graphs


def build_tower(model: Mllama, s: StaticShape, weights: WeightFile) -> Graph:
    config: Any = model.config.vision_config
    return Tower(s, config, -(-s.num_patches // PATCH_MULTIPLE) * PATCH_MULTIPLE, weights).build()


def rope_tables(model: Mllama, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of all positions, (seq_length, head_dim) each."""
    model.decoder.rope.after_load(PLAIN)
    cos, sin = model.decoder.rope(torch.arange(seq_length), torch.float32)
    return cos[:, 0].numpy(), sin[:, 0].numpy()
