"""What one rank needs in memory, from shapes alone; task=plan shows it and load_engine refuses what does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch
from math import prod

from mmdist.config import EngineConfig
from mmdist.engine.cache import CacheShape, cache_shape
from mmdist.engine.pictures import MIB
from mmdist.models.base import EncoderModel, Model, MultimodalModel
from mmdist.plan import Plan, bytes_per_rank
from mmdist.tp import TP

FLOAT32 = 4


@dataclass(frozen=True)
class RankMemory:
    """Bytes. embeddings_bytes: of encoded pictures, kept on the device that makes and uses them. peak_load_bytes: host
    memory at the worst moment of loading onto a CPU (weights, one mapped tensor)."""

    rank: int
    llm_bytes: int
    vision_bytes: int
    kv_bytes: int
    picture_kv_bytes: int  # keys and values of the pictures, in families whose layers look at them
    embeddings_bytes: int
    activation_bytes: int
    peak_load_bytes: int

    @property
    def total(self) -> int:
        kept = self.llm_bytes + self.vision_bytes + self.kv_bytes + self.picture_kv_bytes + self.embeddings_bytes
        return max(kept + self.activation_bytes, self.peak_load_bytes)


@dataclass(frozen=True)
class StepMemory:
    """Bytes that requests take: of the KV cache, of pictures looked at, of encoded ones kept, of a step's tensors."""

    kv_bytes: int
    picture_kv_bytes: int
    embeddings_bytes: int
    activation_bytes: int


def rank_memory(model: Model, plan: Plan, tp: TP, config: EngineConfig) -> RankMemory:
    """model: built (on meta is enough) for `tp`, in the dtype it will run in."""
    llm, vision = bytes_per_rank(model, tp)
    largest = max(prod(placement.shape) for placement in plan.values() if placement.held_by(tp))
    step = step_memory(model, tp, config)
    return RankMemory(
        rank=tp.rank,
        llm_bytes=llm,
        vision_bytes=vision,
        kv_bytes=step.kv_bytes,
        picture_kv_bytes=step.picture_kv_bytes,
        embeddings_bytes=step.embeddings_bytes,
        activation_bytes=step.activation_bytes,
        peak_load_bytes=llm + vision + largest * model.dtype.itemsize,
    )


@singledispatch
def step_memory(model: Model, tp: TP, config: EngineConfig) -> StepMemory:
    raise NotImplementedError(f"no engine runs {type(model).__name__}")


@step_memory.register
def _(model: MultimodalModel, tp: TP, config: EngineConfig) -> StepMemory:
    shape = cache_shape(model, config)
    activations = decoder_activations(model, shape, config)
    if tp.rank == 0:
        activations = max(activations, model.vision_activations() * model.dtype.itemsize)
    pictures = config.max_pictures * model.memory_numbers() * model.dtype.itemsize
    embeddings = config.embedding_cache_mib * MIB if tp.rank == 0 else 0
    return StepMemory(shape.bytes(model.dtype), pictures, embeddings, activations)


@step_memory.register
def _(model: EncoderModel, tp: TP, config: EngineConfig) -> StepMemory:
    return StepMemory(0, 0, 0, model.activations(config.max_num_seqs))


def decoder_activations(model: MultimodalModel, shape: CacheShape, config: EngineConfig) -> int:
    """Bytes of the largest tensors that live at once in a full step: an MLP or an attention, and the logits."""
    itemsize = model.dtype.itemsize
    layer = model.first_layer
    heads, kv_heads, _ = layer.self_attn.heads
    tokens = min(config.max_num_batched_tokens, config.max_num_seqs * shape.max_model_len)
    residual = tokens * model.hidden_size * (4 * itemsize + 2 * FLOAT32)  # in, out, normed; the norm in float32
    mlp = tokens * 2 * sum(layer.mlp.gate_up_proj.local_sizes) * itemsize
    scores = tokens * shape.max_model_len * (1 + itemsize)  # the mask, as bool and as numbers
    context = 2 * shape.max_model_len * shape.head_dim * itemsize  # keys and values of one head, gathered
    attention = 3 * tokens * (heads + 2 * kv_heads) * shape.head_dim * itemsize + scores + context * heads
    gathered = config.max_num_seqs * context * kv_heads
    logits = config.max_num_seqs * model.vocab_size * (2 * itemsize + 2 * FLOAT32)
    return residual + max(mlp, attention, gathered) + logits
