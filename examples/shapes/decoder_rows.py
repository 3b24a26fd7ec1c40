"""Our own decoder over packed rows: attention over whole rows in place of the KV cache, so that gradients pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from mmdist.kernels import plain
from mmdist.models.base import Model, MultimodalModel
from mmdist.models.decoder import Step
from mmdist.plan import shard_plan
from mmdist.tp import TP
from packing import Rows, segment_mask


class RowAttention:
    """AttentionCache over rows (B, L) that lie end to end; mask: packing.segment_mask."""

    def __init__(self, mask: torch.Tensor):
        self.mask = mask

    def store(
        self, layer: int, qkv: torch.Tensor, heads: Sequence[int], rope: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return plain.split_rotate(qkv, heads, rope)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, window: int | None
    ) -> torch.Tensor:
        q, k, v = (x.unflatten(0, (len(self.mask), -1)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, self.mask, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)


def find_logits(
    model: MultimodalModel, rows: Rows, *, places: torch.Tensor, features: torch.Tensor, memories: Sequence[Any]
) -> torch.Tensor:
    """Logits (answers' tokens, vocabulary), those at rows.asked in row order.

    features (pictures * tokens, hidden) replace the embeddings where `places` (B, L) is True.
    """
    num, length = rows.ids.shape
    step = Step(
        input_ids=rows.ids.flatten(),
        positions=rows.positions.flatten(),
        image_rows=places.flatten().nonzero()[:, 0],
        image_embeds=features,
        cache=RowAttention(segment_mask(rows.segments)),
        query_lens=[length] * num,
        memories=memories,
    )
    return model.compute_logits(model(step)[rows.asked.flatten()])


def stored_tensors(model: Model) -> dict[str, torch.Tensor]:
    """The parameters of a model on one rank as checkpoints store them, pieces of fused matrices apart."""
    parameters = dict(model.named_parameters())
    tensors = {}
    for name, placement in shard_plan(model, TP()).items():
        tensor = parameters[placement.param].detach()
        if placement.dim is not None:
            tensor = tensor.narrow(placement.dim, placement.offset, placement.shape[placement.dim])
        tensors[name] = tensor
    return tensors
