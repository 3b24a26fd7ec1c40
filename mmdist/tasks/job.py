"""The one output folder of a job, made by rank 0; and what a sweep knows of its jobs."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from mmdist.config import Config, UserError


@dataclass
class SweepJob:
    """words: its command line; changed: those of its keys that the sweep changes; config: None where problem says why.

    status: "ok", "failed: WHY", or "finished before".
    """

    words: list[str]
    changed: dict[str, str]
    config: Config | None
    problem: str = ""
    folder: Path = Path()
    status: str = ""


def make_output_dir(config: Config) -> Path:
    """output_dir=, else outputs/DATE/TIME; holds the config as it ran and the log."""
    folder = Path(config.output_dir) if config.output_dir else fresh_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
        file = logging.FileHandler(folder / "run.log")
    except OSError as error:
        raise UserError(
            f"output_dir={folder}: cannot write there ({error.strerror}); choose another output_dir="
        ) from error
    root = logging.getLogger("mmdist")
    file.setFormatter(root.handlers[0].formatter)
    root.addHandler(file)
    config.output_dir = str(folder)
    return folder


def fresh_folder() -> Path:
    """outputs/DATE/TIME, numbered where two jobs start within a second."""
    base = Path("outputs") / datetime.now().strftime("%Y-%m-%d/%H-%M-%S")
    names = [base, *(base.with_name(f"{base.name}-{i}") for i in range(1, 1000))]
    for folder in names:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                f"{folder}: cannot write there ({error.strerror}); choose a folder with output_dir="
            ) from error
    raise UserError(f"{base}: too many jobs within a second; choose a folder with output_dir=")
