"""Put a split folder together as the folder it was cut from, or write a model's decoder as a folder of its own.

Written to DST.partial and renamed when whole; export.json says where it comes from and has the hash of every tensor.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterator
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
from weights_tools.convert import group_files, index_text
from weights_tools.display import byte_bar, size_words
from weights_tools.folder import (
    absolute,
    check_apart,
    check_space,
    check_target,
    claim,
    copy_other_files,
    mark,
    publish,
    sync_all,
)
from weights_tools.layouts.source import few
from weights_tools.part_file import Layout, PartFile, build_header
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
    parser.add_argument("folder", metavar="DIR", help="a folder made by split, or with --part decoder any checkpoint")
    parser.add_argument("--dst", metavar="DIR", required=True, help="the folder to write")
    parser.add_argument(
        "--part", choices=["decoder"], help="the language model alone, as transformers' own class has it"
    )
    parser.add_argument("--force", action="store_true", help="replace DST when it is a folder made by export")
    parser.add_argument("--dry-run", action="store_true", help="check everything and write nothing")


def run(args: argparse.Namespace) -> int:
    folder, dst = absolute(args.folder), absolute(args.dst)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a folder made by weights_tools split, or a checkpoint")
    check_apart(folder, dst)
    check_target(dst, args.force, "export")
    job = DecoderJob(folder) if args.part == "decoder" else ExportJob(folder)
    if not args.dry_run:
        job.write(dst, force=args.force)
    for file, size in job.file_sizes().items():
        print(f"{dst / file}: {size_words(size)}")
    words = "; nothing was written" if args.dry_run else ""
    print(f"{dst}: {len(job.tensors)} tensors{job.left_out()}, {size_words(job.num_bytes)}{words}")
    return 0


class ExportJob:
    """All of a split folder.

    tensors: our name -> the name to write. files: name of each file to write -> our names of the tensors in it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.model, self.checkpoint = open_whole(folder)
        if isinstance(self.checkpoint, JoinedCheckpoint):
            self.checkpoint.restore(find_format(folder))
        self.tensors = self._choose()
        self.files = self._group()
        self.hashes: dict[str, str] = {}

    def _choose(self) -> dict[str, str]:
        if not (self.folder / MANIFEST).exists():
            raise UserError(f"{self.folder}: {self._why_not()}")
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
        if find_format(self.folder) is not None or all(map(NUMBERED.fullmatch, groups)):
            return groups
        return group_files({name: self._on_meta(name) for name in self.tensors})

    def _on_meta(self, name: str) -> torch.Tensor:
        return torch.empty(self.checkpoint.shapes[name], dtype=self.checkpoint.dtype(name), device="meta")

    @property
    def num_bytes(self) -> int:
        return sum(count_bytes(self.checkpoint.dtypes[name], self.checkpoint.shapes[name]) for name in self.tensors)

    def left_out(self) -> str:
        return ""

    def layout(self, file: str) -> Layout:
        checkpoint = self.checkpoint
        return [(self.tensors[name], checkpoint.dtypes[name], checkpoint.shapes[name]) for name in self.files[file]]

    def file_sizes(self) -> dict[str, int]:
        return {file: build_header(self.layout(file))[2] for file in self.files}

    def record(self) -> dict[str, Any]:
        return {"model": self.model, "source": str(self.folder), "sha256": self.hashes}

    def write(self, dst: Path, *, force: bool) -> None:
        partial = dst.with_name(f"{dst.name}.partial")
        check_space(partial, self.file_sizes())
        with claim(partial, "export", self.record()):
            with byte_bar(self.num_bytes, "exporting") as bar:
                for file in self.files:
                    for size in self._write_file(partial / file):
                        bar.update(size)
            self._write_index(partial)
            self.write_other_files(partial)
            mark(partial, "export").write_text(json.dumps(self.record(), indent=1) + "\n")
            sync_all([*partial.iterdir(), partial])
            publish(partial, dst, force, "export")

    def _write_file(self, path: Path) -> Iterator[int]:
        """Bytes of each tensor as it is written."""
        file = PartFile(path, self.layout(path.name))
        try:
            for name in self.files[path.name]:
                tensor = self.checkpoint.read_whole(name)
                file.write(self.tensors[name], tensor)
                self.hashes[self.tensors[name]] = sha256(tensor)
                yield tensor.nbytes
        finally:
            file.close()

    def _write_index(self, folder: Path) -> None:
        if len(self.files) > 1:
            stored = {file: [self.tensors[name] for name in names] for file, names in self.files.items()}
            (folder / index_name(self.files)).write_text(index_text(stored, self.num_bytes))

    def write_other_files(self, folder: Path) -> None:
        copy_other_files(self.folder, folder)


def index_name(files: dict[str, list[str]]) -> str:
    """model.safetensors.index.json for model-00001-of-00003.safetensors, and so for other first words."""
    numbered = NUMBERED.fullmatch(next(iter(files)))
    return INDEX if numbered is None else f"{numbered[1]}{INDEX.removeprefix('model')}"


class DecoderJob(ExportJob):
    """The decoder and its head, where transformers' class for such a decoder has exactly these tensors."""

    def _choose(self) -> dict[str, str]:
        family = find_model(self.model)
        config = load_model_config(family, self.folder)
        if not issubclass(family, MultimodalModel):
            raise UserError(f"{self.folder}: {self.model} has no decoder; --part decoder is for models that generate")
        self.config = config.text_config
        self.config.tie_word_embeddings = family.is_tied(config)
        if self.config.model_type not in DECODERS:
            known = ", ".join(DECODERS)
            raise UserError(f"{self.folder}: a decoder of type {self.config.model_type}; export writes {known}")
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
            raise UserError(f"{self.folder}: its decoder is no {kind.__name__}: {words}")
        for name, shape in stock.items():
            if ours[name] != shape:
                raise UserError(f"{self.folder}: {name} is {list(ours[name])}, {kind.__name__} has {list(shape)}")
        self.config.architectures = [kind.__name__]

    def _group(self) -> dict[str, list[str]]:
        return group_files({name: self._on_meta(name) for name in self.tensors})

    def left_out(self) -> str:
        return f" ({len(self.checkpoint.names) - len(self.tensors)} are not the decoder's)"

    def write_other_files(self, folder: Path) -> None:
        for name in TOKENIZER_FILES:
            if (self.folder / name).exists():
                shutil.copyfile(self.folder / name, folder / name)
        self.config.dtype = DTYPES[self.checkpoint.dtypes["decoder.norm.weight"]]
        self.config.save_pretrained(folder)
