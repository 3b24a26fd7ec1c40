"""Answers of a given form: json_schema and regex, compiled by llguidance for a tokenizer; on rank 0 only.

A grammar says before every token which ones may follow. It ends the answer when nothing can be added to it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Set
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
import transformers  # classes are looked up when used: importing them here would triple the start-up time
from sentencepiece import SentencePieceProcessor

from mmdist.config import SamplingParams, UserError

WHITESPACE = "[ ]?"  # between the parts of JSON: a model that is free to may write blanks and line breaks for ever
CACHED = 64  # compiled grammars kept
LONGEST_ERROR = 300


class Grammar:
    """Where one answer stands. error: why it cannot go on (the grammar became too complex)."""

    def __init__(self, matcher: Any, eos_token_ids: Set[int]):
        self.matcher, self.eos_token_ids = matcher, eos_token_ids
        self.error: str | None = None

    @property
    def complete(self) -> bool:
        """Nothing but an end-of-sequence can follow."""
        return self.error is None and self.matcher.is_stopped()

    def mask(self, logits: torch.Tensor) -> None:
        """(vocab,), in place: what cannot follow becomes -inf; a vocabulary may be padded beyond its tokenizer's."""
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        allowed = torch.zeros(len(logits), dtype=torch.bool)
        found = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: len(logits)]).bool()
        allowed[: len(found)] = found
        self._check()
        if self.error is None:
            logits.masked_fill_(~allowed, -torch.inf)

    def accept(self, token_id: int) -> None:
        """The answer goes on with this token."""
        if self.error is None and token_id not in self.eos_token_ids:
            self.matcher.consume_token(token_id)
            self._check()

    def _check(self) -> None:
        if self.matcher.is_error():
            self.error = f"the grammar of the answer cannot be followed: {one_line(self.matcher.get_error())}"


class Grammars:
    """Compiles for one tokenizer (transformers' or sentencepiece's); may be called from any thread."""

    def __init__(self, tokenizer: Any, eos_token_ids: Set[int]):
        self.tokenizer, self.eos_token_ids = tokenizer, eos_token_ids
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._compile = lru_cache(CACHED)(self._compile_new)

    def begin(self, params: SamplingParams) -> Grammar | None:
        """The grammar of a new answer, if it has one; UserError where it makes no sense. The first use of one may take
        a second."""
        if params.json_schema is None and params.regex is None:
            return None
        return Grammar(self._compile(params.json_schema, params.regex).deep_copy(), self.eos_token_ids)

    def _compile_new(self, json_schema: str | None, regex: str | None) -> Any:
        guidance = load_llguidance()
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = build_vocabulary(guidance, self.tokenizer, sorted(self.eos_token_ids))
        matcher = guidance.LLMatcher
        name = "json_schema" if regex is None else "regex"
        if json_schema is not None:
            schema = json.loads(json_schema) or {"type": "object"}
            grammar = matcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE})
        else:
            grammar = matcher.grammar_from_regex(regex)
        compiled = matcher(self._vocabulary, grammar, log_level=0, limits=guidance.LLParserLimits(verbose_errors=False))
        if compiled.is_error():
            raise UserError(f"{name}: {one_line(compiled.get_error())}")
        if not any(compiled.compute_bitmask()):
            raise UserError(f"{name}: no token of this checkpoint's vocabulary can begin such an answer")
        return compiled


def one_line(text: str) -> str:
    return " ".join(text.split())[:LONGEST_ERROR]


def load_llguidance() -> Any:
    try:
        import_module("llguidance.hf")
        return import_module("llguidance")
    except ImportError as error:
        raise UserError("json_schema and regex take llguidance: pip install 'mmdist[guided]'") from error


def build_vocabulary(guidance: Any, tokenizer: Any, eos_token_ids: list[int]) -> Any:
    """The bytes of every token, as llguidance takes them."""
    if isinstance(tokenizer, SentencePieceProcessor):
        wrapper = guidance.TokenizerWrapper(Pieces(tokenizer))
        return guidance.LLTokenizer(wrapper, eos_token=eos_token_ids)
    if not isinstance(tokenizer, transformers.PreTrainedTokenizerFast) or tokenizer.backend_tokenizer.decoder is None:
        raise UserError(
            "json_schema and regex: the tokens of this checkpoint are whole words, which spell no other text"
        )
    return guidance.hf.from_tokenizer(tokenizer, eos_token=eos_token_ids)


class Pieces:
    """A sentencepiece vocabulary, as llguidance's TokenizerWrapper takes it."""

    def __init__(self, tokenizer: SentencePieceProcessor):
        self.tokenizer = tokenizer
        ids = range(tokenizer.vocab_size())
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id(), tokenizer.bos_id()
        self.special_token_ids = [i for i in ids if tokenizer.is_control(i) or tokenizer.is_unknown(i)]
        self.tokens = [self.spell(i) for i in ids]

    def spell(self, token_id: int) -> bytes:
        piece = self.tokenizer.id_to_piece(token_id)
        return bytes([int(piece[3:5], 16)]) if self.tokenizer.is_byte(token_id) else piece.replace("▁", " ").encode()

    def __call__(self, text: str) -> list[int]:
        """Behind a line break, as sentencepiece puts a blank in front of a text. (The wrapper tries bytes first, and
        takes a TypeError for a no.)"""
        return self.tokenizer.encode("\n" + text)[len(self.tokenizer.encode("\n")) :]
