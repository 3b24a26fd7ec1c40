"""Checkpoint files as others wrote them: torch.save pickles, TorchScript archives and safetensors, mapped into memory.

Pickles are read with weights_only=True and in no other way: nothing in them is ever executed.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from mmdist.config import UserError
from mmdist.weights import open_safetensors

ZIP = b"PK\x03\x04"  # what torch.save writes since 1.6; before, a bare pickle, which cannot be mapped


def read_checkpoint(path: Path, *, allow_torchscript: bool = False) -> Any:
    """What the file holds: a dictionary, as a rule. Tensors of zip pickles and safetensors are views of the file."""
    if path.suffix == ".safetensors":
        with open_safetensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    with open(path, "rb") as raw:
        is_zip = raw.read(len(ZIP)) == ZIP
    if is_zip and not zipfile.is_zipfile(path):
        raise UserError(f"{path}: truncated; copy it again")
    if is_zip and is_torchscript(path):
        if not allow_torchscript:
            raise UserError(f"{path}: a TorchScript archive where a state dict is expected; give the file of weights")
        return read_torchscript(path)
    return read_pickle(path, mmap=is_zip)


def is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, torch.Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # torch.jit.load is deprecated, and OpenAI's CLIP is distributed no other way
            return torch.jit.load(path, map_location="cpu").state_dict()
    except RuntimeError as error:
        raise UserError(f"{path}: damaged TorchScript archive ({first_line(error)}); copy it again") from error


def read_pickle(path: Path, *, mmap: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            return torch.load(path, weights_only=True, mmap=mmap, map_location="cpu")
    except Exception as error:  # damaged bytes end in whatever the unpickler trips over
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is not None:
            raise UserError(f"{path}: contains code (GLOBAL {code[1]}); refused, nothing was executed") from error
        reason = "damaged" if mmap else "truncated, or no checkpoint of torch.save"
        raise UserError(f"{path}: {reason} ({type(error).__name__}); copy it again") from error


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
