"""Put a split folder together again, or write a model's decoder, its vision tower, or its networks as ONNX, alone.

Written to DST.partial and renamed when whole; run the same command again after a kill and it goes on where it stopped.
export.json says where it comes from and has the hash of every tensor.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers  # classes are looked up when used: importing them here would triple the start-up time

from mmdist.config import UserError
from mmdist.manifest import MANIFEST
from mmdist.models.base import MultimodalModel
from mmdist.models.family import find_model, load_model_config
from mmdist.quant_files import find_format
from mmdist.rank_file import DTYPES, sha256
from mmdist.weights import INDEX
from weights_tools import vision
from weights_tools.convert import group_files, index_text
from weights_tools.display import size_words
from weights_tools.folder import EXPORT, absolute, check_apart, check_target, copy_other_files
from weights_tools.job import Files, FolderJob, add_job_arguments
from weights_tools.layouts.source import few
from weights_tools.static import options as static
from weights_tools.values import count_bytes
from weights_tools.whole import JoinedCheckpoint, open_whole

# Our prefixes -> those of the stock classes of transformers below.
DECODER_NAMES = {"decoder.": "model.", "lm_head.": "lm_head."}
DECODERS = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "generation_config.json",
)  # fmt: skip
NUMBERED = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", metavar="DIR",
        help="a folder made by split, or with --part decoder any checkpoint; with --static and --vision also a "
        "family's name",
    )  # fmt: skip
    parser.add_argument(
        "--dst", metavar="DIR", help="the folder to write; with --vision by default DIR-vision-onnx or -om"
    )
    parser.add_argument(
        "--part", choices=["decoder"], help="the language model alone, as transformers' own class has it"
    )
    static.add_arguments(parser)
    vision.add_arguments(parser)
    add_job_arguments(parser, ExportJob.verb)


def run(args: argparse.Namespace) -> int:
    static.check_options(args)
    check_options(args)
    if args.static:
        return static.run(args)
    if args.vision is not None:
        return vision.run(args)
    folder, dst = absolute(args.folder), absolute(args.dst)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a folder made by weights_tools split, or a checkpoint")
    check_apart(folder, dst)
    check_target(dst, args.force, ExportJob.verb)
    job = DecoderJob(folder) if args.part == "decoder" else ExportJob(folder)
    if args.dry_run:
        job.check(dst, force=args.force)
    else:
        job.write(dst, force=args.force, jobs=args.jobs)
    for file, size in job.file_sizes().items():
        print(f"{dst / file}: {size_words(size)}")
    words = "; nothing was written" if args.dry_run else ""
    print(f"{dst}: {len(job.tensors)} tensors{job.left_out()}, {size_words(sum(job.sizes.values()))}{words}")
    return 0


def check_options(args: argparse.Namespace) -> None:
    if args.vision is not None:
        if args.part is not None or args.static:
            raise UserError("--vision: not with --part or --static; run one after the other")
    elif args.dst is None:
        raise UserError("--dst DIR is needed: the folder to write")
    for name in ("hardware", "soc") if args.vision == "onnx" else vision.OPTIONS if args.vision is None else ():
        if getattr(args, name) is not None:
            raise UserError(f"--{name} is of --vision {'om' if args.vision else 'onnx|om'}; leave it out, or add that")


class ExportJob(FolderJob):
    """All of a split folder.

    tensors: our name -> the name to write. file_of: our name -> the file to write it to.
    """

    verb = "export"

    def __init__(self, folder: Path):
        model, self.checkpoint = open_whole(folder)
        self.known: dict[str, str] = {}  # hashes of tensors that are checked as they are put together
        weight_files = sorted(set(self.checkpoint.files.values()))
        if isinstance(self.checkpoint, JoinedCheckpoint):
            self.known = {name: entry.source_sha256 for name, entry in self.checkpoint.entries.items()}
            self.checkpoint.restore(find_format(folder))
            weight_files = self.checkpoint.part_paths()
        super().__init__(model, folder, weight_files)
        self.tensors = self._choose()
        files = self._group()
        self.file_of = {name: file for file, names in files.items() for name in names}
        self.layouts = {file: [self._describe(name) for name in names] for file, names in files.items()}
        dtypes, shapes = self.checkpoint.dtypes, self.checkpoint.shapes
        self.sizes = {name: count_bytes(dtypes[name], shapes[name]) for name in self.tensors}

    def _choose(self) -> dict[str, str]:
        if not (self.src / MANIFEST).exists():
            raise UserError(f"{self.src}: {self._why_not()}")
        return self.checkpoint.names

    def _why_not(self) -> str:
        if find_model(self.model).config_class.__module__.startswith("transformers."):
            return "whole already, a Hugging Face folder: copy it as it is, or give a folder made by split"
        return f"transformers has no class for {self.model}, so all of it makes no stock folder; see --part decoder"

    def _group(self) -> dict[str, list[str]]:
        """The source's files, where their names say what transformers wants to read there."""
        groups: dict[str, list[str]] = {}
        for name in self.tensors:
            groups.setdefault(self.checkpoint.files[name].name, []).append(name)
        if find_format(self.src) is not None or all(map(NUMBERED.fullmatch, groups)):
            return groups
        return group_files({name: self._on_meta(name) for name in self.tensors})

    def _on_meta(self, name: str) -> torch.Tensor:
        return torch.empty(self.checkpoint.shapes[name], dtype=self.checkpoint.dtype(name), device="meta")

    def _describe(self, name: str) -> tuple[str, str, tuple[int, ...]]:
        return self.tensors[name], self.checkpoint.dtypes[name], self.checkpoint.shapes[name]

    def left_out(self) -> str:
        return ""

    def settings(self) -> dict[str, Any]:
        return {"format_version": 1}  # what is written of the source, the layouts say

    def write_tensor(self, name: str, files: Files) -> dict[str, Any]:
        tensor = self.checkpoint.read_whole(name)
        files[self.file_of[name]].write(self.tensors[name], tensor)
        return {"name": name, "stored": self.tensors[name], "sha256": self.known.get(name) or sha256(tensor)}

    def write_rest(self, folder: Path, entries: list[dict[str, Any]]) -> None:
        if len(self.layouts) > 1:
            (folder / index_name(self.layouts)).write_text(index_text(self.layouts, sum(self.sizes.values())))
        self.write_other_files(folder)
        hashes = {entry["stored"]: entry["sha256"] for entry in entries}
        record = {"model": self.model, "source": str(self.src), "sha256": hashes}
        (folder / EXPORT).write_text(json.dumps(record, indent=1) + "\n")

    def write_other_files(self, folder: Path) -> None:
        copy_other_files(self.src, folder)


