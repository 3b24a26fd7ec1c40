"""A sentencepiece model whose pieces are given instead of learned, as the bytes of a tokenizer.model.

Its file is a protobuf message, of which few fields are needed: see sentencepiece_model.proto of google/sentencepiece.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

BLANK = "\u2581"  # sentencepiece's sign for a blank, which stands before a word
SPECIALS = ("<unk>", "<s>", "</s>")
UNK, BOS, EOS = range(3)
UNKNOWN, CONTROL, NORMAL = 2, 3, 1  # SentencePiece.Type
UNIGRAM = 1  # TrainerSpec.ModelType
# Log probabilities: a word as one piece beats the same word in pieces.
WORD_SCORE, LETTER_SCORE = -5.0, -10.0


def build_tokenizer(words: Sequence[str], letters: Sequence[str]) -> bytes:
    """Ids are the specials, then the words (with BLANK where one stands before them), then the letters."""
    pieces = [(SPECIALS[UNK], 0.0, UNKNOWN), *((name, 0.0, CONTROL) for name in SPECIALS[BOS:])]
    pieces += [(word, WORD_SCORE, NORMAL) for word in words] + [(letter, LETTER_SCORE, NORMAL) for letter in letters]
    assert len({piece for piece, _, _ in pieces}) == len(pieces), "pieces must be distinct"
    trainer = number(3, UNIGRAM) + number(4, len(pieces))
    normalizer = message(1, b"identity") + number(4, 0)  # keep blanks as they are: remove_extra_whitespaces is off
    return b"".join(message(1, piece(*each)) for each in pieces) + message(2, trainer) + message(3, normalizer)


def piece(text: str, score: float, kind: int) -> bytes:
    return message(1, text.encode()) + tag(2, 5) + struct.pack("<f", score) + number(3, kind)


def message(field: int, content: bytes) -> bytes:
    return tag(field, 2) + varint(len(content)) + content


def number(field: int, value: int) -> bytes:
    return tag(field, 0) + varint(value)


def tag(field: int, wire_type: int) -> bytes:
    return varint(field << 3 | wire_type)


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
