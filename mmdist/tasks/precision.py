"""task=precision: our answers beside a reference's, number by number.

Each side is a job of its own, started one after the other from this process, which has no ranks: so memory is never
held twice, and a side that fails is named. What they wrote is then compared.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mmdist.config import EXIT_FAILED, UserError
from mmdist.engine.load import find_checkpoint
from mmdist.models.family import find_model, load_model_config
from mmdist.precision.answers import Answers, check_ids, check_prompts, check_settings
from mmdist.precision.compare import Compared, compare_layers, compare_request
from mmdist.precision.scores import pair_ids
from mmdist.precision.verdict import Limits, Verdict, judge, markdown, write
from mmdist.task_config import PrecisionConfig
from mmdist.tasks.generate import settings_of
from mmdist.tasks.job import make_output_dir
from mmdist.tasks.precision_sides import RunJob, Side, make_sides, read_side, run_side
from mmdist.tasks.requests import merge_params, read_folder, read_requests
from mmdist.tasks.retrieval import list_images, read_lines

ON_RANKS = False
STARTS_JOBS = True
log = logging.getLogger("mmdist.precision")


@dataclass
class Asked:
    """What both sides are asked: ids, and the generation settings of the well-formed ones."""

    ids: list[str]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)


def check(config: PrecisionConfig) -> None:
    sides = make_sides(config)
    if config.data is None and config.images is None:
        if any(side.saved is None for side in sides):
            raise UserError("data= is missing: a requests.jsonl, or a folder of pictures with prompt=TEXT")
    elif config.data is not None:
        check_data(Path(config.data), config.prompt)


def check_data(path: Path, prompt: str | None) -> None:
    if not path.exists():
        raise UserError(f"data={path}: no such file or folder")
    if path.is_dir() == (prompt is None):
        raise UserError(
            f"data={path} is a folder of pictures: ask something with prompt=TEXT"
            if path.is_dir()
            else f"data={path} is a file of requests, which have their own prompts: leave prompt= out"
        )


def run(config: PrecisionConfig, run_job: RunJob) -> int:
    asked, sides = find_asked(config), make_sides(config)
    found = {side.name: read_saved(side, asked) for side in sides if side.saved is not None}
    folder = make_output_dir(config)
    for side in sides:
        if side.name not in found:
            answers = run_side(side, config, asked.ids, folder / side.name, run_job)
            if isinstance(answers, int):
                return answers
            found[side.name] = answers
    verdict = compare(config, sides, found["reference"], found["ours"])
    write(folder, verdict)
    print(markdown(verdict), end="")
    log.info("all figures in %s", folder / "precision.json")
    return 0 if verdict.passed else EXIT_FAILED


def find_asked(config: PrecisionConfig) -> Asked:
    """Nothing where two saved files are compared."""
    if config.images is not None:
        names = [name for name, _ in list_images(Path(config.images))]
        image_ids, text_ids = pair_ids(names, read_lines(Path(str(config.texts)), "texts"))
        return Asked([*image_ids, *text_ids])
    if config.data is None:
        return Asked([])
    path = Path(config.data)
    listed = list(read_folder(path, str(config.prompt), "data") if path.is_dir() else read_requests(path))
    if not listed:
        raise UserError(f"data={path}: no requests in it")
    settings = settings_by_id({str(entry["id"]): entry for entry in listed}, config)
    for name, own in settings.items():
        if own["temperature"] != 0:
            raise UserError(
                f"data={path}: request {name} has temperature={own['temperature']}: only greedy answers can be "
                "compared; give 0, or leave it out"
            )
    return Asked([str(entry["id"]) for entry in listed], settings)


def settings_by_id(entries: dict[str, dict[str, Any]], config: PrecisionConfig) -> dict[str, dict[str, Any]]:
    found = {}
    for name, entry in entries.items():
        try:
            found[name] = settings_of(merge_params(entry, config))
        except UserError:
            continue  # both sides will answer it with this error
    return found


def read_saved(side: Side, asked: Asked) -> Answers:
    """Checked against what is going to be asked before anything runs."""
    assert side.saved is not None, "a side that is computed has no file yet"
    answers = read_side(side.saved, side.key)
    if asked.ids:
        check_ids(answers.lines, asked.ids, side.where)
        check_settings(saved_settings(answers), asked.settings, side.where)
    return answers


def saved_settings(answers: Answers) -> dict[str, dict[str, Any]]:
    return {name: line["params"] for name, line in answers.lines.items() if "params" in line}


def says_settings(answers: Answers) -> bool:
    """False where some answers were generated in ways that the file does not tell."""
    return all("params" in line for line in answers.lines.values() if "token_ids" in line and "error" not in line)


def compare(config: PrecisionConfig, sides: tuple[Side, Side], reference: Answers, ours: Answers) -> Verdict:
    check_ids(reference.lines, ours.lines, sides[0].where)
    check_settings(saved_settings(reference), saved_settings(ours), sides[0].where)
    check_prompts(reference, ours)
    failed = {"reference": reference.failed, "ours": ours.failed}
    names = [name for name in ours.lines if not any(name in errors for errors in failed.values())]
    compared = [compare_request(name, reference, ours) for name in names]
    if any(side.saved is None for side in sides) and config.data is not None:
        name_tokens(config, compared)
    layers = compare_layers(names, reference, ours) if config.layers else []
    if config.layers and not layers:
        raise UserError(
            "layers=true: a saved side has no layers; make it with task=generate record=layers, and keep the folder "
            "FILE.record beside it"
        )
    limits = Limits(**{f.name: getattr(config, f.name) for f in fields(Limits)})
    verdict = judge(compared, layers, limits, {side.name: side.words for side in sides}, failed)
    for side, answers in zip(sides, (reference, ours), strict=True):
        if not says_settings(answers):
            verdict.notes.append(f"{side.where} does not say its generation settings, which may differ")
    return verdict


def name_tokens(config: PrecisionConfig, compared: list[Compared]) -> None:
    """The likeliest tokens of a divergence in words too."""
    divergences = [request.divergence for request in compared if request.divergence is not None]
    if not divergences:
        return
    family, folder = find_model(config.model.name), find_checkpoint(config)
    processor = family.load_processor(folder, load_model_config(family, folder), config.model)
    for divergence in divergences:
        for token in (*divergence.reference, *divergence.ours):
            token["text"] = processor.decode([token["token_id"]])
