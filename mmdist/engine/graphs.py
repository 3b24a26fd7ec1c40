"""Decoding by captured graphs: steps of one new token a sequence, which is what most steps are.

A graph has room for a number of sequences; a step takes the smallest that holds it. The places left over are given to
sequences that are not there: each has one token of context, which lies in a block of the cache that no other has.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mmdist.config import EngineConfig, UserError
from mmdist.engine.batch import Batch
from mmdist.engine.cache import PagedCache, StepCache, cache_shape
from mmdist.kernels.graphs import Graphs, Replay, why_no_graphs
from mmdist.kernels.paged import FixedTables
from mmdist.kernels.pages import Slots
from mmdist.models.base import Model, MultimodalModel
from mmdist.models.decoder import Step

ROWS = 4  # of Inputs.numbers before the block tables


def graph_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, ... and max_num_seqs itself."""
    powers = [1 << i for i in range(max_num_seqs.bit_length()) if 1 << i < max_num_seqs]
    return [*powers, max_num_seqs]


def plan_graphs(
    config: EngineConfig, model: Model, device: str, chip: str | None, kernels: str
) -> tuple[EngineConfig, str]:
    """engine.decode_graph settled to on or off, and in words why. UserError where it is asked for and cannot be."""
    reason = why_eager(config, model) or why_no_graphs(device, chip, kernels)
    if config.decode_graph == "on" and reason is not None:
        raise UserError(f"engine.decode_graph=on: {reason}; use auto or off")
    if config.decode_graph == "off":
        reason = "engine.decode_graph=off"
    elif config.decode_graph == "auto" and reason is None and device == "cuda":
        reason = "never tried on a CUDA device; engine.decode_graph=on does"
    if reason is not None:
        return replace(config, decode_graph="off"), f"operation by operation ({reason})"
    sizes = ", ".join(map(str, graph_sizes(config.max_num_seqs)))
    return replace(config, decode_graph="on"), f"graphs captured for batches of {sizes}"


def why_eager(config: EngineConfig, model: Model) -> str | None:
    """What in the model is no graph's work."""
    if not isinstance(model, MultimodalModel):
        return "it answers in one pass"
    if model.memory_numbers():
        return "its layers look at pictures, which each request has of its own"
    window = model.decoder.shape.window
    if window is not None and cache_shape(model, config).max_model_len > window:
        return f"contexts may outgrow the sliding window of {window} tokens; a lower engine.max_model_len would do"
    return None


class Inputs:
    """What a graph reads, in one tensor, so that a step is one copy: token, position, slot and context length of each
    sequence, then each one's block table."""

    def __init__(self, size: int, width: int, device: torch.device):
        self.size, self.width = size, width
        self.numbers = torch.zeros(size * (ROWS + width), dtype=torch.int32, device=device)

    def row(self, number: int) -> torch.Tensor:
        return self.numbers[number * self.size : (number + 1) * self.size]

    @property
    def block_tables(self) -> torch.Tensor:
        return self.numbers[ROWS * self.size :].view(self.size, self.width)


class DecodeCache(StepCache):
    """What the layers see of the cache in a graph."""

    def __init__(self, cache: PagedCache, inputs: Inputs, lens: list[int], longest: int):
        self.cache, self.num_rows, self.prefills = cache, inputs.size, []
        self.new_slots = Slots(inputs.row(2), cache.block_size)
        self.tables = FixedTables(inputs.block_tables, inputs.row(3), lens, longest, cache.block_size)


class DecodeGraphs:
    """Those of one rank; all ranks capture them, and replay them, together."""

    def __init__(
        self, model: MultimodalModel, cache: PagedCache, graphs: Graphs, max_num_seqs: int, max_model_len: int
    ):
        self.model, self.cache, self.max_model_len = model, cache, max_model_len
        self.none = torch.empty(0, dtype=torch.long, device=cache.device)
        width = -(-max_model_len // cache.block_size)
        self.inputs = {size: Inputs(size, width, cache.device) for size in graph_sizes(max_num_seqs)}
        # The largest first: the others find room in the memory that it has used.
        self.replays = {size: self.capture(graphs, self.inputs[size]) for size in reversed(self.inputs)}

    @torch.inference_mode()
    def capture(self, graphs: Graphs, inputs: Inputs) -> Replay:
        """With nothing but sequences that are not there, as long as any may become."""
        self.fill(inputs, Batch())
        return graphs.capture(lambda lens: self.compute(inputs, lens), [self.max_model_len] * inputs.size)

    def compute(self, inputs: Inputs, lens: list[int]) -> torch.Tensor:
        """-> (size, hidden)"""
        return self.model(
            Step(
                input_ids=inputs.row(0),
                positions=inputs.row(1),
                image_rows=self.none,
                image_embeds=self.none,
                cache=DecodeCache(self.cache, inputs, lens, self.max_model_len),
                query_lens=[1] * inputs.size,
                memories=[None] * inputs.size,
            )
        )

    def takes(self, batch: Batch) -> bool:
        return batch.phase == "decode" and not batch.image_rows and 0 < len(batch.input_ids) <= max(self.inputs)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """-> (len(batch.input_ids), hidden), good until the next step."""
        inputs = self.inputs[min(size for size in self.inputs if size >= len(batch.input_ids))]
        return self.replays[inputs.size](self.fill(inputs, batch))[: len(batch.input_ids)]

    def fill(self, inputs: Inputs, batch: Batch) -> list[int]:
        """Put a step into a graph's inputs; the context lengths, of the sequences that are not there, too."""
        spare, size = self.cache.spare_block, self.cache.block_size
        absent = range(inputs.size - len(batch.input_ids))
        lens = [*batch.context_lens, *(1 for _ in absent)]
        contexts = zip(batch.block_tables, batch.context_lens, strict=True)
        slots = [table[(n - 1) // size] * size + (n - 1) % size for table, n in contexts]
        numbers = [*batch.input_ids, *(0 for _ in absent), *(n - 1 for n in lens)]
        numbers += [*slots, *(spare * size + place for place in absent), *lens]
        for table in [*batch.block_tables, *([spare] * inputs.width for _ in absent)]:
            numbers += table + [0] * (inputs.width - len(table))
        inputs.numbers.copy_(torch.tensor(numbers, dtype=torch.int32))
        return lens
