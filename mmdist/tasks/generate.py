"""task=generate: answers for a file of requests or a folder of pictures; can be stopped and started again.

With images= and texts= it compares instead: see mmdist.tasks.retrieval.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from mmdist.config import SAMPLING_KEYS, SamplingParams, UserError
from mmdist.engine.load import AnyEngine
from mmdist.engine.record import Recorder, record_folder
from mmdist.engine.request import Request, failed
from mmdist.task_config import GenerateConfig
from mmdist.tasks import retrieval
from mmdist.tasks.requests import build_request, read_folder, read_requests

ON_RANKS = True
log = logging.getLogger("mmdist.generate")


def check(config: GenerateConfig) -> None:
    if config.images is not None:
        retrieval.check(config)
        return
    path = Path(str(config.input))
    if not path.exists():
        raise UserError(f"input={path}: no such file or folder")
    if path.is_dir() == (config.prompt is None):
        raise UserError(
            f"input={path} is a folder of pictures: ask something with prompt=TEXT"
            if path.is_dir()
            else f"input={path} is a file of requests, which have their own prompts: leave prompt= out"
        )


def run(config: GenerateConfig, engine: AnyEngine) -> int:
    if config.images is not None:
        return retrieval.run(config, engine)
    source = Path(str(config.input))
    entries = list(read_folder(source, str(config.prompt)) if source.is_dir() else read_requests(source))
    path = Path(config.output) if config.output else Path(str(config.output_dir)) / "answers.jsonl"
    done = keep_answers(path)
    log.info("%d requests, %d of them answered already, answers in %s", len(entries), len(done), path)
    if config.record != "none":
        engine.recorder = Recorder(record_folder(path), engine.stages() if config.record == "layers" else {})
    with path.open("a") as file, tqdm(total=len(entries), unit="request", disable=not sys.stderr.isatty()) as bar:
        batch = Batch(engine, config, source if source.is_dir() else source.parent, file, bar)
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

    def __init__(self, engine: AnyEngine, config: GenerateConfig, folder: Path, file: IO[str], bar: tqdm):
        self.engine, self.config, self.folder, self.file, self.bar = engine, config, folder, file, bar
        self.num_failed = 0
        self.settings: dict[str, dict[str, Any]] = {}

    def run(self, entries: list[dict[str, Any]]) -> None:
        for output in self.engine.generate(self.requests(entries)):
            if output.finish_reason is not None:
                if self.engine.recorder is not None:
                    self.engine.recorder.save(output.id)
                settings = self.settings.pop(output.id)
                self.write(output.line() | ({} if output.logprobs is None else {"params": settings}))

    def requests(self, entries: list[dict[str, Any]]) -> Iterator[Request]:
        """Built as the engine asks for them, so that no more than a batch of pictures is in memory."""
        seen: set[str] = set()
        for entry in entries:
            name = str(entry["id"])
            try:
                if name in seen:
                    raise UserError(f"id {name} is given twice; ids must differ")
                seen.add(name)
                request = build_request(entry, self.engine.prompts, self.config, self.folder, self.config.video_frames)
            except UserError as error:
                self.write(failed(name, [], str(error)).line())
                continue
            self.settings[name] = settings_of(request.params)
            yield request

    def write(self, line: dict[str, Any]) -> None:
        self.num_failed += "error" in line
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self.bar.update()


def settings_of(params: SamplingParams) -> dict[str, Any]:
    """What an answer depends on: answers are compared with those of the same settings only."""
    return {name: getattr(params, name) for name in SAMPLING_KEYS if name != "logprobs"}
