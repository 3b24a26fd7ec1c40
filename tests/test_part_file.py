"""The safetensors files that verbs write: the same bytes past the page cache and through it, full disks included."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from weights_tools import part_file
from weights_tools.part_file import PAGE, STAGE_BYTES, Layout, PartFile


def make_tensors() -> dict[str, torch.Tensor]:
    """Small and large ones, so that the large begin and end at any byte of a page."""
    generator = torch.Generator().manual_seed(0)
    sizes = (3, STAGE_BYTES + 5, 1, 2 * PAGE - 7, 2 * STAGE_BYTES, 1 << 20, (1 << 20) + PAGE + 1)
    return {f"x{i}": torch.randint(256, (n,), dtype=torch.uint8, generator=generator) for i, n in enumerate(sizes)}


def write(path: Path, tensors: dict[str, torch.Tensor]) -> bytes:
    layout: Layout = [(name, "U8", tuple(x.shape)) for name, x in tensors.items()]
    file = PartFile(path, layout)
    for name in reversed(tensors):
        file.write(name, tensors[name])
    file.sync()
    file.close()
    return path.read_bytes()


def test_past_the_page_cache_and_through_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tensors = make_tensors()
    direct = write(tmp_path / "direct.safetensors", tensors)
    got = load_file(tmp_path / "direct.safetensors")
    assert all(torch.equal(x, got[name]) for name, x in tensors.items())
    monkeypatch.setattr(part_file, "open_direct", lambda _: None)
    assert write(tmp_path / "plain.safetensors", tensors) == direct


def test_short_writes_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As when a disk is nearly full, or a signal comes."""
    tensors, pwrite = make_tensors(), os.pwrite
    want = write(tmp_path / "whole.safetensors", tensors)
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[: max(1, len(data) // 2)], offset))
    monkeypatch.setattr(part_file, "open_direct", lambda path: os.open(path, os.O_WRONLY))
    assert write(tmp_path / "halves.safetensors", tensors) == want


def test_file_systems_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: Path, flags: int) -> int:
        raise OSError(22, "Invalid argument")

    with monkeypatch.context() as patched:
        patched.setattr(part_file.os, "open", refuse)
        assert part_file.open_direct(tmp_path) is None
    assert part_file.open_direct(tmp_path / "no_such" / "file") is None
