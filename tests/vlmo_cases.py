"""What the tests of VLMo share: its golden cases, converted, and their questions."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from conftest import GOLDEN, config_for, convert

from mmdist.config import Config, SamplingParams
from mmdist.engine.encoder import EncoderEngine
from mmdist.engine.request import Request
from mmdist.media import load_image

SETTINGS = {"vlmo_vqa": (), "vlmo_vqa_plus": ("num_heads=8",), "vlmo_retrieval": ()}
SIZES = [1, 2, 4, 8]
TEXT_LEN = 40


@cache
def plain(case: str) -> Path:
    """The converted checkpoint, made once."""
    return convert("vlmo", GOLDEN / case / "checkpoint", SETTINGS[case])


def config(case: str, **engine: Any) -> Config:
    return config_for(plain(case), model="vlmo", **{"max_num_seqs": 3, **engine})


def golden(case: str) -> tuple[list[dict[str, Any]], Any]:
    return json.loads((GOLDEN / case / "golden.json").read_text())["items"], np.load(GOLDEN / case / "golden.npz")


def inputs(case: str) -> Path:
    return GOLDEN / case / "inputs"


def questions(case: str, engine: EncoderEngine, **params: Any) -> list[Request]:
    """The golden questions; three of them make a batch, and the last one is too long."""
    items, _ = golden(case)
    pictures = {item["image"]: load_image(inputs(case) / item["image"]) for item in items}
    prompts = [engine.prompts.prompt(images=[pictures[item["image"]]], text=item["question"]) for item in items]
    return [Request(str(i), prompt, SamplingParams(**params)) for i, prompt in enumerate(prompts)]
