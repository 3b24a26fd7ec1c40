"""Tokens to text as they come, with stop texts found and held back."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from functools import partial

from mmdist.config import SamplingParams
from mmdist.models.base import Processor

INCOMPLETE = "\ufffd"  # what a tokenizer decodes the first bytes of a longer character to


class Detokenizer:
    """Decodes a window of the last tokens only, so an answer costs time linear in its length.

    own_stop: the family's end of an answer in words, never part of the text. joined: tokens that change the text of
    those before them (Processor.joined). stop_reason: which of `stop` ended the answer.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stop: Sequence[str],
        own_stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        joined: Set[int] = frozenset(),
    ):
        self.decode, self.stop, self.include_stop, self.joined = decode, stop, include_stop, joined
        self.all_stop = [*stop, *own_stop]
        self.hold = max((len(text) - 1 for text in self.all_stop), default=0)
        self.token_ids: list[int] = []
        self.text = ""
        self.stop_reason: str | None = None
        self.num_sent = 0
        self.window_start = self.window_end = 0

    def push(self, token_id: int) -> bool:
        """Add a token; True when a stop text is complete (the text then ends before it, or with include_stop after)."""
        self.token_ids.append(token_id)
        before = self.decode(self.token_ids[self.window_start : self.window_end])
        after = self.decode(self.token_ids[self.window_start :])
        # A window of tokens without text would lose the blank of the word behind it.
        if after.endswith(INCOMPLETE) or len(after) <= len(before):
            return False
        new = after[len(before) :]
        if token_id in self.joined:  # the next token may change this text, but not what ends with it
            return self._stops(self.text + new)
        self.window_start, self.window_end = self.window_end, len(self.token_ids)
        return self._extend(new)

    def _extend(self, new: str) -> bool:
        stops = self._stops(self.text + new)
        if not stops:
            self.text += new
        return stops

    def _stops(self, text: str) -> bool:
        """True when `text`, which begins with what is searched already, has a stop text; it is then the answer's.

        Of several stop texts the one that is complete first counts, however the tokens fall.
        """
        searched = len(self.text)
        starts = {stop: text.find(stop, max(0, searched - len(stop) + 1)) for stop in self.all_stop}
        ends = {stop: start + len(stop) for stop, start in starts.items() if start >= 0}
        if not ends:
            return False
        first = min(ends, key=lambda stop: ends[stop])
        asked = first in self.stop
        self.stop_reason = first if asked else None
        self.text = text[: ends[first] if asked and self.include_stop else starts[first]]
        return True

    def finish(self) -> bool:
        """Decode the whole answer at once (broken characters look different so); True when it has a stop text."""
        whole, sent = self.decode(self.token_ids), self.text[: self.num_sent]
        new = whole[len(sent) :] if whole.startswith(sent) else self._rest()
        self.text = sent
        return self._extend(new)

    def _rest(self) -> str:
        """What follows the text sent, where the whole answer reads otherwise: what is sent stays."""
        before, after = (self.decode(self.token_ids[self.window_start : end]) for end in (self.window_end, None))
        return self.text[self.num_sent :] + after[len(before) :]

    def take(self, *, finished: bool) -> str:
        """Text not yet taken; the beginning of a possible stop text stays until it is decided."""
        end = max(self.num_sent, len(self.text) - (0 if finished else self.hold))
        delta, self.num_sent = self.text[self.num_sent : end], end
        return delta


def build_detokenizer(processor: Processor, params: SamplingParams) -> Detokenizer:
    """The family's own end is a text, which JSON may have too: there the grammar decides."""
    guided = params.json_schema is not None or params.regex is not None
    return Detokenizer(
        partial(processor.decode, skip_special_tokens=params.skip_special_tokens),
        params.stop,
        () if params.ignore_eos or guided else processor.stop,
        include_stop=params.include_stop_str_in_output,
        joined=processor.joined,
    )
