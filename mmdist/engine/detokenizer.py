"""Tokens to text as they come, with stop texts found and held back."""

from __future__ import annotations

from collections.abc import Callable

INCOMPLETE = "\ufffd"  # what a tokenizer decodes the first bytes of a longer character to


class Detokenizer:
    """Decodes a window of the last tokens only, so an answer costs time linear in its length."""

    def __init__(self, decode: Callable[[list[int]], str], stop: list[str]):
        self.decode, self.stop = decode, stop
        self.token_ids: list[int] = []
        self.text = ""
        self.num_sent = 0
        self.window_start = self.window_end = 0

    def push(self, token_id: int) -> bool:
        """Add a token; True when a stop text is complete (the text then ends before it)."""
        self.token_ids.append(token_id)
        before = self.decode(self.token_ids[self.window_start : self.window_end])
        after = self.decode(self.token_ids[self.window_start :])
        if after.endswith(INCOMPLETE):
            return False
        self.window_start, self.window_end = self.window_end, len(self.token_ids)
        return self._extend(after[len(before) :])

    def _extend(self, new: str) -> bool:
        searched = len(self.text)
        self.text += new
        ends = [self.text.find(stop, max(0, searched - len(stop) + 1)) for stop in self.stop]
        found = [end for end in ends if end >= 0]
        if found:
            self.text = self.text[: min(found)]
        return bool(found)

    def finish(self) -> bool:
        """Decode the whole answer at once (broken characters look different so); True when it has a stop text."""
        self.text = ""
        return self._extend(self.decode(self.token_ids))

    def take(self, *, finished: bool) -> str:
        """Text not yet taken; the beginning of a possible stop text stays until it is decided."""
        hold = 0 if finished else max((len(stop) - 1 for stop in self.stop), default=0)
        end = max(self.num_sent, len(self.text) - hold)
        delta, self.num_sent = self.text[self.num_sent : end], end
        return delta
