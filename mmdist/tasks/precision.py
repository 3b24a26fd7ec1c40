"""task=precision: our answers beside a reference's, number by number.

Each side is a job of its own, started one after the other from this process, which has no ranks: so memory is never
held twice, and a side that fails is named. What they wrote is then compared.
"""

from __future__ import annotations

import logging
import multiprocessing
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, cast

from mmdist.config import EXIT_FAILED, EXIT_USER_ERROR, UserError
from mmdist.engine.load import AnyEngine, find_checkpoint
from mmdist.engine.record import record_folder
from mmdist.log import init_log
from mmdist.precision.answers import Answers, check_ids, check_prompts, check_settings, read_answers
from mmdist.precision.compare import compare_layers, compare_request
from mmdist.precision.transformers_side import TransformersEngine, check_family
from mmdist.precision.verdict import Limits, Verdict, judge, markdown, write
from mmdist.task_config import GenerateConfig, PrecisionConfig
from mmdist.tasks import generate
from mmdist.tasks.generate import settings_of
from mmdist.tasks.job import make_output_dir
from mmdist.tasks.requests import merge_params, read_folder, read_requests

ON_RANKS = False
STARTS_JOBS = True
RunJob = Callable[..., int]  # mmdist.launch.JobRunner
LOGPROBS = 20  # saved with every token, so that the answers can be a reference elsewhere
log = logging.getLogger("mmdist.precision")


@dataclass
class Side:
    """name: reference or ours. saved: a file of answers; without one the side is a job of task=generate, with some of
    the user's keys replaced, by this engine or by transformers."""

    name: str
    words: str
    saved: Path | None = None
    in_transformers: bool = False
    replaced: dict[str, Any] = field(default_factory=dict)


def check(config: PrecisionConfig) -> None:
    sides = make_sides(config)
    if config.data is None:
        if any(side.saved is None for side in sides):
            raise UserError("data= is missing: a requests.jsonl, or a folder of pictures with prompt=TEXT")
        return
    path = Path(config.data)
    if not path.exists():
        raise UserError(f"data={path}: no such file or folder")
    if path.is_dir() == (config.prompt is None):
        raise UserError(
            f"data={path} is a folder of pictures: ask something with prompt=TEXT"
            if path.is_dir()
            else f"data={path} is a file of requests, which have their own prompts: leave prompt= out"
        )


def make_sides(config: PrecisionConfig) -> tuple[Side, Side]:
    """(reference, ours)"""
    ours = Side("ours", f"this engine, {describe(config)}")
    if config.answers is not None:
        ours = Side("ours", config.answers, Path(config.answers))
    return make_reference(config), ours


def make_reference(config: PrecisionConfig) -> Side:
    dtype = {} if config.reference_dtype is None else {"dtype": config.reference_dtype}
    if config.reference == "world_size_1":
        return Side("reference", "this engine on one rank", replaced={"world_size": 1, **dtype})
    if config.reference == "transformers":
        check_family(config)
        return Side("reference", "transformers.generate", in_transformers=True, replaced=dtype)
    path = Path(config.reference)
    if path.is_dir():
        return Side("reference", f"checkpoint {path}", replaced={"checkpoint": path, "quant": "auto", **dtype})
    if path.is_file():
        return Side("reference", str(path), path)
    raise UserError(
        f"reference={path}: neither transformers nor world_size_1, nor a file of answers, nor a checkpoint's folder"
    )


def describe(config: PrecisionConfig) -> str:
    return f"{find_checkpoint(config)}, world_size={config.world_size}, dtype={config.dtype}"


def run(config: PrecisionConfig, run_job: RunJob) -> int:
    entries = read_entries(config)
    sides = make_sides(config)
    saved = {side.name: read_saved(side, entries, config) for side in sides if side.saved is not None}
    folder = make_output_dir(config)
    answers: dict[str, Answers] = {}
    for side in sides:
        if side.name in saved:
            answers[side.name] = saved[side.name]
            continue
        code = run_side(side, config, folder / side.name, run_job)
        found = collect(side, folder / side.name / "answers.jsonl", entries, code)
        if found is None:
            return code or EXIT_FAILED
        answers[side.name] = found
    verdict = compare(config, sides, answers["reference"], answers["ours"])
    write(folder, verdict)
    print(markdown(verdict), end="")
    log.info("all figures in %s", folder / "precision.json")
    return 0 if verdict.passed else EXIT_FAILED


