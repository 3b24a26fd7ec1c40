"""LLM: a model in the hands of a Python program. The ranks are processes of their own, so that nothing that happens to
them happens to the program; under torchrun the program's own processes are the ranks.

    with LLM(model="llava_next", checkpoint=DIR, world_size=2) as llm:
        print(llm.generate("What is this?", images=["a.png"])[0].text)
"""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from mmdist.channel import Ask, ChannelClosed, News, Ready, Stop
from mmdist.config import SamplingParams, UserError
from mmdist.invocation import is_rank
from mmdist.llm_job import Job
from mmdist.media import user_message

if TYPE_CHECKING:
    from mmdist.engine.output import Output

Prompts = str | dict[str, Any] | Sequence[str | dict[str, Any]]
Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """settings: keys of the command line; a group is a dict (engine={"max_num_seqs": 4}), or the name of its yaml.

    A mistake, here or in a question, is a UserError; a failure of the ranks is a RuntimeError, and the LLM is over.
    Several threads may ask; questions are answered one after another, each as one batch.
    """

    def __init__(self, model: str | None = None, **settings: Any):
        if "task" in settings:
            raise UserError(f"task={settings['task']}: an LLM has no task; python -m mmdist task=... runs one")
        given = settings if model is None else {"model": model, **settings}
        words = ["task=library", *(word for name, value in given.items() for word in to_words(name, value))]
        self._job = import_module("mmdist.llm_rank").OwnRank(words) if is_rank() else Job(words)
        self._finalizer = weakref.finalize(self, self._job.close)  # also at the program's end
        self._inbox = Inbox(self._job)
        self._numbers = count()
        self.world_size = self._inbox.ready.world_size

    def close(self) -> None:
        """End the ranks; nothing can be asked any more."""
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def generate(
        self, prompts: Prompts, *, images: Sequence[Any] = (), video: Any = None, params: Params = None
    ) -> list[Output]:
        """An answer to each prompt, in their order; UserError where one cannot be asked.

        prompts: a question, or a request as a line of a file has it (docs/requests.md), or several of them. images,
        video: the question's pictures (paths, PIL) and video (path); of several prompts, a list of them for each.
        """
        return self._collect(self._entries(prompts, images, video, params))

    def chat(
        self, messages: Sequence[Any], *, images: Sequence[Any] = (), video: Any = None, params: Params = None
    ) -> list[Output]:
        """generate() for a conversation, or several: lists of {"role", "content"}."""
        several = bool(messages) and not isinstance(messages[0], dict)
        asked: Any = [{"messages": list(each)} for each in messages] if several else {"messages": list(messages)}
        return self._collect(self._entries(asked, images, video, params))

    def stream(
        self, prompt: str | dict[str, Any], *, images: Sequence[Any] = (), video: Any = None, params: Params = None
    ) -> Iterator[Output]:
        """The answer to one prompt as it comes: an output a token, with what is new in its `delta`."""
        return self._ask(self._entries(prompt, images, video, params), stream=True)

    def _entries(self, prompts: Any, images: Any, video: Any, params: Any) -> list[dict[str, Any]]:
        if isinstance(prompts, str | dict):
            prompts, images, video, params = [prompts], [images], [video], [params]
        if not isinstance(prompts, Sequence):
            raise UserError(f"prompts: expected text, a request or a list of them, found {type(prompts).__name__}")
        total = len(prompts)
        rows = zip(prompts, each(images or None, total, "images"), each(video, total, "video"), strict=True)
        entries = [make_entry(str(number), *row) for number, row in enumerate(rows)]
        own = each([params] * total if isinstance(params, SamplingParams) else params, total, "params")
        return [({} if params is None else asdict(params)) | entry for params, entry in zip(own, entries, strict=True)]

    def _collect(self, entries: list[dict[str, Any]]) -> list[Output]:
        last = {output.id: output for output in self._ask(entries, stream=False)}
        return [last[entry["id"]] for entry in entries]

    def _ask(self, entries: list[dict[str, Any]], *, stream: bool) -> Iterator[Output]:
        number = next(self._numbers)
        answers = self._inbox.expect(number)
        ended = False
        try:
            self._inbox.send(Ask(number, entries, os.getcwd(), stream))
            while not ended:
                news = answers.get()
                ended = news is None or isinstance(news, Exception)
                if isinstance(news, Exception):
                    raise news
                if news is not None and news.error is not None:
                    where = f"prompt {news.id}: " if len(entries) > 1 else ""
                    raise UserError(f"{where}{news.error}")
                if news is not None:
                    yield news
        finally:
            self._inbox.forget(number, ended)


