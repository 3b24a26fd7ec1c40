"""The tests of the native kernels once more, with every access to memory checked by the address sanitizer."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mmdist.native.build import LEVELS, cpu_words, find_compiler

TESTS = Path(__file__).parent
FILES = ("test_native_ops.py", "test_native_linear.py", "test_native_attention.py")
BEST = next(name for name, level in LEVELS.items() if level.needs <= cpu_words())


@pytest.mark.parametrize("level", (BEST, "portable"))
def test_no_access_beyond_the_memory(level: str, tmp_path: Path) -> None:
    compiler = find_compiler()
    asked = subprocess.run([*compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    library = Path(asked.stdout.strip())
    if not library.is_absolute():
        pytest.skip(f"{shlex.join(compiler)} has no libasan.so")
    environment = {
        **os.environ,
        "CC": f"{shlex.join(compiler)} -fsanitize=address -fno-omit-frame-pointer",
        "XDG_CACHE_HOME": str(tmp_path),
        "LD_PRELOAD": str(library),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
    }
    files = [str(TESTS / name) for name in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", level, *files]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert list(tmp_path.glob(f"mmdist/kernels-{level}-*.so")), "the kernels in use were others"
