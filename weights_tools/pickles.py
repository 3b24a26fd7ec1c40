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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pickle protocols; torch.jit is deprecated, but OpenAI's CLIP comes so
            return read_any(path, allow_torchscript)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # damaged bytes end in whatever their reader trips over
        raise refusal(path, error) from error


def read_any(path: Path, allow_torchscript: bool) -> Any:
    with open(path, "rb") as raw:
        is_zip = raw.read(len(ZIP)) == ZIP
    if is_zip and not zipfile.is_zipfile(path):
        raise UserError(f"{path}: truncated; copy it again")
    if not (is_zip and is_torchscript(path)):
        return torch.load(path, weights_only=True, mmap=is_zip, map_location="cpu")
    if not allow_torchscript:
        raise UserError(f"{path}: a TorchScript archive where a state dict is expected; give a file of weights alone")
    return torch.jit.load(path, map_location="cpu").state_dict()


def is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def refusal(path: Path, error: Exception) -> UserError:
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code is None:
        return UserError(f"{path}: damaged, or no checkpoint of torch.save ({type(error).__name__}); copy it again")
    words = f"contains code (GLOBAL {code[1]}); refused, nothing was executed; give a file of weights alone"
    return UserError(f"{path}: {words}")
