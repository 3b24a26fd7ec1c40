"""The forward pass of one step, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mmdist.engine.batch import Batch
from mmdist.engine.cache import PagedCache, StepCache
from mmdist.engine.graphs import DecodeGraphs
from mmdist.engine.sampler import Scores
from mmdist.kernels.graphs import Graphs
from mmdist.kernels.kernels import Kernels
from mmdist.models.base import MultimodalModel
from mmdist.models.decoder import Step
from mmdist.spans import Spans
from mmdist.tp import TP


class Runner:
    def __init__(self, model: MultimodalModel, cache: PagedCache, tp: TP, kernels: Kernels, spans: Spans):
        self.model, self.cache, self.tp, self.kernels, self.device = model, cache, tp, kernels, cache.device
        self.spans = spans
        self.memories: dict[str, Any] = {}
        self.keeps_all = False  # every layer computes every token, for who watches the layers
        self.has_scored = False
        self.graphs: DecodeGraphs | None = None

    def capture(self, graphs: Graphs, max_num_seqs: int, max_model_len: int) -> None:
        """Decode by graphs from now on; every rank at once."""
        self.graphs = DecodeGraphs(self.model, self.cache, graphs, max_num_seqs, max_model_len)

    @torch.inference_mode()
    def encode_images(self, vision: dict[str, torch.Tensor]) -> torch.Tensor:
        """Prompt.vision -> (image tokens, hidden); rank 0 only."""
        return self.model.encode_images({name: tensor.to(self.device) for name, tensor in vision.items()})

    @torch.inference_mode()
    def forward(
        self, batch: Batch, image_embeds: Sequence[torch.Tensor] = (), new_memories: Sequence[torch.Tensor] = ()
    ) -> torch.Tensor:
        """-> (len(batch.logits_rows), vocab) logits, equal on every rank. The pictures are rank 0's alone."""
        return self.model.compute_logits(self.hidden(batch, image_embeds, new_memories))

    @torch.inference_mode()
    def score(
        self, batch: Batch, image_embeds: Sequence[torch.Tensor] = (), new_memories: Sequence[torch.Tensor] = ()
    ) -> list[Scores]:
        """As forward(), but only what batch.candidates asks for of each of the batch.logits_rows."""
        if self.has_scored:  # the first token is out: nothing waits for it any more
            self.kernels.settle()
        hidden = self.hidden(batch, image_embeds, new_memories)
        if not batch.logits_rows:
            return []
        self.has_scored = True
        counts = batch.candidates or [0] * len(batch.logits_rows)
        head, local = self.model.lm_head, self.model.lm_head.local(hidden)
        if min(counts) == 0:
            whole = [row for row, count in enumerate(counts) if count == 0]
            logits = iter(head.gather(local[whole]).float().cpu())
        if max(counts) > 0:
            values, ids = (found.cpu() for found in head.top_k(local, max(counts)))
        return [
            Scores(values[row, :count], ids[row, :count]) if count else Scores(next(logits))
            for row, count in enumerate(counts)
        ]

    def hidden(
        self, batch: Batch, image_embeds: Sequence[torch.Tensor], new_memories: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """-> (len(batch.logits_rows), hidden), equal on every rank"""
        self.update_memories(batch, new_memories)
        if self.graphs is not None and not self.keeps_all and self.graphs.takes(batch):
            hidden, rows = self.graphs.hidden(batch), self.find_rows(batch)
            return hidden if rows is None else hidden[rows]
        lens = zip(batch.query_lens, batch.context_lens, strict=True)
        positions = torch.cat([torch.arange(context - query, context) for query, context in lens])
        step = Step(
            input_ids=self.to_device(batch.input_ids),
            positions=positions.to(self.device),
            image_rows=self.to_device(batch.image_rows),
            image_embeds=self.share_image_embeds(len(batch.image_rows), image_embeds),
            cache=StepCache(self.cache, batch),
            query_lens=batch.query_lens,
            memories=[self.memories.get(name) for name in batch.memory_ids],
            rows=self.find_rows(batch),
        )
        hidden = self.model(step)
        return hidden[self.to_device(batch.logits_rows)] if self.keeps_all else hidden

    def find_rows(self, batch: Batch) -> torch.Tensor | None:
        """Step.rows: the last layer does no more than the logits need."""
        if self.keeps_all or len(batch.logits_rows) == len(batch.input_ids):
            return None
        return self.to_device(batch.logits_rows)

    def update_memories(self, batch: Batch, encoded: Sequence[torch.Tensor]) -> None:
        """Forget what no running request needs; rank 0's encoded pictures of new ones to all."""
        self.memories = {name: kept for name, kept in self.memories.items() if name in batch.kept_memories}
        for i, new in enumerate(batch.new_memories):
            rows = (
                encoded[i] if self.tp.rank == 0 else torch.empty(new.shape, dtype=self.cache.dtype, device=self.device)
            )
            with self.spans("broadcast"):
                self.tp.broadcast(rows)
            self.memories[new.id] = self.model.remember(rows, new.memory)

    def share_image_embeds(self, num_rows: int, image_embeds: Sequence[torch.Tensor]) -> torch.Tensor:
        """Rank 0's (rows, hidden) image embeddings to all."""
        embeds = torch.cat(list(image_embeds)) if image_embeds else self.no_embeds(num_rows)
        assert len(embeds) == num_rows or self.tp.rank > 0, f"{len(embeds)} image rows for {num_rows} image tokens"
        if num_rows:
            with self.spans("broadcast"):
                self.tp.broadcast(embeds)
        return embeds

    def no_embeds(self, num_rows: int) -> torch.Tensor:
        return torch.empty(num_rows, self.model.hidden_size, dtype=self.cache.dtype, device=self.device)

    def to_device(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)
