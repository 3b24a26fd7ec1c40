"""From a family's name to its model: one file in mmdist/models and one yaml in conf/model, of the same name."""

from __future__ import annotations

import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mmdist.ascend import spare_transformers
from mmdist.config import UserError
from mmdist.models.base import Model
from mmdist.models.quantized import linears
from mmdist.quant import WeightFormat
from mmdist.shipped import CONF
from mmdist.tp import TP


def list_models() -> list[str]:
    return sorted(path.stem for path in CONF.glob("model/*.yaml"))


def find_model(name: str) -> type[Model]:
    if name not in list_models() or find_spec(f"mmdist.models.{name}") is None:
        raise UserError(f"model={name}: no file mmdist/models/{name}.py; there are: {', '.join(list_models())}")
    spare_transformers()
    return import_module(f"mmdist.models.{name}").MODEL


def check_folder(family: type[Model], folder: Path) -> None:
    """Refuse what is no checkpoint, or one of another model type; looks at config.json alone."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"checkpoint={folder}: no such folder; give a folder with config.json and *.safetensors")
    if not path.exists():
        raise UserError(f"checkpoint={folder}: no config.json in it; give a folder with config.json and *.safetensors")
    try:
        model_type = json.loads(path.read_text()).get("model_type")
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error}); copy it again") from error
    name = family.__module__.rpartition(".")[2]
    if model_type != family.config_class.model_type:
        raise UserError(
            f"{path}: model_type is {model_type}, model={name} wants "
            f"{family.config_class.model_type}; choose another model= ({', '.join(list_models())}) or checkpoint="
        )


def load_model_config(family: type[Model], folder: Path) -> Any:
    """config.json with its class defaults."""
    check_folder(family, folder)
    return family.config_class.from_pretrained(folder)


def build_model(family: type[Model], config: Any, tp: TP, dtype: torch.dtype = torch.float32) -> Model:
    """The model of one rank on `meta`: shapes, no memory."""
    check_world_size(family, config, tp.size)
    with torch.device("meta"):
        model = family(config, tp)
    return model.to(dtype).eval().requires_grad_(False)


def legal_world_sizes(family: type[Model], config: Any, format: WeightFormat | None = None) -> list[int]:
    """Every size that one layer, its weights held in `format`, can be cut into; found by asking the layer."""
    return [size for size in range(1, family.num_heads(config) + 1) if not refusal(family, config, size, format)]


def refusal(family: type[Model], config: Any, size: int, format: WeightFormat | None) -> str:
    """Why a layer cannot be cut for `size` ranks; empty when it can."""
    try:
        with torch.device("meta"):
            layer = family.build_layer(config, TP(0, size))
    except UserError:
        return f"{family.describe_layer(config)} cannot be cut into {size} equal parts"
    try:
        if format is not None:
            for _, module in linears(layer):
                module.store_as(format)
    except UserError as error:
        return str(error)
    return ""


def check_world_size(family: type[Model], config: Any, size: int, format: WeightFormat | None = None) -> None:
    if reason := refusal(family, config, size, format):
        legal = ", ".join(map(str, legal_world_sizes(family, config, format)))
        raise UserError(f"world_size={size}: {reason}; legal sizes: {legal or 'none'}")
