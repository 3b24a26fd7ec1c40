"""The house: who may import whom, and names that are said once."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

import pytest

from mmdist.models.family import list_models
from mmdist.task_config import TASKS

REPOSITORY = Path(__file__).parents[1]
# Floors from the ground up; a file imports from its own floor's folder or from lower floors.
FLOORS = (
    ("mmdist.config", "mmdist.log", "mmdist.invocation"),
    ("mmdist.task_config", "mmdist.media", "mmdist.shipped", "mmdist.channel"),
    ("mmdist.usage",),
    ("mmdist.native", "mmdist.cores", "mmdist.ascend", "mmdist.ports"),
    ("mmdist.collectives", "mmdist.hccl"),
    ("mmdist.backend", "mmdist.tp", "mmdist.blocks", "mmdist.agent", "mmdist.spans"),
    ("mmdist.plan", "mmdist.manifest"),
    ("mmdist.quant",),
    ("mmdist.kernels", "mmdist.quant_files"),
    ("mmdist.rank_file", "mmdist.checked", "mmdist.vision_folder", "mmdist.vision_session"),
    ("mmdist.weights",),
    ("mmdist.loading",),
    ("mmdist.layers",),
    ("mmdist.models",),
    ("mmdist.engine",),
    ("mmdist.doctor", "mmdist.performance", "mmdist.precision", "mmdist.serving"),
    ("mmdist.tasks",),
    ("mmdist.launch", "mmdist.compose", "weights_tools"),
    ("mmdist.sweep",),
    ("mmdist.cli", "mmdist.llm_job", "mmdist.llm_rank"),
    ("mmdist.llm",),
    ("mmdist.__main__",),
    ("launch",),
)
ENTRY = ("mmdist.cli", "mmdist.compose")
FILES = [REPOSITORY / "launch.py", *REPOSITORY.glob("mmdist/**/*.py"), *REPOSITORY.glob("weights_tools/**/*.py")]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def floor(module: str) -> int | None:
    for number, names in enumerate(FLOORS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return number
    return None


def room(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] == "weights_tools" else ".".join(parts[:2])


def imports(tree: ast.AST) -> list[tuple[str, bool]]:
    """(module, inside a function) of each import of ours."""
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f) if n is not f}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [(name, id(node) in inside) for name in names]
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down(path: Path) -> None:
    own = module_name(path)
    for name, inside in imports(ast.parse(path.read_text())):
        assert not inside, f"{own} imports {name} inside a function"
        if name.partition(".")[0] not in ("mmdist", "weights_tools", "launch", "tests"):
            continue
        target = floor(name)
        assert target is not None, f"{own} imports {name}, which has no floor"
        mine = floor(own)
        if own in ("mmdist", "mmdist.__init__"):
            continue
        assert mine is not None, f"{own} has no floor"
        assert target < mine or room(name) == room(own) or own.startswith("mmdist.launch"), f"{own} imports {name}"


@pytest.mark.parametrize("path", [p for p in FILES if module_name(p) not in ENTRY], ids=module_name)
def test_hydra_stops_at_the_entry(path: Path) -> None:
    names = {name.partition(".")[0] for name, _ in imports(ast.parse(path.read_text()))}
    allowed = {"omegaconf"} if module_name(path) == "weights_tools.source" else set()  # reads conf/model alone
    assert not names & {"hydra", "omegaconf"} - allowed


def test_config_and_log_stand_on_the_standard_library() -> None:
    for name in FLOORS[0]:
        tree = ast.parse((REPOSITORY / (name.replace(".", "/") + ".py")).read_text())
        assert not {n.partition(".")[0] for n, _ in imports(tree)} & {"torch", "numpy", "transformers", "mmdist"}


def test_a_yaml_is_a_file() -> None:
    assert sorted(path.stem for path in REPOSITORY.glob("conf/model/*.yaml")) == list_models()
    assert sorted(path.stem for path in REPOSITORY.glob("conf/task/*.yaml")) == sorted(TASKS)
    for name in TASKS:
        task = import_module(f"mmdist.tasks.{name}")
        assert isinstance(task.ON_RANKS, bool) and callable(task.check) and callable(task.run)
