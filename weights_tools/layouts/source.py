"""What a layout reads from and what it makes: the original folder with the user's choices -> config and tensors."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmdist.config import UserError
from mmdist.weights import INDEX, SINGLE
from weights_tools.pickles import read_checkpoint

# Names of Hugging Face's shards and of a single file, the safer format first.
SHARDED = ((INDEX, SINGLE), ("pytorch_model.bin.index.json", "pytorch_model.bin"))


class Deferred:
    """A tensor made when it is written, so that only one such is in memory: function(*tensors), e.g. torch.cat.

    function sees meta tensors first, for shape and dtype.
    """

    def __init__(self, function: Callable[..., torch.Tensor], *tensors: torch.Tensor):
        self.function, self.tensors = function, tensors
        result = function(*(tensor.to("meta") for tensor in tensors))
        self.shape, self.dtype = result.shape, result.dtype

    def make(self) -> torch.Tensor:
        return self.function(*self.tensors)


Stored = torch.Tensor | Deferred


@dataclass
class Converted:
    """A plain folder to be: its config.json, tensors by the plan's names, further files (a path to copy, or the text).

    ignored: names in the source that are known to be of no use.
    """

    config: dict[str, Any]
    tensors: Mapping[str, Stored]
    files: Mapping[str, Path | str]
    ignored: list[str] = field(default_factory=list)


class Tensors(dict[str, torch.Tensor]):
    """A state dict by its own names, `path` it came from, and `beside`: what lay next to it in its file.

    A layout takes what it knows, drops what it knows to be of no use and then calls finish(); or it hands everything
    on under new names, and convert refuses what the model has no place for.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], path: Path, beside: Mapping[str, Any] | None = None):
        super().__init__(tensors)
        self.path, self.beside = path, dict(beside or {})

    def find(self, name: str) -> torch.Tensor:
        """A tensor that must be there."""
        if not isinstance(self.get(name), torch.Tensor):
            raise UserError(f"{self.path}: no tensor {name} in it; the file is damaged or of another model")
        return self[name]

    def take(self, name: str) -> torch.Tensor:
        """Find and remove."""
        tensor = self.find(name)
        del self[name]
        return tensor

    def drop(self, *patterns: str) -> list[str]:
        """Remove what fits one of these (`*` is any text); returns the names."""
        names = [name for name in self if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        for name in names:
            del self[name]
        return names

    def finish(self) -> None:
        """Refuse what was neither taken nor dropped."""
        if self:
            raise UserError(f"{self.path}: {len(self)} unexpected: {few(self)}; the file is of another model")


class Source:
    """The original folder (--src) and the user's choices (--set)."""

    def __init__(self, folder: Path, settings: dict[str, str]):
        self.folder, self.settings = folder, settings
        self.opened: list[Tensors] = []

    @property
    def ignored(self) -> list[str]:
        """What trainers left beside the weights and no layout popped from `beside`: optimizer, epoch, ..."""
        return [name for tensors in self.opened for name in tensors.beside]

    @property
    def paths(self) -> list[Path]:
        """The files that tensors were read from."""
        return [tensors.path for tensors in self.opened]

    def path(self, relative: str) -> Path:
        """A file or folder that must be there."""
        path = self.folder / relative
        if not path.exists():
            raise UserError(f"{path}: missing; copy it there, or choose another --src")
        return path

    def choose(self, key: str, *patterns: str) -> Path:
        """The file of --set key=FILE, else the only one that fits a pattern (relative to --src, `**` is any folder)."""
        if key in self.settings:
            return self.path(self.settings[key])
        found = sorted({path for pattern in patterns for path in self.folder.glob(pattern) if path.is_file()})
        if not found:
            raise UserError(f"{self.folder}: no {' or '.join(patterns)} in it; copy it there, or add --set {key}=FILE")
        if len(found) > 1:
            names = ", ".join(str(path.relative_to(self.folder)) for path in found)
            raise UserError(f"{self.folder}: {len(found)} to choose from: {names}; add --set {key}=FILE")
        return found[0]

    def number(self, key: str, default: int | None = None) -> int | None:
        """A whole number above 0."""
        text = self.settings.get(key)
        if text is None:
            return default
        if not text.isdecimal() or int(text) == 0:
            raise UserError(f"--set {key}={text}: expected a whole number above 0")
        return int(text)

    def json(self, path: Path) -> dict[str, Any]:
        if not path.exists():
            raise UserError(f"{path}: missing; copy it there")
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error}); copy it again") from error
        if not isinstance(content, dict):
            raise UserError(f"{path}: expected a JSON object, found a {type(content).__name__}; copy it again")
        return content

    def tensors(self, path: Path, *wrappers: str, allow_torchscript: bool = False) -> Tensors:
        """The state dict in a pickle, safetensors or (where allowed) TorchScript file, without "module." in front.

        wrappers: keys under which it may lie (the first that is there is taken).
        """
        content = read_checkpoint(path, allow_torchscript=allow_torchscript)
        if not isinstance(content, Mapping):
            raise UserError(f"{path}: holds a {type(content).__name__}, expected a state dict")
        beside: dict[str, Any] = {}
        wrapper = next((key for key in wrappers if isinstance(content.get(key), Mapping)), None)
        if wrapper is not None:
            beside = {str(key): value for key, value in content.items() if key != wrapper}
            self._refuse_tensors(path, wrapper, beside)
            content = content[wrapper]
        if content and all(str(name).startswith("module.") for name in content):
            content = {name.removeprefix("module."): value for name, value in content.items()}
        tensors = Tensors({str(name): detached(value) for name, value in content.items()}, path, beside)
        self.opened.append(tensors)
        return tensors

    def _refuse_tensors(self, path: Path, wrapper: str, beside: Mapping[str, Any]) -> None:
        loose = [name for name, value in beside.items() if isinstance(value, torch.Tensor)]
        if loose:
            raise UserError(f"{path}: {len(loose)} tensors beside {wrapper!r}, expected all in it: {few(loose)}")

    def sharded(self, folder: Path) -> Tensors:
        """The state dict of a Hugging Face folder: safetensors or .bin, one file or shards with an index."""
        for index, single in SHARDED:
            if (folder / index).exists():
                return self._shards(folder / index)
            if (folder / single).exists():
                return self.tensors(folder / single)
        names = ", ".join(name for pair in SHARDED for name in pair)
        raise UserError(f"{folder}: no weights in it, expected one of {names}; copy them there")

    def _shards(self, index: Path) -> Tensors:
        listed = self.json(index).get("weight_map")
        if not isinstance(listed, dict):
            raise UserError(f"{index}: no weight_map in it; copy it again")
        merged = Tensors({}, index)
        for file in sorted(set(listed.values())):
            if not (index.parent / file).exists():
                raise UserError(f"{index.parent / file}: missing, although {index.name} names it; copy it again")
            shard = self.tensors(index.parent / file)
            twice = merged.keys() & shard.keys()
            if twice:
                raise UserError(f"{shard.path}: {few(twice)} in another shard too; copy the folder again")
            merged.update(shard)
        lost = listed.keys() - merged.keys()
        if lost:
            raise UserError(f"{index}: {len(lost)} tensors are in no shard: {few(lost)}; copy the folder again")
        return merged


def detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def few(names: Any) -> str:
    """The first three, in order."""
    names = sorted(names)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
