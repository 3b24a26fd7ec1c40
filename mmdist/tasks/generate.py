"""task=generate: answers for requests, pictures of a folder or questions of an arrow file; can be stopped and resumed.

With images= and texts= it compares instead: see mmdist.tasks.retrieval.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from mmdist.config import SAMPLING_KEYS, SamplingParams, UserError
from mmdist.engine.load import AnyEngine
from mmdist.engine.record import Recorder, record_folder
from mmdist.engine.request import Request
from mmdist.task_config import GenerateConfig
from mmdist.tasks import retrieval
from mmdist.tasks.answering import answer
from mmdist.tasks.sources import Source, check_source, open_source
from mmdist.tasks.stopwatch import Stopwatch

ON_RANKS = True
log = logging.getLogger("mmdist.generate")


def check(config: GenerateConfig) -> None:
    if config.images is not None:
        retrieval.check(config)
        return
    check_source(Path(str(config.input)), config.prompt, "input")


def run(config: GenerateConfig, engine: AnyEngine) -> int:
    if config.images is not None:
        return retrieval.run(config, engine)
    source = open_source(Path(str(config.input)), config.prompt, "input")
    entries = source.entries
    path = Path(config.output) if config.output else Path(str(config.output_dir)) / "answers.jsonl"
    done = keep_answers(path)
    log.info("%d requests, %d of them answered already, answers in %s", len(entries), len(done), path)
    if config.record != "none":
        engine.recorder = Recorder(record_folder(path), engine.stages() if config.record == "layers" else {})
    with path.open("a") as file, tqdm(total=len(entries), unit="request", disable=not sys.stderr.isatty()) as bar:
        batch = Batch(engine, config, source, file, bar)
        todo = [entry for entry in entries if str(entry["id"]) not in done]
        bar.update(len(entries) - len(todo))
        batch.run(todo)
    if batch.num_failed:
        log.warning('%d of %d requests failed; see "error" in %s', batch.num_failed, len(entries), path)
    return 1 if batch.num_failed else 0


def keep_answers(path: Path) -> set[str]:
    """Ids answered by an earlier run; what a kill cut in half, and what failed, is dropped and asked again."""
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            raise UserError(f"output={path}: cannot write there ({error.strerror})") from error
        return set()
    kept = []
    for line in path.read_text().splitlines():
        try:
            answer = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(answer, dict) or "id" not in answer:
            raise UserError(f"output={path}: not a file of answers; choose another name")
        if "error" not in answer:
            kept.append(answer)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(answer) + "\n" for answer in kept))
    partial.replace(path)
    return {str(answer["id"]) for answer in kept}


class Batch:
    """Runs entries through the engine and writes each answer as soon as it is there."""

    def __init__(self, engine: AnyEngine, config: GenerateConfig, source: Source, file: IO[str], bar: tqdm):
        self.engine, self.config, self.source, self.file, self.bar = engine, config, source, file, bar
        self.stopwatch = Stopwatch()
        self.num_failed = 0
        self.settings: dict[str, dict[str, Any]] = {}

    def run(self, entries: list[dict[str, Any]]) -> None:
        for output in self.stopwatch.outputs(answer(self.engine, entries, self.build)):
            if output.error is not None:
                self.write(output.line())
            elif output.finish_reason is not None:
                if self.engine.recorder is not None:
                    self.engine.recorder.save(output.id)
                settings, timing = self.settings.pop(output.id), self.stopwatch.timing(output.id)
                line = output.line() | ({} if output.logprobs is None else {"params": settings})
                self.write(line | ({"timing": timing} if self.config.timing else {}))

    def build(self, entry: dict[str, Any]) -> Request:
        with self.stopwatch.reading(str(entry["id"])):
            request = self.source.build(entry, self.engine.prompts, self.config)
        self.settings[request.id] = settings_of(request.params)
        return request

    def write(self, line: dict[str, Any]) -> None:
        self.num_failed += "error" in line
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self.bar.update()


def settings_of(params: SamplingParams) -> dict[str, Any]:
    """What an answer depends on, as JSON has it: answers are compared with those of the same settings only."""
    settings = {name: getattr(params, name) for name in SAMPLING_KEYS if name != "logprobs"}
    return settings | {"logit_bias": {str(token_id): bias for token_id, bias in params.logit_bias.items()}}
