"""Quantise the linear layers of a checkpoint's language model: W8A16 or W4A16, symmetric, calibrated if asked.

Vision, projector, embeddings, norms and lm_head stay as they are. Written to DST.partial and renamed when whole; run
the same command again after a kill and it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from mmdist.config import UserError
from mmdist.models.family import build_model, check_world_size, find_model, load_model_config
from mmdist.models.quantized import check_plain, linears
from mmdist.plan import shard_plan
from mmdist.quant import FORMATS, Scheme
from mmdist.quant_files import find_format
from mmdist.rank_file import sha256
from mmdist.tp import TP
from mmdist.weights import Checkpoint
from weights_tools.calibrate import Calibration, calibrate
from weights_tools.convert import WORDS, group_files, index_text, num_bytes
from weights_tools.display import size_words
from weights_tools.folder import QUANTIZATION, absolute, check_target, other_files
from weights_tools.job import Files, FolderJob, add_job_arguments, whole_number
from weights_tools.offsets import NOT_PORTABLE, find_offsets
from weights_tools.part_file import Layout
from weights_tools.quant_folder import CONFIG, QuantFolder, quant_folder
from weights_tools.source import find_source, open_source
from weights_tools.split import SplitJob

BITS = {"w8a16": 8, "w4a16": 4}
GROUP_SIZES = {"w8a16": 0, "w4a16": 128}
# A weight is quantised by runs of rows with about this many numbers, so that what is made on the way stays small.
CHUNK = 1 << 19


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a family as in conf/model, or a checkpoint folder")
    parser.add_argument("--scheme", choices=BITS, required=True, help="bits of weights; activations stay as they are")
    parser.add_argument(
        "--group-size", type=int, metavar="N",
        help="columns that share a scale, 0 for whole rows; default: 0 for w8a16, 128 for w4a16",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=FORMATS, default="ascend",
        help="ascend: as msmodelslim writes it, for MindIE and vllm-ascend (default); compressed-tensors: for vLLM "
        "and transformers; mmdist reads both",
    )  # fmt: skip
    parser.add_argument("--src", metavar="DIR", help="the checkpoint; default: the family's demo_checkpoint")
    parser.add_argument("--dst", metavar="DIR", help="the folder to write; default: beside the source, SRC-SCHEME")
    parser.add_argument("--ranks", type=whole_number, metavar="N", help="cut it for N ranks too, as DST-tpN")
    parser.add_argument(
        "--calibration", metavar="FILE",
        help="requests as task=generate takes them: weights are scaled and clipped for what these put into the layers",
    )  # fmt: skip
    add_job_arguments(parser, QuantizeJob.verb)


def run(args: argparse.Namespace) -> int:
    model, src = find_source(args.model, args.src)
    dst = absolute(args.dst) if args.dst else src.with_name(f"{src.name}-{args.scheme}")
    group_size = GROUP_SIZES[args.scheme] if args.group_size is None else args.group_size
    job = QuantizeJob(model, src, args.format, Scheme(BITS[args.scheme], group_size))
    job.check(dst, force=args.force)
    cut = None if args.ranks is None else dst.with_name(f"{dst.name}-tp{args.ranks}")
    if cut is not None:
        job.check_ranks(args.ranks)
        check_target(cut, args.force, SplitJob.verb)
    if args.calibration is not None:
        job.calibrate(absolute(args.calibration))
    if not args.dry_run:
        job.write(dst, force=args.force, jobs=args.jobs)
        if job.calibration is not None:
            print(job.calibration.report())
    sizes = f"{size_words(sum(job.sizes.values()))} -> {size_words(sum(job.file_sizes().values()))}"
    words = "; nothing was written" if args.dry_run else ""
    print(f"{dst}: {len(job.weights)} of {len(job.sizes)} tensors quantised as {args.scheme}, {sizes}{words}")
    if cut is not None and not args.dry_run:
        SplitJob(model, dst, args.ranks).write(cut, force=args.force, jobs=args.jobs)
        print(f"{cut}: the same for {args.ranks} ranks")
    return 0


class QuantizeJob(FolderJob):
    """One checkpoint, one scheme and one format.

    weights: the tensors of the source that are quantised. outputs: tensor of the source -> what becomes of it, by the
    names it is stored under, on meta. file_of: stored name -> file.
    """

    verb = "quantize"

    def __init__(self, model: str, src: Path, format: str, scheme: Scheme):
        self.weights = find_weights(model, src)
        self.checkpoint = Checkpoint(src, {})  # by the names in the files, and all that is in them
        super().__init__(model, src, sorted(set(self.checkpoint.files.values())))
        self.format, self.scheme = format, scheme
        self.folder: QuantFolder = quant_folder(format, scheme)
        check_group_size(scheme, {name: self.checkpoint.shapes[name][1] for name in sorted(self.weights)}, src)
        names = sorted(self.checkpoint.names, key=lambda name: (self.checkpoint.files[name], name))
        self.calibration: Calibration | None = None
        self.calibration_sha256: str | None = None
        self.outputs = {name: self._store(name, self._on_meta(name)) for name in names}
        self.sizes = {name: num_bytes(self._on_meta(name)) for name in names}
        self.layouts, self.file_of = self._lay_out()

    def _on_meta(self, name: str) -> torch.Tensor:
        return torch.empty(self.checkpoint.shapes[name], dtype=self.checkpoint.dtype(name), device="meta")

    def _lay_out(self) -> tuple[dict[str, Layout], dict[str, str]]:
        stored = {name: tensor for output in self.outputs.values() for name, tensor in output.items()}
        groups = group_files(stored)
        files = {file.replace("model", self.folder.stem, 1): names for file, names in groups.items()}
        layouts = {
            file: [(name, WORDS[stored[name].dtype], tuple(stored[name].shape)) for name in names]
            for file, names in files.items()
        }
        return layouts, {name: file for file, names in files.items() for name in names}

    def check_ranks(self, size: int) -> None:
        """Refuse a world size that what is written could not be cut for."""
        family = find_model(self.model)
        check_world_size(family, load_model_config(family, self.src), size, self.folder.format)

    def calibrate(self, requests: Path) -> None:
        """Before write(): what the requests put into the layers decides the integers."""
        self.calibration = calibrate(self.model, self.src, requests, self.scheme)
        self.calibration_sha256 = hashlib.sha256(requests.read_bytes()).hexdigest()

    def settings(self) -> dict[str, Any]:
        calibration = {"calibration_sha256": self.calibration_sha256}
        return {"format_version": 1, "format": self.format, "bits": self.scheme.bits, **calibration}

    def _store(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is stored of a tensor of the source."""
        if name not in self.weights:
            return {name: tensor}
        if tensor.is_meta:
            return {name.removesuffix("weight") + leaf: made for leaf, made in self.folder.store(tensor).items()}
        whole = {n: torch.empty_like(t, device="cpu") if t.is_meta else t for n, t in self.outputs[name].items()}
        filled: Counter[str] = Counter()
        for rows in tensor.split(max(2, CHUNK // tensor.shape[1] // 2 * 2)):  # formats may store rows in pairs
            amax = None if self.calibration is None else self.calibration.amax(name, rows, self.scheme)
            for leaf, part in self.folder.store(rows, amax).items():
                stored = name.removesuffix("weight") + leaf
                if self.outputs[name][stored].is_meta:  # its rows follow from the weight's; else it is known already
                    whole[stored][filled[stored] : filled[stored] + len(part)] = part
                    filled[stored] += len(part)
        return whole

    def write_tensor(self, name: str, files: Files) -> dict[str, Any]:
        tensor = self.checkpoint.read_whole(name)
        entry = {
            "name": name,
            "source_file": self.checkpoint.files[name].name,
            "source_sha256": sha256(tensor),
            "dtype": self.checkpoint.dtypes[name],
            "shape": list(tensor.shape),
        }
        stored = self._store(name, tensor if self.calibration is None else self.calibration.scaled(name, tensor))
        for stored_name, part in stored.items():
            if part.is_floating_point() and name in self.weights and not part.isfinite().all():
                raise UserError(f"{self.checkpoint.files[name]}: {name} has NaN or infinite values; it has no scale")
            files[self.file_of[stored_name]].write(stored_name, part)
        hashes = {n: entry["source_sha256"] if part is tensor else sha256(part) for n, part in stored.items()}
        return {**entry, "stored": hashes}

    def write_rest(self, folder: Path, entries: list[dict[str, Any]]) -> None:
        shapes = {name: shape for layout in self.layouts.values() for name, _, shape in layout}
        quantised = {stored for name in self.weights for stored in self.outputs[name]}
        config = json.loads((self.src / CONFIG).read_text())
        texts = self.folder.texts(config, shapes, quantised)
        for path in other_files(self.src):
            if path.name not in texts:
                shutil.copyfile(path, folder / path.name)
        for name, content in {**texts, QUANTIZATION: self._record(entries)}.items():
            (folder / name).write_text(json.dumps(content, indent=1) + "\n")
        if len(self.layouts) > 1:
            total_size = sum(num_bytes(tensor) for output in self.outputs.values() for tensor in output.values())
            (folder / f"{self.folder.stem}.safetensors.index.json").write_text(index_text(self.layouts, total_size))

    def _record(self, entries: list[dict[str, Any]]) -> dict[str, Any]:
        """Where the folder comes from, with the hashes of what was read and what was written."""
        return {
            "model": self.model,
            "source": str(self.src),
            "scheme": self.scheme.name,
            "group_size": self.scheme.group_size,
            "format": self.format,
            "calibration_sha256": self.calibration_sha256,
            "tensors": entries,
        }


def find_weights(model: str, src: Path) -> set[str]:
    """Names in the files of the linear layers' weights; refuses a source that is not plain and whole."""
    held = find_format(src)
    if held is not None:
        offsets = f", with offsets that are not zero: {NOT_PORTABLE}" if find_offsets(Checkpoint(src, {})) else ""
        raise UserError(
            f"{src}: quantised already, as {held.scheme.name}{offsets}; give the plain checkpoint it was made from"
        )
    family, source = find_model(model), open_source(model, src)
    built = build_model(family, load_model_config(family, src), TP())
    plan = shard_plan(built, TP())
    source.check(plan, model)
    check_plain(built, plan, source)
    params = {f"{name}.weight" for name, _ in linears(built)}
    return {source.names[placement.name] for placement in plan.values() if placement.param in params}


def check_group_size(scheme: Scheme, columns: dict[str, int], src: Path) -> None:
    """columns: weight -> its columns."""
    for name, count in columns.items():
        if scheme.group_size < 0 or (scheme.group_size and count % scheme.group_size):
            common = math.gcd(*columns.values())
            legal = [size for size in (16, 32, 64, 128, 256) if common % size == 0]
            raise UserError(
                f"{src}: --group-size {scheme.group_size} does not divide the {count} columns of {name}; legal sizes: "
                f"{', '.join(map(str, [0, *legal]))}"
            )
