"""export --vision: a family's vision tower as a graph for each size of batch, checked beside torch, with its manifest.

Written to DST.partial and renamed when whole; a run that was killed goes on behind the last graph that was finished.
om files are added to the whole folder, each when atc has made it.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmdist.config import UserError
from mmdist.kernels import plain
from mmdist.kernels.kernels import Kernels
from mmdist.loading import finish
from mmdist.models.base import MultimodalModel
from mmdist.models.exported import TORCH, graph_inputs, hash_weights, weight_names
from mmdist.models.family import build_model, find_model, list_models, load_model_config
from mmdist.models.tower import Tower
from mmdist.tp import TP
from mmdist.vision_folder import (
    FORMAT_VERSION,
    VISION_MANIFEST,
    VisionManifest,
    default_folder,
    graph_file,
    load_vision_manifest,
    save_vision_manifest,
)
from mmdist.vision_session import HAS_ONNX, INSTALL_ONNX, OnnxSession
from mmdist.weights import Checkpoint
from weights_tools.atc import HARDWARE, compile_graphs, find_soc
from weights_tools.display import size_words
from weights_tools.folder import absolute, check_apart, check_target, publish, sync_all
from weights_tools.journal import Journal
from weights_tools.source import demo_checkpoint
from weights_tools.whole import open_whole

VERB = "export --vision"
IR_VERSION = 8  # of onnx 1.13, the first with this opset
OPSET = 18  # the last that CANN's parser takes; LayerNormalization is one operator from 17 on
# |graph - torch in float32| / |torch in float32|, norms over all of the output; more is a wrong graph, not rounding.
MAX_ERROR = {"float32": 1e-4, "float16": 2e-2}
DTYPES = {"onnx": "float32", "om": "float16"}  # the defaults
OPTIONS = ("dtype", "batch", "hardware", "soc")


@dataclass(frozen=True)
class Errors:
    """A graph beside the torch tower in float32. max_abs: of any number; relative: of the norms."""

    max_abs: float
    relative: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("--vision")
    group.add_argument(
        "--vision", choices=list(DTYPES), help="the vision tower alone, as a graph (docs/vision_backends.md)"
    )
    group.add_argument(
        "--dtype", choices=list(MAX_ERROR), help="of the graph; default: float32 for onnx; om is float16 only"
    )
    group.add_argument(
        "--batch", type=batch_sizes, metavar="N[,N]", help="pictures (tiles) in one pass, a graph each; default: 1"
    )
    group.add_argument("--hardware", choices=list(HARDWARE), help="of om: what it is for")
    group.add_argument("--soc", metavar="NAME", help="of om: the chip itself, as npu-smi info shows it, say 310P3")


def batch_sizes(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(f"{text} is not whole numbers above 0, with commas between them")
    return tuple(sorted({int(word) for word in words}))


def run(args: argparse.Namespace) -> int:
    folder = demo_checkpoint(args.folder) if args.folder in list_models() else absolute(args.folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder and no family; give a checkpoint, or one of {', '.join(list_models())}"
        )
    soc = find_soc(args.hardware, args.soc) if args.vision == "om" else None
    dst = absolute(args.dst) if args.dst else default_folder(folder, args.vision)
    export = open_export(folder, args)
    goes_on = soc is not None and not args.force and lacks_om(dst, export)
    if not goes_on:
        check_apart(folder, dst)
        check_target(dst, args.force, VERB)
    if args.dry_run:
        print(f"{dst}: {', '.join(export.names())}; nothing was written")
        return 0
    if not goes_on:
        export.write(dst, force=args.force)
    print(describe(dst))
    return 0 if soc is None else compile_graphs(dst, load_vision_manifest(dst), soc)


def open_export(folder: Path, args: argparse.Namespace) -> VisionExport:
    if not HAS_ONNX:
        raise UserError(f"--vision: onnx, onnxruntime and onnxscript are needed; {INSTALL_ONNX}")
    dtype = args.dtype or DTYPES[args.vision]
    if args.vision == "om" and dtype != "float16":
        raise UserError("--dtype float32: om is float16 only (the 310P convolves in no other); use --vision onnx")
    return VisionExport(folder, dtype, args.batch or (1,))


def lacks_om(dst: Path, export: VisionExport) -> bool:
    """True where dst has the very graphs, and atc has not made an om of each."""
    if not (dst / VISION_MANIFEST).exists():
        return False
    manifest = load_vision_manifest(dst)
    same = (manifest.model, manifest.dtype, manifest.batch_sizes, manifest.weights_sha256) == (
        export.name, export.dtype, export.batch_sizes, export.weights_sha256(),
    )  # fmt: skip
    return same and not all((dst / graph_file(size, "om")).exists() for size in manifest.batch_sizes)


def describe(dst: Path) -> str:
    manifest = load_vision_manifest(dst)
    lines = [f"{dst / file}: {size_words(size)}" for file, size in manifest.files.items()]
    for size, errors in manifest.errors.items():
        words = "beside torch in float32: at most {max_abs:.2g} off, {relative:.1e} of the norm".format(**errors)
        lines.append(f"{graph_file(int(size), 'onnx')} ({manifest.dtype}) {words}")
    return "\n".join(lines)


class VisionExport:
    """One tower, one dtype and some sizes of batch."""

    def __init__(self, folder: Path, dtype: str, sizes: Sequence[int]):
        self.folder, self.dtype, self.batch_sizes = folder, dtype, tuple(sizes)
        self.name, self.checkpoint = open_whole(folder)
        family = find_model(self.name)
        if not issubclass(family, MultimodalModel):
            raise UserError(
                f"{folder}: {self.name} has no vision tower of its own (pictures and words go through the same layers, "
                "on all ranks); there is nothing to export"
            )
        model = build_model(family, load_model_config(family, folder), TP())
        assert isinstance(model, MultimodalModel)
        self.prefix, self.weights = model.tower_name, weight_names(model)
        tower = model.get_submodule(model.tower_name)
        assert isinstance(tower, Tower), f"{model.tower_name} of {self.name} is no Tower"
        self.tower, most = tower, tower.max_batch
        if most is not None and self.batch_sizes[-1] > most:
            raise UserError(
                f"--batch {self.batch_sizes[-1]}: {self.name} looks at {most} picture at a time; use {most}"
            )

    def names(self) -> list[str]:
        return [graph_file(size, "onnx") for size in self.batch_sizes]

    def weights_sha256(self) -> str:
        return hash_weights(self.checkpoint, self.weights)

    def write(self, dst: Path, *, force: bool) -> None:
        partial = dst.with_name(f"{dst.name}.partial")
        digest = self.weights_sha256()
        journal = Journal(partial, VERB, self._identity(digest))
        try:
            self._write_graphs(partial, journal)
            save_vision_manifest(self._manifest(digest, journal), partial)
            journal.path.unlink()
            sync_all([*partial.iterdir(), partial])
            publish(partial, dst, force, VERB)
        finally:
            journal.close()

    def _identity(self, digest: str) -> dict[str, Any]:
        """What must be the same for a journal to be gone on with."""
        sizes = list(self.batch_sizes)
        return {"weights": digest, "dtype": self.dtype, "batch": sizes, "torch": torch.__version__, "files": {}}

    def _write_graphs(self, folder: Path, journal: Journal) -> None:
        left = [size for size in self.batch_sizes if graph_file(size, "onnx") not in journal.done]
        if not left:
            return
        load_tower(self.tower, self.checkpoint, self.prefix)
        wanted = {size: run_tower(self.tower, size) for size in left}
        self.tower.to(TORCH[self.dtype])
        for size, want in wanted.items():
            path = folder / graph_file(size, "onnx")
            print(f"{path.name}: written and checked beside torch", file=sys.stderr)
            write_graph(self.tower, size, path)
            errors = compare(path, self.tower.example_inputs(size), want, self.dtype)
            sync_all(folder.glob(f"{path.name}*"))
            journal.add({"name": path.name, "errors": asdict(errors)})
            journal.commit(journal.take())

    def _manifest(self, digest: str, journal: Journal) -> VisionManifest:
        files = sorted(path for path in journal.path.parent.glob("vision_bs*"))
        return VisionManifest(
            format_version=FORMAT_VERSION,
            model=self.name,
            source=str(self.folder),
            weights_sha256=digest,
            dtype=self.dtype,
            opset=OPSET,
            inputs=graph_inputs(self.tower, self.dtype),
            batch_sizes=self.batch_sizes,
            errors={str(size): journal.done[graph_file(size, "onnx")]["errors"] for size in self.batch_sizes},
            files={path.name: path.stat().st_size for path in files},
        )


class GraphKernels(Kernels):
    """Plain torch without branches on numbers, which a graph cannot take."""

    def masked_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, *, scale: float
    ) -> torch.Tensor:
        return plain.masked_attention(q, k, v, mask, scale=scale)


def load_tower(tower: Tower, checkpoint: Checkpoint, prefix: str) -> None:
    """Fill a tower built on meta, in float32."""
    tower.to_empty(device="cpu")
    for name, param in tower.named_parameters():
        stored = f"{prefix}.{name}"
        if checkpoint.shapes[stored] != tuple(param.shape):
            raise UserError(
                f"{checkpoint.files[stored]}: {checkpoint.names[stored]} has shape {list(checkpoint.shapes[stored])}, "
                f"config.json asks for {list(param.shape)}; the weights and the config are of different models"
            )
        param.copy_(checkpoint.read_whole(stored))
    kernels = GraphKernels(torch.device("cpu"))
    for module in tower.modules():
        finish(module, kernels)


@torch.inference_mode()
def run_tower(tower: Tower, batch: int) -> torch.Tensor:
    return tower(*tower.example_inputs(batch))


def cast(inputs: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def write_graph(tower: Tower, batch: int, path: Path) -> None:
    """path, and the weights beside it: a protobuf holds at most 2 GiB."""
    dtype = next(tower.parameters()).dtype
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of what has no part in this: torchvision is missing
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                tower,
                cast(tower.example_inputs(batch), dtype),
                path,
                input_names=tower.input_names,
                output_names=["output"],
                opset_version=OPSET,
                external_data=True,
                verbose=False,
                dynamo=True,
            )
    finally:
        log.setLevel(level)
    tidy(path)


def tidy(path: Path) -> None:
    """Leave out where in the Python source each operator came from, and ask for no later ONNX than the operators do."""
    onnx = import_module("onnx")
    model = onnx.load(path, load_external_data=False)
    model.ir_version = IR_VERSION
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    onnx.save(model, path)
    onnx.checker.check_model(str(path))


def compare(path: Path, inputs: Sequence[torch.Tensor], want: torch.Tensor, dtype: str) -> Errors:
    """onnxruntime on the graph beside torch in float32, on noise; UserError where they are not the same function."""
    arrays = [x.numpy() for x in cast(inputs, TORCH[dtype])]
    got = torch.from_numpy(OnnxSession(path).run(arrays).astype(np.float32))
    if not got.isfinite().all():
        hint = "; export with --dtype float32" if dtype == "float16" else ""
        raise UserError(f"{path.name}: numbers outside {dtype} in its result{hint}")
    difference = (got - want).double()
    errors = Errors(float(difference.abs().max()), float(difference.norm() / want.double().norm()))
    if errors.relative > MAX_ERROR[dtype]:
        raise UserError(
            f"{path.name}: {errors.relative:.1e} of the norm off torch's tower (at most {errors.max_abs:.2g}), the "
            f"limit of {dtype} is {MAX_ERROR[dtype]:.0e}; not written; try --dtype float32, and report it"
        )
    return errors
