"""The forward pass of one step, the same on every rank."""

from __future__ import annotations

import torch

from mmdist.backend import Backend
from mmdist.engine.batch import Batch
from mmdist.engine.cache import PagedCache, StepCache
from mmdist.models.base import MultimodalModel
from mmdist.tp import TP


class Runner:
    def __init__(self, model: MultimodalModel, cache: PagedCache, tp: TP, backend: Backend):
        self.model, self.cache, self.tp, self.device = model, cache, tp, backend.device

    @torch.inference_mode()
    def encode_images(self, vision: dict[str, torch.Tensor]) -> torch.Tensor:
        """Prompt.vision -> (image tokens, hidden); rank 0 only."""
        return self.model.encode_images({name: tensor.to(self.device) for name, tensor in vision.items()})

    @torch.inference_mode()
    def forward(self, batch: Batch, image_embeds: list[torch.Tensor]) -> torch.Tensor:
        """image_embeds (rank 0's; empty elsewhere) -> (len(batch.logits_rows), vocab) logits, equal on every rank."""
        lens = zip(batch.query_lens, batch.context_lens, strict=True)
        positions = torch.cat([torch.arange(context - query, context) for query, context in lens])
        hidden = self.model(
            self.to_device(batch.input_ids),
            positions.to(self.device),
            StepCache(self.cache, batch),
            self.to_device(batch.image_rows),
            self.share_image_embeds(len(batch.image_rows), image_embeds),
        )
        if not batch.logits_rows:
            return hidden.new_empty(0, 0)
        return self.model.compute_logits(hidden[self.to_device(batch.logits_rows)])

    def share_image_embeds(self, num_rows: int, image_embeds: list[torch.Tensor]) -> torch.Tensor:
        """Rank 0's (rows, hidden) image embeddings to all."""
        embeds = torch.cat(image_embeds) if image_embeds else self.cache.k.new_empty(num_rows, self.model.hidden_size)
        assert len(embeds) == num_rows or self.tp.rank > 0, f"{len(embeds)} image rows for {num_rows} image tokens"
        return self.tp.broadcast(embeds) if num_rows else embeds

    def to_device(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)