def index_name(files: Iterable[str]) -> str:
    """model.safetensors.index.json for model-00001-of-00003.safetensors, and so for other first words."""
    numbered = NUMBERED.fullmatch(next(iter(files)))
    return INDEX if numbered is None else f"{numbered[1]}{INDEX.removeprefix('model')}"


class DecoderJob(ExportJob):
    """The decoder and its head, where transformers' class for such a decoder has exactly these tensors."""

    def _choose(self) -> dict[str, str]:
        family = find_model(self.model)
        config = load_model_config(family, self.src)
        if not issubclass(family, MultimodalModel):
            raise UserError(f"{self.src}: {self.model} has no decoder; --part decoder is for models that generate")
        self.config = config.text_config
        self.config.tie_word_embeddings = family.is_tied(config)
        if self.config.model_type not in DECODERS:
            known = ", ".join(DECODERS)
            raise UserError(f"{self.src}: a decoder of type {self.config.model_type}; export writes {known}")
        prefixes = DECODER_NAMES.items()
        names = {name: ours for name in self.checkpoint.names for ours, _ in prefixes if name.startswith(ours)}
        renamed = {name: DECODER_NAMES[ours] + name.removeprefix(ours) for name, ours in names.items()}
        self._check(renamed)
        return renamed

    def _check(self, renamed: dict[str, str]) -> None:
        kind = getattr(transformers, DECODERS[self.config.model_type])
        with torch.device("meta"):
            stock = {name: tuple(param.shape) for name, param in kind(self.config).named_parameters()}
        ours = {stored: self.checkpoint.shapes[name] for name, stored in renamed.items()}
        unknown, missing = ours.keys() - stock.keys(), stock.keys() - ours.keys()
        if unknown or missing:
            words = f"{len(unknown)} tensors have no place in it ({few(unknown)})" if unknown else f"no {few(missing)}"
            raise UserError(f"{self.src}: its decoder is no {kind.__name__}: {words}")
        for name, shape in stock.items():
            if ours[name] != shape:
                raise UserError(f"{self.src}: {name} is {list(ours[name])}, {kind.__name__} has {list(shape)}")
        self.config.architectures = [kind.__name__]

    def _group(self) -> dict[str, list[str]]:
        return group_files({name: self._on_meta(name) for name in self.tensors})

    def left_out(self) -> str:
        return f" ({len(self.checkpoint.names) - len(self.tensors)} are not the decoder's)"

    def write_other_files(self, folder: Path) -> None:
        for name in TOKENIZER_FILES:
            if (self.src / name).exists():
                shutil.copyfile(self.src / name, folder / name)
        self.config.dtype = DTYPES[self.checkpoint.dtypes["decoder.norm.weight"]]
        self.config.save_pretrained(folder)
