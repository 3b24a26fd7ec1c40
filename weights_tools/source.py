"""What the verbs work on: the family and folder that MODEL stands for, and the plan of a folder's model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from mmdist.config import ModelConfig, UserError
from mmdist.manifest import MANIFEST, load_manifest
from mmdist.models.family import build_model, check_world_size, find_model, list_models, load_model_config
from mmdist.models.quantized import hold_as_stored
from mmdist.plan import Plan, shard_plan
from mmdist.quant import FOLLOWS
from mmdist.quant_files import check_description, find_format
from mmdist.shipped import CONF
from mmdist.tp import TP
from mmdist.weights import Checkpoint, open_checkpoint
from weights_tools.convert import make_demo
from weights_tools.folder import absolute


def find_source(model: str, src: str | None) -> tuple[str, Path]:
    """MODEL and --src of the command line -> (family, folder of whole tensors)."""
    if model in list_models():
        folder = absolute(src) if src is not None else demo_checkpoint(model)
    elif src is not None:
        raise UserError(f"{model}: with --src, MODEL is the name of a family; there are: {', '.join(list_models())}")
    elif not Path(model).is_dir():
        raise UserError(f"{model}: neither a folder nor a family; the families are: {', '.join(list_models())}")
    else:
        folder = absolute(model)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one with config.json and *.safetensors as --src")
    if (folder / MANIFEST).exists():
        manifest = load_manifest(folder)
        raise UserError(f"{folder}: split already, for {manifest.world_size} ranks; give its source: {manifest.source}")
    return (model if model in list_models() else find_family(folder)), folder


def demo_checkpoint(model: str) -> Path:
    path = CONF / "model" / f"{model}.yaml"
    settings: Any = OmegaConf.to_container(OmegaConf.load(path))
    if "demo_checkpoint" not in settings:
        raise UserError(f"{model}: no demo_checkpoint in {path}; give the checkpoint as --src FOLDER")
    return make_demo(ModelConfig(**settings))


def find_family(folder: Path) -> str:
    """The family whose model type is the one in the folder's config.json."""
    path = folder / "config.json"
    try:
        model_type = json.loads(path.read_text()).get("model_type")
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no config.json in it; give a folder with config.json and *.safetensors") from error
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise UserError(f"{path}: not a JSON object ({error}); copy it again") from error
    for name in list_models():
        config_class: Any = find_model(name).config_class
        if config_class.model_type == model_type:
            return name
    raise UserError(f"{path}: model_type {model_type} is of no family here; there are: {', '.join(list_models())}")


def load_plan(family: str, folder: Path, world_size: int) -> tuple[Any, Plan]:
    """(the model's config, who holds what, quantised weights as they are); refuses a size it cannot be cut into."""
    kind, format, tp = find_model(family), find_format(folder), TP(0, world_size)
    config = load_model_config(kind, folder)
    check_world_size(kind, config, world_size, format)
    model = build_model(kind, config, tp, torch.float32)
    if format is not None:
        hold_as_stored(model, open_checkpoint(folder, kind.renames, [*kind.ignored, *FOLLOWS], tp), format, tp)
    return config, shard_plan(model, tp)


def open_source(family: str, folder: Path) -> Checkpoint:
    """A folder of whole tensors; a description of quantised ones must agree with them."""
    kind = find_model(family)
    checkpoint = Checkpoint(folder, kind.renames, [*kind.ignored, *FOLLOWS])
    check_description(folder, checkpoint.stored_dtypes())
    return checkpoint
