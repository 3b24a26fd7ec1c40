"""What the families with original layouts share: Llama's sentencepiece file, and pictures as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from PIL import Image

from mmdist.config import UserError

TOKENIZER = "tokenizer.model"
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of red, green and blue
STD = (0.26862954, 0.26130258, 0.27577711)


def load_pieces(path: Path) -> sentencepiece.SentencePieceProcessor:
    if not path.exists():
        raise UserError(f"{path}: no such file; copy Llama's {TOKENIZER} there")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path}: truncated, or no sentencepiece model; copy it again") from error


def name_special(tokenizer: sentencepiece.SentencePieceProcessor, token_ids: Sequence[int]) -> str:
    """Text with the names of special pieces (<s>) in it; what the model has beyond the pieces has no text."""
    known = [token_id for token_id in token_ids if token_id < tokenizer.vocab_size()]
    text = ""
    for special, run in groupby(known, lambda i: tokenizer.is_control(i) or tokenizer.is_unknown(i)):
        ids = list(run)
        if special:
            text += "".join(map(tokenizer.id_to_piece, ids))
        else:  # the blank of a first word is kept inside a text
            text += " " * (bool(text) and tokenizer.id_to_piece(ids[0]).startswith("▁")) + tokenizer.decode(ids)
    return text


def to_pixels(image: Image.Image) -> torch.Tensor:
    """RGB -> (3, height, width), normalised as CLIP's."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std
