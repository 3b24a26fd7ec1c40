"""Compile the C sources of this folder for the CPU at hand, once, into the user's cache, and open the library.

`load_library` is the door. What the CPU can do is read from /proc/cpuinfo; the file's name is a hash of the sources,
the compiler and its flags, so it is never stale.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mmdist.config import UserError
from mmdist.shipped import cache_folder

log = logging.getLogger("mmdist.native")
SOURCES = Path(__file__).parent
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread", "-fvisibility=hidden")
COMPILE_S = 300


@dataclass(frozen=True)
class Level:
    flags: tuple[str, ...]  # of the compiler
    needs: frozenset[str]  # words of /proc/cpuinfo


# What the psABI's x86-64-v3 and v4 stand for, in Linux's words (abm: lzcnt).
V3 = frozenset(["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"])
V4 = V3 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
WIDE = ("-march=x86-64-v4", "-mprefer-vector-width=512")
# The best first.
LEVELS = {
    "avx512_bf16": Level((*WIDE, "-mavx512bf16", "-mavx512vnni"), V4 | {"avx512_bf16", "avx512_vnni"}),
    "avx512": Level(WIDE, V4),
    "avx2": Level(("-march=x86-64-v3",), V3),
    "portable": Level((), frozenset()),
}


class BuildError(Exception):
    """Why there is no library: one line, with what to do about it."""


@dataclass(frozen=True)
class Toolchain:
    """What a library is made with."""

    level: str
    compiler: tuple[str, ...]  # its command
    version: str  # the first line of its --version


@dataclass(frozen=True)
class Native:
    """The opened library; `level` is what it was compiled for."""

    level: str
    path: Path
    lib: ctypes.CDLL

    def declare(self, name: str, result: type | None, *arguments: type) -> Callable:
        """The exported function `name` with its C types."""
        function = getattr(self.lib, name)
        function.restype, function.argtypes = result, list(arguments)
        return function


def load_library(level: str = "auto") -> Native | None:
    """The kernels compiled for `level` (hardware.kernels), compiling them if no one has yet.

    None for "plain", and where "auto" finds no way, which is logged once a machine. UserError when the CPU or the
    compiler cannot have a level that was asked for.
    """
    return None if level == "plain" else load_level(level)


@cache
def load_level(level: str) -> Native | None:
    try:
        return open_level(level)
    except BuildError as error:
        if level != "auto":
            raise UserError(f"hardware.kernels={level}: {error}") from None
        if os.environ.get("LOCAL_RANK", "0") == "0":
            log.warning("no native kernels: %s; plain torch is used instead", error)
        return None


def open_level(level: str) -> Native:
    """BuildError where there is no way; UserError for a level that the CPU lacks."""
    toolchain = find_toolchain(level)
    path = build(toolchain)
    return Native(toolchain.level, path, open_library(path))


def describe_kernels(level: str) -> dict[str, str]:
    """{level, detail} of what load_library would give, for people; nothing is compiled."""
    if level == "plain":
        return {"level": "plain", "detail": "torch's own"}
    try:
        toolchain = find_toolchain(level)
    except BuildError as error:
        return {"level": "plain", "detail": f"torch's own: {error}"}
    return {"level": toolchain.level, "detail": toolchain.version}


def find_toolchain(level: str) -> Toolchain:
    name = find_level(level, platform.machine(), cpu_words())
    compiler = find_compiler()
    return Toolchain(name, compiler, compiler_version(compiler))


def find_level(level: str, machine: str, words: frozenset[str]) -> str:
    """auto -> the best level of a CPU; UserError for one that it lacks."""
    known = machine in ("x86_64", "aarch64")
    legal = [name for name, spec in LEVELS.items() if spec.needs <= words]
    if level == "auto":
        if not known:
            raise BuildError(f"unknown CPU {machine} (hardware.kernels=portable tries)")
        return legal[0]
    if level not in legal:
        raise UserError(
            f"hardware.kernels={level}: this CPU ({machine}) has not got it; legal: plain, {', '.join(legal)}"
        )
    return level


def cpu_words() -> frozenset[str]:
    """Flags of the first CPU in /proc/cpuinfo ("Features" on aarch64); empty where there are none."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, words = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return frozenset(words.split())
    return frozenset()


def find_compiler() -> tuple[str, ...]:
    """CC, if set; else the first of cc, gcc and clang."""
    asked = shlex.split(os.environ.get("CC", ""))
    if asked:
        if shutil.which(asked[0]) is None:
            raise BuildError(f"CC={os.environ['CC']}: no such program; unset CC or name a C compiler")
        return tuple(asked)
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name) is not None:
            return (name,)
    raise BuildError("no C compiler (CC, cc, gcc, clang); install gcc or clang")


def compiler_version(compiler: tuple[str, ...]) -> str:
    result = run_compiler([*compiler, "--version"])
    if result.returncode:
        raise BuildError(f"{shlex.join(compiler)} --version failed: {first_error(result.stderr)}; check CC")
    return result.stdout.partition("\n")[0]


def build(toolchain: Toolchain, sources: Path = SOURCES) -> Path:
    """The compiled library; of several processes that ask at once, one compiles and the others wait."""
    words = " ".join(sorted(cpu_words()))  # -mcpu=native: a home may be shared by unlike machines
    parts = [toolchain.version, *toolchain.compiler, toolchain.level, platform.machine(), words, *FLAGS]
    key = hashlib.sha256("\0".join([*parts, *LEVELS[toolchain.level].flags]).encode())
    for path in sorted([*sources.glob("*.c"), *sources.glob("*.h")]):
        key.update(f"\0{path.name}\0".encode() + path.read_bytes())
    try:
        path = cache_folder() / f"kernels-{toolchain.level}-{key.hexdigest()[:16]}.so"
        if not path.exists():
            with locked(path.with_suffix(".lock")):
                if not path.exists():
                    compile_library(toolchain, sources, path)
    except OSError as error:
        raise BuildError(f"{error}; set XDG_CACHE_HOME to a folder that can be written") from None
    return path


def compile_library(toolchain: Toolchain, sources: Path, path: Path) -> None:
    """One shared object of all *.c files, under its name only when it is whole."""
    flags = [*FLAGS, *LEVELS[toolchain.level].flags]
    if platform.machine() == "aarch64" and accepts(toolchain.compiler, "-mcpu=native"):
        flags.append("-mcpu=native")
    log.info("compiling the kernels for %s into %s", toolchain.level, path.parent)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    files = [str(file) for file in sorted(sources.glob("*.c"))]
    try:
        result = run_compiler([*toolchain.compiler, *flags, "-o", str(partial), *files, "-lm"])
        if result.returncode:
            raise BuildError(f"{shlex.join(toolchain.compiler)} failed: {first_error(result.stderr)}")
        with partial.open("rb") as made:
            os.fsync(made.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def run_compiler(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{shlex.join(command[:1])}: {error}") from None


def accepts(compiler: tuple[str, ...], flag: str) -> bool:
    return run_compiler([*compiler, flag, "-E", "-x", "c", os.devnull]).returncode == 0


def first_error(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "no reason given")


def open_library(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:  # e.g. a file system mounted noexec
        raise BuildError(f"{error}; set XDG_CACHE_HOME to a folder that allows execution") from None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("a") as lock:
        with suppress(OSError):  # a file system without locks: several may compile, the rename is still whole
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
