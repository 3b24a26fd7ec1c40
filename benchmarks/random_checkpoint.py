"""Checkpoints of real sizes with random weights, made on the spot in the hub's layout, for the LLaVA families."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from mmdist.models.family import build_model, find_model
from mmdist.plan import shard_plan
from mmdist.tp import TP

REPOSITORY = Path(__file__).resolve().parents[1]
IMAGE_TOKEN_ID = 4  # <image> in the shapes checkpoints' tokenizer
FILE_BYTES = 4e9  # of one file at most, about as the hub's are
LONGEST = 8192  # tokens of a prompt that the tokenizer takes without a warning
TOKENIZER = ("tokenizer.json", "special_tokens_map.json", "chat_template.jinja")
HUB_NAMES = {
    "decoder.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "vision.tower.model.": "vision_tower.vision_model.",
    "vision.projector.": "multi_modal_projector.",
    "vision.image_newline": "image_newline",
}


@dataclass(frozen=True)
class Recipe:
    """family: whose shapes checkpoint lends its tokenizer and processor; processor: what that sets differently."""

    family: str
    config: Any
    processor: dict[str, Any]


def make_checkpoint(recipe: Recipe, folder: Path) -> Path:
    """Write the checkpoint unless it is there; returns its folder."""
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(recipe, folder)
        shapes = REPOSITORY / "assets" / f"{recipe.family}-shapes"
        for name in TOKENIZER:
            shutil.copy(shapes / name, folder / name)
        write_changed(shapes, folder, "tokenizer_config.json", {"model_max_length": LONGEST})
        for name in ("preprocessor_config.json", "processor_config.json"):
            write_changed(shapes, folder, name, recipe.processor)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 0}))
        recipe.config.save_pretrained(folder)  # last: its presence says that the folder is whole
    return folder


def write_weights(recipe: Recipe, folder: Path) -> None:
    """model.safetensors, or several files and their index."""
    plan = shard_plan(build_model(find_model(recipe.family), recipe.config, TP(), torch.bfloat16), TP())
    shapes = {name: placement.shape for name, placement in plan.items()}
    files = list(share_out({name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}))
    index, generator = {}, torch.Generator().manual_seed(0)
    for number, names in enumerate(tqdm(files, desc=folder.name, unit="file", disable=not sys.stderr.isatty()), 1):
        file = "model.safetensors" if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = {hub_name(name): random_tensor(name, shapes[name], generator) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    if len(files) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def share_out(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Names in their order, as many at a time as fit one file."""
    names, total = [], 0
    for name, size in sizes.items():
        if names and total + size > FILE_BYTES:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names


def hub_name(name: str) -> str:
    prefix = next(ours for ours in HUB_NAMES if name.startswith(ours))
    return HUB_NAMES[prefix] + name.removeprefix(prefix)


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    noise = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    return noise + 1 if "norm" in name else noise


def write_changed(shapes: Path, folder: Path, name: str, changes: dict[str, Any]) -> None:
    """One of the shapes checkpoint's files with this model's sizes, as far as it has them."""
    settings = json.loads((shapes / name).read_text())
    for target in (settings, settings.get("image_processor", settings)):
        target.update({key: value for key, value in changes.items() if key in target})
    (folder / name).write_text(json.dumps(settings))
