"""task=library: answers for a Python program, whose mmdist.LLM has started us and holds the other end of a channel."""

from __future__ import annotations

import os
import socket
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from mmdist.channel import VARIABLE, Ask, Channel, ChannelClosed, News, Ready
from mmdist.config import SamplingParams, UserError
from mmdist.engine.load import AnyEngine
from mmdist.engine.request import Request
from mmdist.task_config import LibraryConfig
from mmdist.tasks.answering import answer
from mmdist.tasks.requests import build_request

ON_RANKS = True
NEEDS_FOLDER = False
KEEP_ALIVE_S = 30  # how often the other ranks hear from rank 0 while the program asks nothing


def check(config: LibraryConfig) -> None:
    if VARIABLE not in os.environ:
        raise UserError("task=library is started by a Python program: from mmdist import LLM (docs/library.md)")


def run(config: LibraryConfig, engine: AnyEngine) -> int:
    """Until the program closes its LLM, or is gone."""
    with socket.socket(fileno=int(os.environ[VARIABLE])) as end, suppress(ChannelClosed):
        channel = Channel(end)
        channel.send(Ready(engine.tp.size))
        Desk(channel, engine, config.video_frames).serve()
    return 0


class Desk:
    """Questions in the order they come; each is a batch of its own."""

    def __init__(self, channel: Channel, engine: AnyEngine, video_frames: int):
        self.channel, self.engine, self.video_frames = channel, engine, video_frames
        self.waiting: list[Ask] = []
        self.current: int | None = None  # None: what was asked is not wanted any more

    def serve(self) -> None:
        while True:
            if not self.waiting:
                self.receive()
                continue
            asked = self.waiting.pop(0)
            self.current = asked.number
            try:
                self.answer(asked)
                self.channel.send(News(asked.number, None))
            except UserError as error:
                self.channel.send(News(asked.number, error))

    def answer(self, asked: Ask) -> None:
        def build(entry: dict[str, Any]) -> Request:
            folder = Path(asked.folder)
            return build_request(entry, self.engine.prompts, SamplingParams(), folder, self.video_frames)

        with suppress(FileNotFoundError):  # whose folder is gone gives whole paths
            os.chdir(asked.folder)
        with closing(answer(self.engine, asked.entries, build)) as outputs:
            for output in outputs:
                while self.channel.poll():
                    self.take()
                if self.current is None:
                    return
                if asked.stream or output.finish_reason is not None:
                    self.channel.send(News(asked.number, output))

    def receive(self) -> None:
        """Wait for a message; the other ranks are kept from timing out."""
        while not self.channel.poll(KEEP_ALIVE_S):
            self.engine.keep_alive()
        self.take()

    def take(self) -> None:
        message = self.channel.receive()
        if isinstance(message, Ask):
            self.waiting.append(message)
            return
        self.waiting = [asked for asked in self.waiting if asked.number != message.number]
        if self.current == message.number:
            self.current = None
