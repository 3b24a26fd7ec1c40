"""vision.backend=onnx and om: an exported graph takes the place of rank 0's tower, where it is of this very model."""

from __future__ import annotations

from pathlib import Path

import torch

from mmdist.checked import CheckedFile
from mmdist.config import UserError, VisionConfig
from mmdist.models.base import Model, MultimodalModel
from mmdist.models.exported import ExportedTower, graph_inputs, hash_weights, weight_names
from mmdist.models.tower import Tower
from mmdist.tp import TP
from mmdist.vision_folder import (
    VISION_MANIFEST,
    VisionManifest,
    default_folder,
    graph_file,
    load_vision_manifest,
)
from mmdist.weights import Checkpoint, SplitCheckpoint


def replace_tower(model: Model, name: str, checkpoint: Checkpoint, config: VisionConfig, tp: TP) -> None:
    """Put the exported tower into a model on meta, and leave the torch one's weights out of the checkpoint.

    name: of the family. UserError where there is no such export, or one that does not fit.
    """
    if not isinstance(model, MultimodalModel):
        raise UserError(
            f"vision.backend={config.backend}: {name} has no vision tower of its own (pictures and words go through "
            "the same layers, on all ranks); use vision.backend=torch"
        )
    tower = model.get_submodule(model.tower_name)
    assert isinstance(tower, Tower), f"{model.tower_name} of {name} is no Tower"
    folder = Path(config.folder) if config.folder else default_folder(checkpoint.folder, config.backend)
    export = export_command(checkpoint.folder, config)
    manifest = find_export(folder, export)
    check_fits(folder, manifest, name, tower, export)
    check_files(folder, manifest, config.backend, export)
    checkpoint.leave_out(weight_names(model))
    model.set_submodule(model.tower_name, ExportedTower(folder, manifest, config.backend, opens=tp.rank == 0))


def export_command(checkpoint: Path, config: VisionConfig) -> str:
    dst = f" --dst {config.folder}" if config.folder else ""
    soc = " --soc NAME (npu-smi info shows it)" if config.backend == "om" else ""
    return f"weights_tools export {checkpoint} --vision {config.backend}{dst}{soc}"


def find_export(folder: Path, export: str) -> VisionManifest:
    if not (folder / VISION_MANIFEST).exists():
        raise UserError(
            f"vision.folder={folder}: no {VISION_MANIFEST} in it, no tower was exported there; run: {export}"
        )
    return load_vision_manifest(folder)


def check_fits(folder: Path, manifest: VisionManifest, name: str, tower: Tower, export: str) -> None:
    if manifest.model != name:
        raise UserError(f"vision.folder={folder}: the tower of a {manifest.model}, the model is {name}; run: {export}")
    wanted = graph_inputs(tower, manifest.dtype)
    if manifest.inputs != wanted:
        found, asked = ([f"{node.name} {list(node.shape)}" for node in nodes] for nodes in (manifest.inputs, wanted))
        raise UserError(
            f"vision.folder={folder}: takes {', '.join(found)} a picture, the checkpoint's config.json asks for "
            f"{', '.join(asked)}; run: {export}"
        )
    if tower.max_batch is not None and manifest.batch_sizes != (tower.max_batch,):
        raise UserError(
            f"vision.folder={folder}: made for batches of {manifest.batch_sizes}, {name} takes {tower.max_batch}; "
            f"run: {export}"
        )


def check_files(folder: Path, manifest: VisionManifest, backend: str, export: str) -> None:
    """Those of onnx are in the manifest; om files come later, from another machine perhaps."""
    for batch in manifest.batch_sizes:
        if not (folder / graph_file(batch, backend)).exists():
            raise UserError(f"{folder / graph_file(batch, backend)}: missing; run: {export}")
    for file, size in manifest.files.items() if backend == "onnx" else ():
        if not (folder / file).exists() or (folder / file).stat().st_size != size:
            raise UserError(f"{folder / file}: missing or truncated, expected {size} bytes; copy it again, or {export}")


def find_exported(model: Model) -> ExportedTower | None:
    """What replace_tower put there, if it did."""
    return next((module for module in model.modules() if isinstance(module, ExportedTower)), None)


def check_precision(model: Model) -> None:
    """The tower must be as exact as what was asked for. model: in the dtype it will run in."""
    tower = find_exported(model)
    if tower is not None and model.dtype == torch.float32 and tower.manifest.dtype != "float32":
        cure = "export it with --dtype float32, or run" if tower.backend == "onnx" else "run"
        raise UserError(
            f"vision.folder={tower.folder}: the tower is {tower.manifest.dtype}, the model runs in float32; {cure} "
            "with dtype=float16 or bfloat16"
        )


def check_weights(tower: ExportedTower, checkpoint: Checkpoint) -> None:
    """The graphs must hold this checkpoint's weights. Whole files are hashed once a version (mmdist.checked)."""
    is_split = isinstance(checkpoint, SplitCheckpoint)  # its manifest has the hashes
    files = set() if is_split else {checkpoint.files[name] for name in checkpoint.left_out}
    versions = [CheckedFile(path, tower.folder / VISION_MANIFEST) for path in files]
    if versions and all(version.was_checked() for version in versions):
        return
    if hash_weights(checkpoint, checkpoint.left_out) != tower.manifest.weights_sha256:
        raise UserError(
            f"vision.folder={tower.folder}: made from other weights (of {tower.manifest.source}) than those of "
            f"{checkpoint.folder}; export the tower of this checkpoint, or give its own vision.folder="
        )
    for version in versions:
        version.remember()
