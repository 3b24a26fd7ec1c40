"""The native library: chosen by what the CPU has, compiled once, kept in the user's cache, never the end of a job."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mmdist.config import KERNELS, UserError
from mmdist.native import build
from mmdist.native.build import LEVELS, BuildError, Toolchain

SOURCE = '__attribute__((visibility("default"))) int mmdist_answer(int x) { return x + ANSWER; }\n'
BUILD = """
import sys, ctypes
from pathlib import Path
from mmdist.native import build
path = build.build(build.find_toolchain("auto"), Path(sys.argv[1]))
print(path, build.open_library(path).mmdist_answer(1))
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    build.load_level.cache_clear()
    yield tmp_path / "cache" / "mmdist"
    build.load_level.cache_clear()


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.h").write_text("#define ANSWER 41\n")
    (folder / "answer.c").write_text('#include "answer.h"\n' + SOURCE)
    return folder


def compiler(path: Path, script: str) -> str:
    """A compiler of ours, as CC."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def make(sources: Path, level: str = "auto") -> Path:
    return build.build(build.find_toolchain(level), sources)


def test_config_names_the_levels() -> None:
    assert set(KERNELS) == {"auto", "plain", *LEVELS}


def test_the_best_level_a_cpu_has() -> None:
    words = {name: spec.needs for name, spec in LEVELS.items()}
    for name in LEVELS:
        assert build.find_level("auto", "x86_64", words[name] | {"sse4_2"}) == name
    assert build.find_level("auto", "aarch64", frozenset({"asimd", "bf16"})) == "portable"
    assert build.find_level("avx2", "x86_64", words["avx512_bf16"]) == "avx2"
    with pytest.raises(UserError, match=r"avx512: this CPU \(x86_64\) has not got it; legal: plain, avx2, portable"):
        build.find_level("avx512", "x86_64", words["avx2"])
    with pytest.raises(BuildError, match="unknown CPU riscv64"):
        build.find_level("auto", "riscv64", frozenset())
    assert build.find_level("portable", "riscv64", frozenset()) == "portable"


def test_processes_that_start_together_compile_once(sources: Path, own_cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "compiled"
    cc = compiler(tmp_path / "counting-cc", f'[ "$1" = --version ] || {{ echo x >> {log}; sleep 0.3; }}; exec cc "$@"')
    command = [sys.executable, "-c", BUILD, str(sources)]
    env = {**os.environ, "CC": cc, "PYTHONPATH": str(Path(__file__).parents[1])}
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) for _ in range(4)]
    answers = {job.communicate(timeout=120)[0].strip() for job in jobs}
    (library,) = own_cache.glob("*.so")
    assert answers == {f"{library} 42"} and log.read_text() == "x\n"
    assert not list(own_cache.glob("*.partial"))


def test_the_cache_follows_sources_and_flags(sources: Path, own_cache: Path) -> None:
    first = make(sources)
    made = first.stat().st_mtime_ns
    assert make(sources) == first and first.stat().st_mtime_ns == made
    assert make(sources, "portable") != first
    (sources / "answer.h").write_text("#define ANSWER 1\n")
    second = make(sources)
    assert second != first and ctypes.CDLL(str(second)).mmdist_answer(1) == 2
    assert {first, second} < set(own_cache.iterdir())


def test_an_interrupted_compilation_leaves_nothing(sources: Path, own_cache: Path) -> None:
    (sources / "answer.h").write_text("#define ANSWER nothing\n")
    with pytest.raises(BuildError, match=r"cc failed: .*answer\.h:1:.* error: .*nothing"):
        make(sources)
    assert not list(own_cache.glob("*.so")) and not list(own_cache.glob("*.partial"))


@pytest.mark.parametrize("home", ("file/home", "/proc"))
def test_a_home_that_cannot_be_written(
    home: str, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / home))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    private = tmp_path / f"mmdist-{os.getuid()}"
    assert make(sources).parent == private and stat.S_IMODE(private.stat().st_mode) == 0o700
    private.chmod(0o777)
    with pytest.raises(BuildError, match="not a folder of this user alone"):
        make(sources)
    shutil.rmtree(private)
    private.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BuildError, match=r"File exists|not a folder of this user alone"):
        make(sources)


BROKEN = {
    "missing": ("/nowhere/cc", "CC=/nowhere/cc: no such program"),
    "mute": ("false", "--version failed: no reason given"),
    "no-asm": ("", "failed: cc: error: the back end is not installed"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_without_a_compiler_torch_is_used_and_one_line_says_why(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cc, reason = BROKEN[kind]
    script = '[ "$1" = --version ] && exec cc --version; echo "cc: error: the back end is not installed" >&2; exit 1'
    monkeypatch.setenv("CC", cc or compiler(tmp_path / "broken-cc", script))
    with caplog.at_level(logging.WARNING):
        assert build.load_library() is None and build.load_library() is None
    (line,) = (record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert reason in line and "plain torch is used instead" in line
    with pytest.raises(UserError, match=r"hardware\.kernels=portable: .*" + reason.split(":")[0]):
        build.load_library("portable")
    caplog.clear()
    assert build.load_library("plain") is None and not caplog.messages


def test_a_library_that_cannot_be_opened_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "kernels.so").write_text("not one")
    with pytest.raises(BuildError, match="XDG_CACHE_HOME"):
        build.open_library(tmp_path / "kernels.so")


@pytest.mark.parametrize("level", LEVELS)
def test_our_sources_compile_without_warnings(level: str, tmp_path: Path) -> None:
    """Every level, whether this CPU could run it or not."""
    if build.platform.machine() != "x86_64" and level != "portable":
        pytest.skip("flags of x86_64")
    cc = ("cc", "-Wall", "-Wextra", "-Werror")
    build.compile_library(Toolchain(level, cc, ""), build.SOURCES, tmp_path / "kernels.so")


def test_declared_functions_check_their_arguments(sources: Path) -> None:
    path = make(sources)
    answer = build.Native("portable", path, build.open_library(path)).declare(
        "mmdist_answer", ctypes.c_int, ctypes.c_int
    )
    assert answer(1) == 42
    with pytest.raises(ctypes.ArgumentError):
        answer("one")
