"""The two sides of task=precision: saved files, or jobs of task=generate by this engine or by transformers."""

from __future__ import annotations

import logging
import multiprocessing
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, cast

from mmdist.config import EXIT_FAILED, EXIT_USER_ERROR, UserError
from mmdist.engine.load import AnyEngine, find_checkpoint
from mmdist.engine.record import record_folder
from mmdist.log import init_log
from mmdist.models.family import check_folder, find_model
from mmdist.precision.answers import Answers, check_ids, read_answers
from mmdist.precision.scores import read_scores
from mmdist.precision.transformers_side import TransformersEngine, check_family
from mmdist.task_config import GenerateConfig, PrecisionConfig
from mmdist.tasks import generate
from mmdist.tasks.job import make_output_dir

RunJob = Callable[..., int]  # mmdist.launch.JobRunner
LOGPROBS = 20  # saved with every token, so that a side's answers can be a reference elsewhere
SCORES = ".npz"  # retrieval's files, where all others are lines of JSON
log = logging.getLogger("mmdist.precision")


@dataclass
class Side:
    """key: what the user chooses it with. saved: a file of answers; without one the side is a job of task=generate,
    with some of the user's keys replaced, by this engine or by transformers."""

    name: str
    key: str
    words: str
    saved: Path | None = None
    in_transformers: bool = False
    replaced: dict[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """As the user named it."""
        return f"{self.key}={self.saved or self.words}"


def make_sides(config: PrecisionConfig) -> list[Side]:
    """The reference, if there is one, and ours."""
    ours = Side("ours", "answers", f"this engine, {describe(config)}")
    if config.answers is not None:
        ours = Side("ours", "answers", config.answers, saved=check_file("answers", Path(config.answers)))
    return [ours] if config.reference == "none" else [make_reference(config), ours]


def describe(config: PrecisionConfig) -> str:
    return (
        f"{find_checkpoint(config)}, world_size={config.world_size}, dtype={config.dtype}, quant={config.quant.scheme}"
    )


def make_reference(config: PrecisionConfig) -> Side:
    dtype = {} if config.reference_dtype is None else {"dtype": config.reference_dtype}
    dtype_words = f", dtype={config.reference_dtype or config.dtype}"
    if config.reference == "world_size_1":
        words = f"this engine on one rank{dtype_words}"
        return Side("reference", "reference", words, replaced={"world_size": 1, **dtype})
    if config.reference == "transformers":
        check_family(config)
        words = f"transformers' generate(){dtype_words}"
        return Side("reference", "reference", words, in_transformers=True, replaced=dtype)
    path = Path(config.reference)
    if path.is_dir():
        check_folder(find_model(config.model.name), path)
        words = f"this engine, {path}, world_size={config.world_size}{dtype_words}, quant=auto"
        return Side("reference", "reference", words, replaced={"checkpoint": path, "quant": "auto", **dtype})
    if not path.exists():
        raise UserError(
            f"reference={path}: no such file or folder; give transformers, world_size_1, none, a file of answers "
            "or the folder of a checkpoint"
        )
    return Side("reference", "reference", str(path), saved=path)


def check_file(key: str, path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{key}={path}: no such file; give one that task=generate wrote")
    return path


def read_side(path: Path, key: str) -> Answers:
    return read_scores(path, key) if path.suffix == SCORES else read_answers(path, key)


def run_side(side: Side, config: PrecisionConfig, ids: Iterable[str], folder: Path, run_job: RunJob) -> Answers | int:
    """Its answers to all ids; or, said in the log, the exit code of a job that ended before."""
    output = folder / ("answers.jsonl" if config.images is None else f"scores{SCORES}")
    output.unlink(missing_ok=True)  # an earlier run's answers would be kept
    shutil.rmtree(record_folder(output), ignore_errors=True)
    keys = {
        "input": config.data,
        "record": "none" if config.reference == "none" else "layers" if config.layers else "logits",
        "timing": True,
        "logprobs": LOGPROBS if config.logprobs is None else config.logprobs,
        "output_dir": folder,
        **side.replaced,
    }
    log.info("%s: %s", side.name, side.words)
    run = run_in_transformers if side.in_transformers else run_in_engine
    code = run(config, keys, run_job)
    try:
        if code not in (0, EXIT_FAILED):  # which may mean that some requests failed, all others answered
            raise UserError(f"exit code {code}")
        answers = read_side(output, side.key)
        check_ids(answers.lines, ids, str(output))
    except UserError as error:
        why = error if code == 0 else f"exit code {code} before all was answered, its own message is above"
        log.error("the side %s (%s) has failed: %s", side.name, side.words, why)
        return code or EXIT_FAILED
    return answers


def run_in_engine(config: PrecisionConfig, keys: dict[str, Any], run_job: RunJob) -> int:
    return run_job(GenerateConfig, task="generate", **keys)


def run_in_transformers(config: PrecisionConfig, keys: dict[str, Any], run_job: RunJob) -> int:
    """In a fresh process, which is no rank, so that nothing of it stays in memory."""
    common = {f.name: getattr(config, f.name) for f in fields(GenerateConfig) if hasattr(config, f.name)}
    keys = {**common, **keys, "output_dir": str(keys["output_dir"]), "world_size": 1, "task": "generate"}
    process = multiprocessing.get_context("spawn").Process(
        target=answer_in_transformers, args=(GenerateConfig(**keys),), daemon=True
    )
    process.start()
    process.join()
    code = process.exitcode
    return EXIT_FAILED if code is None or code < 0 else code


def answer_in_transformers(config: GenerateConfig) -> NoReturn:
    init_log()
    try:
        make_output_dir(config)
        engine = cast(AnyEngine, TransformersEngine(config))  # it has Engine's door
        sys.exit(generate.run(config, engine))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