class Inbox:
    """Sorts what comes from rank 0 by the questions, in a thread, so that no signal cuts a message in two."""

    def __init__(self, job: Any):
        self.job = job
        self.lock = threading.Lock()
        self.open: dict[int, queue.SimpleQueue[Any]] = {}
        self.failure: Exception | None = None
        self.ready = self._wait_ready()
        threading.Thread(target=self._run, name="mmdist-inbox", daemon=True).start()

    def _wait_ready(self) -> Ready:
        try:
            return self.job.channel.receive()
        except ChannelClosed:
            raise self.job.failure() from None
        except BaseException:
            self.job.close()
            raise

    def _run(self) -> None:
        try:
            while True:
                message: News = self.job.channel.receive()
                with self.lock:
                    if message.number in self.open:
                        self.open[message.number].put(message.news)
        except ChannelClosed:
            failure = self.job.failure()
        with self.lock:
            self.failure = failure
            for answers in self.open.values():
                answers.put(failure)

    def expect(self, number: int) -> queue.SimpleQueue[Any]:
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with self.lock:
            if self.failure is not None:
                raise type(self.failure)(*self.failure.args)
            self.open[number] = answers
        return answers

    def send(self, message: Any) -> None:
        with suppress(ChannelClosed):  # _run says why
            self.job.channel.send(message)

    def forget(self, number: int, ended: bool) -> None:
        with self.lock:
            del self.open[number]
        if not ended:
            self.send(Stop(number))


def to_words(name: str, value: Any) -> list[str]:
    """A setting as words of the command line."""
    if isinstance(value, dict):
        return [word for key, inner in value.items() for word in to_words(f"{name}.{key}", inner)]
    return [f"{name}={to_text(value)}"]


def to_text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(to_text, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def each(values: Any, total: int, name: str) -> list[Any]:
    """One for each prompt; None for all of them where nothing is given."""
    if values is None:
        return [None] * total
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != total:
        raise UserError(f"{name}: expected a list with one entry for each of the {total} prompts")
    return list(values)


def make_entry(name: str, prompt: Any, images: Any, video: Any) -> dict[str, Any]:
    """A request as a line of a file has it; its pictures may be open ones."""
    pictures = list_images(images)
    if isinstance(prompt, str):
        prompt = {"messages": [user_message(prompt, len(pictures), int(video is not None))]}
    elif not isinstance(prompt, dict):
        raise UserError(f"prompts: expected text or a request (dict), found {type(prompt).__name__}")
    media = ({"images": pictures} if pictures else {}) | ({} if video is None else {"video": os.fspath(video)})
    if twice := sorted(prompt.keys() & media.keys()):
        raise UserError(f"{twice[0]}: given twice, in the request and beside it")
    return {"id": name} | prompt | media


def list_images(images: Any) -> list[str | Image.Image]:
    """Of one prompt."""
    if images is None:
        return []
    several = [images] if isinstance(images, str | Path | Image.Image) else images
    for picture in several:
        if not isinstance(picture, str | Path | Image.Image):
            raise UserError(f"images: expected paths or PIL pictures, found {type(picture).__name__}")
    return [str(picture) if isinstance(picture, Path) else picture for picture in several]