def read_entries(config: PrecisionConfig) -> dict[str, dict[str, Any]]:
    """What both sides are asked, by id; nothing where two files are compared."""
    if config.data is None:
        return {}
    path = Path(config.data)
    listed = list(read_folder(path, str(config.prompt), "data") if path.is_dir() else read_requests(path))
    if not listed:
        raise UserError(f"data={path}: no requests in it")
    entries = {str(entry["id"]): entry for entry in listed}
    for name, settings in settings_by_id(entries, config).items():
        if settings["temperature"] != 0:
            raise UserError(f"data={path}: request {name} has temperature={settings['temperature']}: give 0, as only "
                            "greedy answers can be compared")  # fmt: skip
    return entries


def settings_by_id(entries: dict[str, dict[str, Any]], config: PrecisionConfig) -> dict[str, dict[str, Any]]:
    """Of the requests that are well-formed."""
    found = {}
    for name, entry in entries.items():
        try:
            found[name] = settings_of(merge_params(entry, config))
        except UserError:
            continue  # both sides will answer it with this error
    return found


def read_saved(side: Side, entries: dict[str, dict[str, Any]], config: PrecisionConfig) -> Answers:
    """A saved side, checked before anything is run against what is going to be asked."""
    key = "reference" if side.name == "reference" else "answers"
    answers = read_answers(Path(str(side.saved)), key)
    if entries:
        where = f"{key}={side.saved}"
        check_ids(answers.lines, entries, where)
        check_settings(saved_settings(answers), settings_by_id(entries, config), where)
    return answers


def saved_settings(answers: Answers) -> dict[str, dict[str, Any]]:
    return {name: line["params"] for name, line in answers.lines.items() if "params" in line}


def run_side(side: Side, config: PrecisionConfig, folder: Path, run_job: RunJob) -> int:
    """The side's answers as folder/answers.jsonl; the exit code of its job."""
    output = folder / "answers.jsonl"
    output.unlink(missing_ok=True)  # an earlier run's answers would be kept
    shutil.rmtree(record_folder(output), ignore_errors=True)
    keys = {
        "input": config.data,
        "record": "layers" if config.layers else "logits",
        "logprobs": LOGPROBS if config.logprobs is None else config.logprobs,
        "output_dir": folder,
        **side.replaced,
    }
    log.info("%s: %s", side.name, side.words)
    if side.in_transformers:
        return run_transformers(config, keys)
    return run_job(GenerateConfig, task="generate", **keys)


def run_transformers(config: PrecisionConfig, keys: dict[str, Any]) -> int:
    """The job of a side in a fresh process of its own, as no rank can be it; its exit code."""
    common = {f.name: getattr(config, f.name) for f in fields(GenerateConfig) if hasattr(config, f.name)}
    job = GenerateConfig(
        **{**common, **keys, "task": "generate", "world_size": 1, "output_dir": str(keys["output_dir"])}
    )
    process = multiprocessing.get_context("spawn").Process(target=answer_in_transformers, args=(job,), daemon=True)
    process.start()
    process.join()
    return EXIT_FAILED if process.exitcode is None or process.exitcode < 0 else process.exitcode


def answer_in_transformers(config: GenerateConfig) -> NoReturn:
    init_log()
    try:
        make_output_dir(config)
        sys.exit(generate.run(config, cast(AnyEngine, TransformersEngine(config))))  # it has Engine's door
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def collect(side: Side, output: Path, entries: dict[str, dict[str, Any]], code: int) -> Answers | None:
    """What a side's job has answered; None, said in the log, where it ended before all was answered."""
    try:
        if code > EXIT_FAILED:
            raise UserError(f"exit code {code}")
        answers = read_answers(output, side.name)
        check_ids(answers.lines, entries, str(output))
    except UserError as error:
        log.error("the side %s (%s) has failed, its own message is above: %s", side.name, side.words, error)
        return None
    return answers


def compare(config: PrecisionConfig, sides: tuple[Side, Side], reference: Answers, ours: Answers) -> Verdict:
    check_ids(reference.lines, ours.lines, f"reference={reference.path}")
    check_settings(saved_settings(reference), saved_settings(ours), f"reference={reference.path}")
    check_prompts(reference, ours)
    failed = {"reference": reference.failed, "ours": ours.failed}
    names = [name for name in ours.lines if not any(name in errors for errors in failed.values())]
    compared = [compare_request(name, reference, ours) for name in names]
    layers = compare_layers(names, reference, ours) if config.layers else []
    limits = Limits(**{f.name: getattr(config, f.name) for f in fields(Limits)})
    return judge(compared, layers, limits, {side.name: side.words for side in sides}, failed)
