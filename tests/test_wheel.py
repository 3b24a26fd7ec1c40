"""A built wheel: all that the package needs is in it, and it runs where there is no repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SOURCES = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "mmdist",
    "weights_tools",
    "conf",
    "assets",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that only reads, with what an installation would have in site-packages."""
    source, wheels, site = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "site"))
    for name in SOURCES:
        path = REPOSITORY / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", str(wheels), str(source)], check=True)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(site)
    return site


def run(site: Path, folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-P", *words]
    variables = {**os.environ, "PYTHONPATH": str(site), **environment}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=120)


def test_it_has_every_file_of_the_package(site: Path) -> None:
    def list_files(folder: Path) -> set[str]:
        paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        return {str(path) for path in paths if "__pycache__" not in path.parts}

    for name, where in (("mmdist", ""), ("weights_tools", ""), ("conf", "mmdist"), ("assets", "mmdist")):
        missing = list_files(REPOSITORY / name) - list_files(site / where / name)
        assert not missing, f"{name}: {sorted(missing)[:5]} are in no wheel; see package-data in pyproject.toml"
    (entries,) = site.glob("*.dist-info/entry_points.txt")
    assert "mmdist = mmdist.cli:program" in entries.read_text()


def test_it_answers_without_the_repository(site: Path, tmp_path: Path) -> None:
    """`mmdist model=minigpt4`: two ranks, a checkpoint made of the shipped files in the user's cache."""
    cache = tmp_path / "cache"
    made = run(site, tmp_path, "-m", "mmdist", "model=minigpt4", XDG_CACHE_HOME=str(cache))
    assert made.returncode == 0 and made.stdout.endswith("a green circle and a purple circle and a white circle\n"), (
        made
    )
    assert "starting 2 ranks" in made.stderr
    (folder,) = cache.glob("mmdist/*/minigpt4-shapes")
    record = json.loads((folder / "conversion.json").read_text())
    assert record["source"] == str(site / "mmdist" / "assets" / "minigpt4-shapes")
    assert not (site / "mmdist" / "build").exists()


def test_mistakes_name_the_command_and_the_tools_find_the_model(site: Path, tmp_path: Path) -> None:
    wrong = run(site, tmp_path, "-m", "mmdist", "promt=hi")
    assert wrong.returncode == 2 and "mmdist --help lists" in wrong.stderr
    tools = run(site, tmp_path, "-m", "weights_tools", "split", "llava", "--ranks", "2", "--dst", "cut")
    assert tools.returncode == 0, tools.stderr
