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
from mmdist.precision.compare import Compared, LayerError, compare_layers, compare_request
from mmdist.precision.saved_answers import is_by_picture
from mmdist.precision.scores import pair_ids
from mmdist.precision.verdict import Limits, Verdict, judge, markdown, write
from mmdist.task_config import PrecisionConfig
from mmdist.tasks import precision_scores
from mmdist.tasks.generate import settings_of
from mmdist.tasks.job import make_output_dir
from mmdist.tasks.precision_sides import RunJob, Side, make_sides, read_side, run_side
from mmdist.tasks.requests import merge_params
from mmdist.tasks.retrieval import read_pairs
from mmdist.tasks.sources import Source, check_source, open_source

ON_RANKS = False
STARTS_JOBS = True
log = logging.getLogger("mmdist.precision")


@dataclass
class Asked:
    """What both sides are asked: ids, the generation settings of the well-formed ones, and where they are from.

    image_of_text: of retrieval, the picture each text belongs to, where that is known.
    """

    ids: list[str]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    source: Source | None = None
    image_of_text: list[int] | None = None


def check(config: PrecisionConfig) -> None:
    precision_scores.check(config)
    is_run = any(side.saved is None for side in make_sides(config))
    if config.data is None and config.images is None and is_run:
        raise UserError("data= is missing: a requests.jsonl, or a folder of pictures with prompt=TEXT")
    if config.data is not None and (is_run or not Path(config.data).is_dir()):
        check_source(Path(config.data), config.prompt, "data")


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
    verdict = compare(config, sides, found, asked)
    write(folder, verdict)
    print(markdown(verdict), end="")
    log.info("all figures in %s", folder / "precision.json")
    return 0 if verdict.passed else EXIT_FAILED


def find_asked(config: PrecisionConfig) -> Asked:
    """Nothing where two saved files are compared."""
    if config.images is not None:
        pairs = read_pairs(Path(config.images), Path(str(config.texts)))
        image_ids, text_ids = pair_ids((name for name, _ in pairs.images), pairs.texts)
        return Asked([*image_ids, *text_ids], image_of_text=pairs.image_of_text)
    if config.data is None:
        return Asked([])
    source = open_source(Path(config.data), config.prompt, "data")
    if not source.entries:
        raise UserError(f"data={config.data}: no requests in it")
    settings = settings_by_id({str(entry["id"]): entry for entry in source.entries}, config)
    for name, own in settings.items():
        if own["temperature"] != 0:
            raise UserError(
                f"data={config.data}: request {name} has temperature={own['temperature']}: only greedy answers can be "
                "compared; give 0, or leave it out"
            )
    return Asked([str(entry["id"]) for entry in source.entries], settings, source)


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
    if is_by_picture(side.saved):
        answers = precision_scores.texts_by_picture(side.saved, asked.source, side.key)
    else:
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


def compare(config: PrecisionConfig, sides: list[Side], answers: dict[str, Answers], asked: Asked) -> Verdict:
    words, failed = {side.name: side.words for side in sides}, {name: side.failed for name, side in answers.items()}
    compared: list[Compared] = []
    layers: list[LayerError] = []
    if config.reference != "none":
        compared, layers = compare_sides(config, sides, answers["reference"], answers["ours"])
    limits = Limits(**{f.name: getattr(config, f.name) for f in fields(Limits)})
    scores = precision_scores.find_scores(config, asked.source, answers)
    if asked.image_of_text is not None:
        scores.append(precision_scores.count_found(asked.ids, asked.image_of_text, answers))
    verdict = judge(compared, layers, limits, words, failed, scores)
    for side in sides if compared else ():
        if not says_settings(answers[side.name]):
            verdict.notes.append(f"{side.where} does not say its generation settings, which may differ")
    return verdict


def compare_sides(
    config: PrecisionConfig, sides: list[Side], reference: Answers, ours: Answers
) -> tuple[list[Compared], list[LayerError]]:
    """What failed on either side is left out."""
    check_ids(reference.lines, ours.lines, sides[0].where)
    check_settings(saved_settings(reference), saved_settings(ours), sides[0].where)
    check_prompts(reference, ours)
    names = [name for name in ours.lines if name not in reference.failed and name not in ours.failed]
    compared = [compare_request(name, reference, ours) for name in names]
    if any(side.saved is None for side in sides) and config.data is not None:
        name_tokens(config, compared)
    layers = compare_layers(names, reference, ours) if config.layers else []
    if config.layers and not layers:
        raise UserError(
            "layers=true: a saved side has no layers; make it with task=generate record=layers, and keep the folder "
            "FILE.record beside it"
        )
    return compared, layers


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
