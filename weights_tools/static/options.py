"""The options of `weights_tools export --static`; what they start needs the extra `onnx` and is imported then."""

from __future__ import annotations

import argparse
from importlib import import_module
from importlib.util import find_spec

from mmdist.config import UserError
from weights_tools.job import whole_number

SEQ_LENGTH = 512
# As compile.sh and pipeline.py of the published example have them.
MODES = {"int4": "W4BF16 in groups of 64 (the default)", "int8": "W8BF16", "bf16": "BF16"}
REST = ""  # a mode given without blocks is for all that no other mode names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("mllama's networks as ONNX files of fixed shapes, for TPU-MLIR")
    group.add_argument("--static", action="store_true", help="write them, checked against torch, and compile.sh")
    group.add_argument("--seq-length", type=whole_number, metavar="N", help=f"tokens; default {SEQ_LENGTH}")
    for mode, words in MODES.items():
        group.add_argument(
            f"--{mode}", nargs="?", const=REST, metavar="BLOCKS",
            help=f"compile.sh makes the blocks and lm_head {words}; or only these, e.g. 0-3,39,lm_head",
        )  # fmt: skip


def check_options(args: argparse.Namespace) -> None:
    given = [name for name in ("seq_length", *MODES) if getattr(args, name) is not None]
    if given and not args.static:
        raise UserError(f"--{given[0].replace('_', '-')} is of --static; leave it out, or add that")
    if args.static and args.part is not None:
        raise UserError(f"--part {args.part}: not with --static; run the two one after the other")


def run(args: argparse.Namespace) -> int:
    if find_spec("onnx") is None or find_spec("onnxruntime") is None:
        raise UserError("--static: needs onnx and onnxruntime; install them: pip install 'mmdist[onnx]'")
    modes = {mode: getattr(args, mode) for mode in MODES}
    return import_module("weights_tools.static.job").run(args, args.seq_length or SEQ_LENGTH, modes)
