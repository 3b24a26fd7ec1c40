"""What was measured, read back from performance.json: of one job, or of a sweep with several."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdist.config import UserError
from mmdist.performance.report import NAME, SCHEMA

# What makes two points of a job the same one, whatever they reached.
SIZES = {
    "batch_size": "batch",
    "input_len": "input tokens",
    "output_len": "output tokens",
    "num_pictures": "picture(s)",
    "num_video_frames": "frames",
}
LONGEST_VALUE = 32  # characters of a label
# These follow from others or name a place: they make no two results differ.
FOLLOWS = ("overrides", "threads_per_rank", "checkpoint")


@dataclass(frozen=True)
class Result:
    """One job. overrides: those that tell it from the others of its sweep; content: of its performance.json, less where
    status tells why it failed."""

    overrides: dict[str, str]
    content: dict[str, Any]
    status: str = "ok"
    folder: str = ""

    @property
    def config(self) -> dict[str, Any]:
        return self.content.get("config") or {}

    @property
    def points(self) -> list[dict[str, Any]]:
        return self.content.get("points") or []

    @property
    def measured(self) -> list[dict[str, Any]]:
        """Points with figures, the smallest batch first."""
        return sorted((p for p in self.points if p["duration"] is not None), key=lambda p: p["batch_size"])

    def at(self, batch_size: int) -> dict[str, Any] | None:
        return next((point for point in self.measured if point["batch_size"] == batch_size), None)


def read_results(path: Path) -> list[Result]:
    """Of a job's performance.json, or a sweep's; a folder is searched for it."""
    path = path / NAME if path.is_dir() else path
    content = read_json(path)
    if content.get("schema") != SCHEMA or "points" not in content:
        raise UserError(f"{path}: not a performance.json of this version (schema {SCHEMA}); measure it again")
    return split_jobs(content) if "jobs" in content else [Result({}, content)]


def join_jobs(results: Sequence[Result]) -> dict[str, Any]:
    """A sweep's performance.json: its jobs, and all their points in one list that is easily made a table."""
    about = ("config", "machine", "limits")
    return {
        "schema": SCHEMA,
        "jobs": [
            {"folder": result.folder, "status": result.status, "overrides": result.overrides}
            | {name: result.content.get(name) for name in about}
            for result in results
        ],
        "points": [
            {"job": result.folder, **result.overrides, **point} for result in results for point in result.points
        ],
    }


def split_jobs(content: dict[str, Any]) -> list[Result]:
    """What join_jobs() joined."""
    points: dict[str, list[dict[str, Any]]] = {job["folder"]: [] for job in content["jobs"]}
    for point in content["points"]:
        points[point["job"]].append(point)
    return [
        Result(job["overrides"], {**job, "points": points[job["folder"]]}, job["status"], job["folder"])
        for job in content["jobs"]
    ]


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a performance.json or its folder") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a performance.json ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a performance.json")
    return content


def differing(configs: Iterable[dict[str, Any]], but: Sequence[str] = FOLLOWS) -> list[str]:
    """Keys whose values are not the same in all."""
    configs = list(configs)
    names = dict.fromkeys(name for config in configs for name in config if name not in but)
    return [name for name in names if any(config.get(name) != configs[0].get(name) for config in configs)]


def common_batch_sizes(results: Sequence[Result]) -> list[int]:
    """Measured in all of them."""
    sizes = [{point["batch_size"] for point in result.measured} for result in results]
    return sorted(set.intersection(*sizes)) if sizes else []


def point_key(point: dict[str, Any]) -> tuple:
    return tuple(point.get(name) for name in SIZES)


def generates(results: Iterable[Result]) -> bool:
    """False where every request was one forward, without tokens."""
    return any(point["output_len"] != 1 for result in results for point in result.measured)


def scaling_groups(results: Sequence[Result]) -> dict[str, dict[int, Result]]:
    """Results that differ in their world size alone, by what they have in common and by world size, smallest first."""
    shown = [result for result in results if result.measured]
    groups: dict[str, dict[int, Result]] = {}
    for label, result in zip(name_results(shown, but=("world_size",)), shown, strict=True):
        groups.setdefault(label, {})[result.config["world_size"]] = result
    return {label: dict(sorted(group.items())) for label, group in groups.items() if len(group) > 1}


def name_results(results: Sequence[Result], but: Sequence[str] = ()) -> list[str]:
    """KEY=VALUE of the overrides that differ; short: of a key and of a path only the end where that is enough."""
    keys = [key for key in differing([result.overrides for result in results], ()) if key not in but]
    values = {key: shorten_values([result.overrides.get(key, "") for result in results]) for key in keys}
    return [" ".join(f"{key.rpartition('.')[2]}={values[key][i]}" for key in keys) for i in range(len(results))]


def shorten_values(values: Sequence[str]) -> list[str]:
    ends = [value.rstrip("/").rpartition("/")[2] for value in values]
    short = [shorten(end, LONGEST_VALUE) for end in ends]
    return short if len(set(short)) == len(set(values)) else list(values)


def shorten(text: str, longest: int) -> str:
    """Long ones keep both ends, which is where names differ."""
    half = longest // 2
    return text if len(text) <= longest else f"{text[: half - 1]}…{text[-half:]}"
