"""A tower's place, taken by a ready-made graph: its weights are neither built nor loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from mmdist.config import UserError
from mmdist.kernels.kernels import Kernels
from mmdist.models.base import MultimodalModel
from mmdist.models.tower import Tower
from mmdist.vision_folder import GraphInput, VisionManifest, graph_file, split_batch, tower_hash
from mmdist.vision_session import VisionSession, open_session
from mmdist.weights import Checkpoint

log = logging.getLogger("mmdist.load")
TORCH = {"float16": torch.float16, "float32": torch.float32, "int64": torch.int64}
WORDS = {dtype: word for word, dtype in TORCH.items()}


class ExportedTower(nn.Module):
    """Has the forward of the Tower it stands for. opens: on rank 0, which loads the graphs with the weights."""

    rank_zero_only = True

    def __init__(self, folder: Path, manifest: VisionManifest, backend: str, *, opens: bool):
        super().__init__()
        self.folder, self.manifest, self.backend, self.opens = folder, manifest, backend, opens
        self.sessions: dict[int, VisionSession] = {}

    def after_load(self, kernels: Kernels) -> None:
        if self.opens:
            words = "vision tower: %s, %s, batches of %s, from %s"
            sizes = ", ".join(map(str, self.manifest.batch_sizes))
            log.info(words, self.backend, self.manifest.dtype, sizes, self.folder)
            self.sessions = {size: self._open(size, kernels.device) for size in self.manifest.batch_sizes}

    def _open(self, size: int, device: torch.device) -> VisionSession:
        shapes = [(size, *node.shape) for node in self.manifest.inputs]
        return open_session(self.backend, self.folder / graph_file(size, self.backend), shapes, device)

    def bytes_once_ready(self) -> int:
        """A graph has weights of its own for each size of batch. An om's size, where there is none, is the onnx's."""
        files = [self.folder / graph_file(size, "om") for size in self.manifest.batch_sizes]
        if self.backend == "om" and all(path.exists() for path in files):
            return sum(path.stat().st_size for path in files)
        return sum(self.manifest.files.values())

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        kinds = [TORCH[node.dtype] for node in self.manifest.inputs]
        arrays = [x.to("cpu", kind) for x, kind in zip(inputs, kinds, strict=True)]
        parts, first = [], 0
        for size, count in split_batch(len(inputs[0]), self.manifest.batch_sizes):
            batch = [pad(x[first : first + count], size).numpy() for x in arrays]
            parts.append(torch.from_numpy(self.sessions[size].run(batch))[:count])
            first += count
        return torch.cat(parts).to(inputs[0])


def pad(x: torch.Tensor, size: int) -> torch.Tensor:
    """Repeats the last row up to `size` rows."""
    return torch.cat((x, x[-1:].expand(size - len(x), *x.shape[1:]))) if len(x) < size else x


def graph_inputs(tower: Tower, dtype: str) -> tuple[GraphInput, ...]:
    """What a graph of the tower takes, numbers in `dtype`."""
    examples: Sequence[torch.Tensor] = tower.example_inputs(1)
    words = [dtype if x.is_floating_point() else WORDS[x.dtype] for x in examples]
    return tuple(
        GraphInput(name, tuple(x.shape[1:]), word)
        for name, x, word in zip(tower.input_names, examples, words, strict=True)
    )


def weight_names(model: MultimodalModel) -> list[str]:
    """The checkpoint's tensors that a torch tower is made of, by our names."""
    return [f"{model.tower_name}.{name}" for name, _ in model.get_submodule(model.tower_name).named_parameters()]


def hash_weights(checkpoint: Checkpoint, names: Iterable[str]) -> str:
    """tower_hash of these tensors; UserError where one is missing."""
    names = sorted(names)
    missing = [name for name in names if name not in checkpoint.files]
    if missing:
        raise UserError(
            f"{checkpoint.folder}: {len(missing)} tensors of the vision tower missing (first: {missing[0]})"
        )
    dtypes, shapes = checkpoint.dtypes, checkpoint.shapes
    return tower_hash({name: (dtypes[name], shapes[name], checkpoint.source_sha256(name)) for name in names})
