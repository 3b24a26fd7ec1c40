"""What a request's parameters change in its logits before the next token is chosen; on rank 0 only.

The order of the steps is vLLM's. Nothing as long as the vocabulary is made for a request that asks for none of it, and
penalties are kept up token by token.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

import numpy as np
import torch

from mmdist.config import SamplingParams
from mmdist.engine.grammar import Grammar


class LogitsProcessors:
    """Of one sequence. end_ids: tokens that end its answer. grammar: what json_schema or regex allows next."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: list[int],
        end_ids: Set[int] = frozenset(),
        grammar: Grammar | None = None,
    ):
        self.min_new_tokens, self.end_ids = params.min_new_tokens, torch.tensor(sorted(end_ids), dtype=torch.long)
        self.bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.long)
        self.biases = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        self.penalties = Penalties(params, prompt_token_ids) if penalizes(params) else None
        self.grammar = grammar

    def change(self, num_generated: int) -> bool:
        """Whether they change the logits of the token behind these many."""
        return (
            num_generated < self.min_new_tokens
            or len(self.bias_ids) > 0
            or self.penalties is not None
            or self.grammar is not None
        )

    def apply(self, logits: torch.Tensor, output_ids: list[int]) -> torch.Tensor:
        """(vocab,) -> (vocab,); the given ones stay as they are."""
        if not self.change(len(output_ids)):
            return logits
        logits = logits.clone()
        if len(output_ids) < self.min_new_tokens:
            logits[self.end_ids] = -torch.inf
        if len(self.bias_ids):
            logits[self.bias_ids] += self.biases
        if self.penalties is not None:
            self.penalties.apply(logits, output_ids)
        if self.grammar is not None:
            self.grammar.mask(logits)
        return logits


def penalizes(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0


class Penalties:
    """Which tokens a sequence has, and how often its answer: a table that grows by a row a new token.

    The repetition penalty is over prompt and answer, the others (OpenAI's definition) over the answer alone.
    """

    def __init__(self, params: SamplingParams, prompt_token_ids: list[int]):
        self.params = params
        self.prompt_token_ids = prompt_token_ids if params.repetition_penalty != 1 else []
        self.places: dict[int, int] = {}
        self.ids: np.ndarray = np.zeros(0, np.int64)
        self.counts: np.ndarray = np.zeros(0, np.float32)
        self.num_counted = 0

    def apply(self, logits: torch.Tensor, output_ids: list[int]) -> None:
        """In place."""
        if not self.places:  # <|image|> of some families can be read, not written
            self._add((token_id for token_id in self.prompt_token_ids if token_id < len(logits)), 0)
        self._add(output_ids[self.num_counted :], 1)
        self.num_counted = len(output_ids)
        ids, counts = (torch.from_numpy(column[: len(self.places)]) for column in (self.ids, self.counts))
        values = penalize(logits[ids], self.params.repetition_penalty)
        values -= self.params.frequency_penalty * counts + self.params.presence_penalty * (counts > 0)
        logits[ids] = values

    def _add(self, token_ids: Iterable[int], count: int) -> None:
        for token_id in token_ids:
            place = self.places.setdefault(token_id, len(self.places))
            if place == len(self.ids):
                more = max(64, place)
                self.ids, self.counts = (np.pad(column, (0, more)) for column in (self.ids, self.counts))
            self.ids[place] = token_id
            self.counts[place] += count


def penalize(values: torch.Tensor, penalty: float) -> torch.Tensor:
    """CTRL's repetition penalty (arXiv:1909.05858): positive logits divided, negative ones multiplied."""
    return torch.where(values > 0, values / penalty, values * penalty)
