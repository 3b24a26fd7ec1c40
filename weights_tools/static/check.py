"""Each ONNX file, run with onnxruntime, against the engine's own layers with the checkpoint's own weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from torch import nn

from mmdist.config import SamplingParams, UserError
from mmdist.engine.logits_processors import LogitsProcessors
from mmdist.engine.sampler import likeliest, probabilities
from mmdist.kernels import plain
from mmdist.kernels.kernels import PLAIN
from mmdist.layers.attention import Context
from mmdist.loading import find_owners, finish, load_param
from mmdist.models.mllama import CrossAttentionLayer, Mllama, PictureMemory, Seen
from mmdist.plan import Placement, shard_plan
from mmdist.tp import TP
from mmdist.weights import Checkpoint
from weights_tools.static.blocks import MASKED, StaticShape
from weights_tools.static.parts import EMBEDDING, LM_HEAD, VISION

TOLERANCE = 1e-4  # of the largest number; float32 on both sides, sums in another order


class Network:
    """An ONNX file in onnxruntime, from tensors to tensors."""

    def __init__(self, path: Path):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        names = [given.name for given in self.session.get_inputs()]
        feeds = {name: x.contiguous().numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(np.asarray(y)) for y in self.session.run(None, feeds)]


@dataclass
class Reference:
    """The torch side: a model on meta, and where its weights come from."""

    model: Mllama
    checkpoint: Checkpoint
    shape: StaticShape

    def load(self, prefix: str) -> Any:
        """A part of the model with its weights, in float32."""
        module = deepcopy(self.model.get_submodule(prefix))
        shapes, owners = dict(module.named_parameters()), find_owners(module)
        params: dict[str, list[Placement]] = {}
        for placement in shard_plan(self.model, TP()).values():
            if placement.param.startswith(f"{prefix}."):
                own = replace(placement, param=placement.param.removeprefix(f"{prefix}."))
                params.setdefault(own.param, []).append(own)
        for name, placements in params.items():
            load_param(shapes[name], owners[name], placements, self.checkpoint, TP(), PLAIN)
        for child in module.modules():
            finish(child, PLAIN)
        return module


Networks = Mapping[str, Network]


@torch.inference_mode()
def check_part(part: str, paths: Mapping[str, Path], reference: Reference) -> None:
    """UserError where a file computes something else. paths: name of a network -> its ONNX file."""
    networks = {name: Network(path) for name, path in paths.items()}
    random = torch.Generator().manual_seed(0)
    CHECKS.get(part, check_block)(part, networks, reference, random)


def compare(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    error = float((got.reshape(want.shape) - want).abs().max() / want.abs().max())
    if not error <= TOLERANCE:
        raise UserError(f"{name}.onnx: in onnxruntime {error:.1e} of the largest number off torch; please report it")


def check_vision(part: str, networks: Networks, reference: Reference, random: torch.Generator) -> None:
    """A picture of all tiles but one."""
    encoder, config = reference.load("vision"), reference.model.config.vision_config
    size, tiles = config.image_size, config.max_num_tiles
    pixels = torch.randn(1, tiles, config.num_channels, size, size, generator=random)
    ids, used = torch.tensor([config.max_aspect_ratio_id]), torch.ones(1, tiles, dtype=torch.int64)
    used[0, max(1, tiles - 1) :] = 0
    got = networks[VISION](pixels[0], ids[None].int(), used.int())[0]
    compare(part, got, encoder(pixels, ids, used)[0])


def check_embedding(part: str, networks: Networks, reference: Reference, random: torch.Generator) -> None:
    table = reference.load("decoder.embed_tokens").weight
    ids = torch.randint(len(table), (1, reference.shape.seq_length), generator=random, dtype=torch.int32)
    compare(part, networks["embedding"](ids)[0], F.embedding(ids, table))
    compare("embedding_cache", networks["embedding_cache"](ids[:, :1])[0], F.embedding(ids[:, :1], table))


def check_heads(part: str, networks: Networks, reference: Reference, random: torch.Generator) -> None:
    s = reference.shape
    x = torch.randn(1, s.hidden_size, generator=random)
    logits = reference.load("lm_head")(reference.load("decoder.norm")(x))
    compare(part, networks["lm_head"](x)[0], logits)
    if int(networks["greedy_head"](logits)[0]) != int(logits.argmax()):
        raise UserError("greedy_head.onnx: not the likeliest token; please report it")
    seen = torch.randint(s.vocab_size, (1, s.seq_length), generator=random, dtype=torch.int32)
    settings = torch.tensor([0.8, 0.7, 1.3])  # top_p, temperature, penalty
    probs, tokens = networks["penalty_sample_head"](logits, seen, *settings.split(1))
    params = SamplingParams(temperature=0.7, top_p=0.8, top_k=probs.shape[1], repetition_penalty=1.3)
    best, ids = likeliest(LogitsProcessors(params, seen[0].tolist()).apply(logits[0], []), params)
    compare("penalty_sample_head", torch.zeros(s.vocab_size).scatter(0, tokens[0], probs[0]),
            torch.zeros(s.vocab_size).scatter(0, ids, probabilities(best, params)))  # fmt: skip


def check_block(part: str, networks: Networks, reference: Reference, random: torch.Generator) -> None:
    """A prompt of half the length, and one token after it."""
    number = int(part.removeprefix("block_"))
    layer = reference.load(f"decoder.layers.{number}")
    whole, cached = networks[part], networks[f"block_cache_{number}"]
    x = torch.randn(reference.shape.seq_length, reference.shape.hidden_size, generator=random)
    check: Callable = check_cross if isinstance(layer, CrossAttentionLayer) else check_self
    wants, got, got_cached = check(layer, whole, cached, x, reference, random)
    compare(part, got[:, : len(wants) - 1], wants[None, :-1])
    compare(f"block_cache_{number}", got_cached, wants[None, -1:])


Checked = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # torch's rows, those of the prompt, that of the token


def check_self(
    layer: nn.Module, whole: Network, cached: Network, x: torch.Tensor, reference: Reference, random: torch.Generator
) -> Checked:
    s = reference.shape
    length = s.seq_length // 2
    positions = torch.arange(s.seq_length)
    seen = positions[None] <= positions[:, None]
    got, *past = whole(x[None], positions[None].int(), additive(seen)[None, None])
    history = positions < length
    mask = additive(torch.cat([history, torch.ones(1, dtype=torch.bool)]))
    got_cached, *_ = cached(x[None, length : length + 1], torch.tensor([[length]]).int(), mask[None, None, None], *past)
    rope = reference.model.decoder.rope
    rope.after_load(PLAIN)
    tokens = positions[: length + 1]
    context = Context(rope(tokens, torch.float32), OneSequence(), tokens, [len(tokens)], [None])
    return layer(x[: length + 1], context), got, got_cached


def check_cross(
    layer: CrossAttentionLayer,
    whole: Network,
    cached: Network,
    x: torch.Tensor,
    reference: Reference,
    random: torch.Generator,
) -> Checked:
    """The picture comes as the second token and has all tiles but one."""
    s = reference.shape
    length, tiles = s.seq_length // 2, max(1, s.num_tiles - 1)
    states = torch.randn(s.num_tiles, s.num_patches, s.hidden_size, generator=random)
    memory = PictureMemory(
        {layer.cross_attn.layer: layer.cross_attn.keys_values(states.flatten(0, 1))},
        [Seen(1, None, tiles)],
        s.num_tiles,
    )
    mask = memory.mask(torch.arange(s.seq_length))
    sees = mask.any(1, keepdim=True)
    places = additive((mask | ~sees).repeat_interleave(s.num_patches, dim=1))
    got, *past = whole(x[None], states, sees[None].float(), places[None, None])
    (got_cached,) = cached(x[None, length : length + 1], places[None, None, length : length + 1], *past)
    return layer.look(x[: length + 1], [memory], [mask[: length + 1]]), got, got_cached


class OneSequence:
    """A cache for one forward pass over one sequence."""

    def store(
        self, layer: int, qkv: torch.Tensor, heads: Any, rope: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return plain.split_rotate(qkv, heads, rope)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, window: int | None
    ) -> torch.Tensor:
        return plain.prefill_attention(q, k, v, scale=scale, window=window)


def additive(mask: torch.Tensor) -> torch.Tensor:
    """True for what is seen -> what is added to the scores."""
    return torch.where(mask, 0.0, MASKED)


CHECKS: Mapping[str, Callable] = {VISION: check_vision, EMBEDDING: check_embedding, LM_HEAD: check_heads}
