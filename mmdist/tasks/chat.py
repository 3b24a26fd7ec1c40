"""task=chat: one streamed answer to prompt=, or a conversation in the terminal."""

from __future__ import annotations

import logging
import queue
import readline  # noqa: F401  line editing for input()
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from mmdist.config import EXIT_INTERRUPTED, SAMPLING_KEYS, SamplingParams, UserError
from mmdist.engine.load import AnyEngine
from mmdist.engine.request import Request
from mmdist.media import load_image, load_video
from mmdist.shipped import SHIPPED
from mmdist.task_config import ChatConfig
from mmdist.tasks.requests import check_takes_video, user_message

ON_RANKS = True
HELP = "/image PATH, /video PATH  show   /reset  forget the conversation   /help   /quit   Ctrl-C  stop the answer"
KEEP_ALIVE_S = 30  # how often the other ranks hear from rank 0 while a person thinks
log = logging.getLogger("mmdist.chat")


def check(config: ChatConfig) -> None:
    if config.image is not None:
        load_image(Path(config.image))
    if config.video is not None:
        load_video(Path(config.video), config.video_frames)
    if config.prompt is None and not is_demo(config) and not sys.stdin.isatty():
        raise UserError("prompt= is missing, and there is no terminal to chat on; ask something with prompt=TEXT")


def is_demo(config: ChatConfig) -> bool:
    """Nothing was asked: the shipped checkpoint answers the shipped question."""
    return all(given is None for given in (config.checkpoint, config.image, config.video, config.prompt))


def run(config: ChatConfig, engine: AnyEngine) -> int:
    params = SamplingParams(**{name: getattr(config, name) for name in SAMPLING_KEYS})
    conversation = Conversation(engine, params, config.video_frames)
    image, video, prompt = config.image, config.video, config.prompt
    if is_demo(config):
        image, video, prompt = config.model.demo_image, config.model.demo_video, config.model.demo_prompt
        print(f"{image or video}: {prompt}")
    if image is not None:
        conversation.show(SHIPPED / image if is_demo(config) else Path(image))
    if video is not None:
        conversation.show_video(SHIPPED / video if is_demo(config) else Path(video))
    if prompt is None:
        converse(conversation)
        return 0
    return 0 if conversation.ask(prompt) else EXIT_INTERRUPTED


class Conversation:
    """The history of one chat, its pictures and videos; each answer is computed from all of it."""

    def __init__(self, engine: AnyEngine, params: SamplingParams, video_frames: int):
        self.engine, self.params, self.video_frames = engine, params, video_frames
        self.reset()

    def reset(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.images: list[Any] = []
        self.videos: list[list[Any]] = []
        self.num_new_images = self.num_new_videos = 0

    def show(self, path: Path) -> None:
        """Put a picture in front of the next question; without a conversation, in the place of the one before."""
        image = load_image(path)
        if self.engine.prompts.single_turn:
            self.reset()
        self.images.append(image)
        self.num_new_images += 1

    def show_video(self, path: Path) -> None:
        check_takes_video(self.engine.prompts, str(path))
        self.videos.append(load_video(path, self.video_frames))
        self.num_new_videos += 1

    def ask(self, text: str) -> bool:
        """Stream the answer to stdout; False when Ctrl-C ended it (what there is of it is kept)."""
        messages = [*self.messages, user_message(text, self.num_new_images, self.num_new_videos)]
        media: dict[str, Any] = {"images": self.images} | ({"videos": self.videos} if self.videos else {})
        prompt = self.engine.prompts.prompt(messages=messages, **media)
        answer, interrupted = self._stream(Request("chat", prompt, self.params))
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer.strip()}]}]
        self.num_new_images = self.num_new_videos = 0
        if self.engine.prompts.single_turn:  # the picture alone stays
            self.messages, self.num_new_images = [], len(self.images)
        return not interrupted

    def _stream(self, request: Request) -> tuple[str, bool]:
        start, first, answer, num_tokens = time.perf_counter(), 0.0, "", 0
        with noted_interrupt() as interrupt, closing(self.engine.generate([request])) as outputs:
            for output in outputs:
                if output.error is not None:
                    raise UserError(output.error)
                first = first or time.perf_counter() - start
                answer, num_tokens = output.text, len(output.token_ids)
                print(output.delta, end="", flush=True)
                if interrupt.is_set():
                    break
        print()
        words = "%d prompt tokens, first token after %.2f s, %d tokens in %.2f s"
        log.info(words, len(request.prompt.token_ids), first, num_tokens, time.perf_counter() - start)
        return answer, interrupt.is_set()


@contextmanager
def noted_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets an event: an exception in the middle of a step would leave the other ranks in it."""
    event = threading.Event()
    before = signal.signal(signal.SIGINT, lambda signum, frame: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def converse(conversation: Conversation) -> None:
    print(HELP)
    if conversation.engine.prompts.single_turn:
        print("This model has no conversation: each question stands alone, about the last picture.")
    while (line := read_line(conversation.engine)) is not None:
        try:
            if not obey(line.strip(), conversation):
                return
        except UserError as error:
            print(f"error: {error}")


def obey(line: str, conversation: Conversation) -> bool:
    """Do what one line says; False to leave."""
    command, _, rest = line.partition(" ")
    if command == "/quit":
        return False
    if command == "/reset":
        conversation.reset()
    elif command == "/image":
        conversation.show(Path(rest.strip()))
    elif command == "/video":
        conversation.show_video(Path(rest.strip()))
    elif command.startswith("/"):
        print(HELP)
    elif line:
        conversation.ask(line)
    return True


def read_line(engine: AnyEngine) -> str | None:
    """A line from the terminal, None at its end; meanwhile the other ranks are kept from timing out."""
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=lambda: lines.put(read_or_none()), daemon=True).start()
    while True:
        try:
            return lines.get(timeout=KEEP_ALIVE_S)
        except queue.Empty:
            engine.keep_alive()
        except KeyboardInterrupt:
            print("\n(/quit leaves)")


def read_or_none() -> str | None:
    try:
        return input("> ")
    except EOFError:
        return None
