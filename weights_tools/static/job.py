"""`weights_tools export MODEL --static`: the folder of ONNX files, their weights, compile.sh and the processor's files.

Weights are written tensor by tensor as every verb does; an ONNX file gets its name once onnxruntime agrees with torch
about it, so that a killed run need not ask again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import onnx
import torch
from tqdm import tqdm

from mmdist.config import UserError
from mmdist.models.family import build_model, find_model, load_model_config
from mmdist.models.mllama import Mllama
from mmdist.plan import shard_plan
from mmdist.quant_files import find_format
from mmdist.rank_file import sha256
from mmdist.tp import TP
from weights_tools.display import size_words
from weights_tools.folder import EXPORT, absolute, copy_other_files
from weights_tools.job import Files, FolderJob
from weights_tools.source import find_source, open_source
from weights_tools.static.check import Reference, check_part
from weights_tools.static.compile_sh import NAME, compile_script
from weights_tools.static.graph import Graph
from weights_tools.static.modes import Modes, read_modes
from weights_tools.static.parts import build_graphs, changed, find_place, static_shape, weight_files
from weights_tools.values import count_bytes

FAMILY = "mllama"


def run(args: argparse.Namespace, seq_length: int, modes: dict[str, str | None]) -> int:
    """modes: what was given for each; None: nothing was."""
    family, folder = find_source(args.folder, None)
    if family != FAMILY:
        raise UserError(f"--static: written for {FAMILY}, {folder} is a {family}")
    dst = absolute(args.dst)
    job = StaticJob(folder, seq_length, modes)
    if args.dry_run:
        job.check(dst, force=args.force)
    else:
        job.write(dst, force=args.force, jobs=args.jobs)
    total = size_words(sum(job.file_sizes().values()))
    words = "; nothing was written" if args.dry_run else f"; compile them with {dst / NAME}"
    print(f"{dst}: {sum(map(len, job.graphs.values()))} ONNX files, {total} of weights in float32{words}")
    return 0


class StaticJob(FolderJob):
    verb = "export"

    def __init__(self, folder: Path, seq_length: int, asked_modes: dict[str, str | None]):
        kind = find_model(FAMILY)
        if find_format(folder) is not None:
            raise UserError(f"{folder}: quantised; the compiler does that itself, so give the plain checkpoint")
        self.checkpoint = open_source(FAMILY, folder)
        config = load_model_config(kind, folder)
        model = build_model(kind, config, TP(), torch.float32)
        assert isinstance(model, Mllama), "the family's model"
        self.network = model
        self.checkpoint.check(shard_plan(model, TP()), FAMILY)
        super().__init__(FAMILY, folder, sorted(set(self.checkpoint.files.values())))
        self.shape = static_shape(model, seq_length)
        self.modes = read_modes(asked_modes, self.shape, model.num_layers, model.decoder.shape.intermediate_size)
        files = weight_files(self.checkpoint.names, self.checkpoint.shapes)
        self.graphs = build_graphs(model, self.shape, files)
        self.layouts = {file.file: file.layout for file in files.values()}
        self.file_of = {name: files[find_place(name).part].file for name in self.checkpoint.names}
        dtypes, shapes = self.checkpoint.dtypes, self.checkpoint.shapes
        self.sizes = {name: count_bytes(dtypes[name], shapes[name]) for name in sorted(self.file_of)}

    def settings(self) -> dict[str, Any]:
        return {"format_version": 1, "seq_length": self.shape.seq_length, **mode_facts(self.modes)}

    def write_tensor(self, name: str, files: Files) -> dict[str, Any]:
        stored, tensor = self.checkpoint.names[name], changed(name, self.checkpoint.read_whole(name)).contiguous()
        files[self.file_of[name]].write(stored, tensor)
        return {"name": name, "stored": stored, "sha256": sha256(tensor)}

    def write_rest(self, folder: Path, entries: list[dict[str, Any]]) -> None:
        reference = Reference(self.network, self.checkpoint, self.shape)
        for part in tqdm(self.graphs, desc="checking", unit="part", disable=not sys.stderr.isatty()):
            write_checked(part, self.graphs[part], folder, reference)
        layers, cross = self.network.num_layers, self.network.cross_layers.keys()
        script = folder / NAME
        script.write_text(compile_script(self.modes, self.shape.seq_length, layers, cross))
        script.chmod(0o755)
        copy_other_files(self.src, folder)
        networks = sorted(path.name for path in folder.glob("*.onnx"))
        record = {
            "model": self.model,
            "source": str(self.src),
            "static": self.settings(),
            "networks": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in networks},
            "sha256": {entry["stored"]: entry["sha256"] for entry in entries},
        }
        (folder / EXPORT).write_text(json.dumps(record, indent=1) + "\n")


def mode_facts(modes: Modes) -> dict[str, Any]:
    return {"mode": modes.rest, "modes": dict(modes.chosen)}


def write_checked(part: str, graphs: dict[str, Graph], folder: Path, reference: Reference) -> None:
    """The ONNX files of a part, under their names once they are known to be right."""
    contents = {name: graph.model().SerializeToString(deterministic=True) for name, graph in graphs.items()}
    paths = {name: folder / f"{name}.onnx" for name in graphs}
    if all(path.exists() and path.read_bytes() == contents[name] for name, path in paths.items()):
        return  # by the run that was stopped
    unchecked = {name: path.with_suffix(".onnx.partial") for name, path in paths.items()}
    for name, path in unchecked.items():
        path.write_bytes(contents[name])
        onnx.checker.check_model(path, full_check=True)
    check_part(part, unchecked, reference)
    for name, path in unchecked.items():
        path.rename(paths[name])
