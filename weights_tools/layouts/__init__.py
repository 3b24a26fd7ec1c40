"""Original layouts: one file a family, with SETTINGS (the legal --set keys, each with its help line) and read()."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Protocol

from mmdist.config import UserError
from mmdist.models.family import list_models
from weights_tools.layouts.source import Converted, Source


class Layout(Protocol):
    """A file of this folder that has a family's name."""

    SETTINGS: dict[str, str]

    def read(self, source: Source) -> Converted: ...


def list_layouts() -> list[str]:
    return [name for name in list_models() if (Path(__file__).parent / f"{name}.py").exists()]


def find_layout(family: str) -> Layout:
    if family in list_layouts():
        return import_module(f"weights_tools.layouts.{family}")
    plain = ", ".join(name for name in list_models() if name not in list_layouts())
    raise UserError(
        f"{family}: no family with an original layout; convert knows: {', '.join(list_layouts())} "
        f"({plain} are read as the Hugging Face folders they are and need no conversion)"
    )
