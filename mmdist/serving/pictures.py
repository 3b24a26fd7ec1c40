"""Pictures and videos of requests: data URLs, base64, http(s) of allowed hosts, files below one folder."""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image

from mmdist.config import UserError
from mmdist.media import Limits, TooLarge, choose_frames, read_image, read_video
from mmdist.serving.errors import ServeError
from mmdist.serving.fetch import Fetcher, too_large
from mmdist.task_config import ServerConfig

MAX_VIDEO_FRAMES = 3600  # all of a video's are decoded, twice; two minutes of film
SOURCES = "data:TYPE;base64,..., base64, http(s)://... or file://..."
NUM_THREADS = 2  # that decode; more would only take memory, and cores from the engine


class Media:
    """What a source may be: `data:TYPE;base64,...`, base64 alone, http(s)://, file:// or a path.

    Base64 has no dot, a path without one is written file://. Every refusal is a ServeError: 413 past a limit, else 422.
    """

    def __init__(self, config: ServerConfig, video_frames: int, fetcher: Fetcher | None = None):
        self.root = None if config.allowed_media_path is None else Path(config.allowed_media_path).resolve()
        self.max_bytes = int(config.max_media_mb * 1e6)
        self.limits = Limits(config.max_image_pixels, MAX_VIDEO_FRAMES)
        self.video_frames = video_frames
        self.fetcher = fetcher or Fetcher(
            config.allowed_media_domains, timeout_s=config.media_timeout_s, max_bytes=self.max_bytes
        )
        self._threads = ThreadPoolExecutor(NUM_THREADS, "media")

    async def image(self, source: str) -> Image.Image:
        """RGB, turned as its EXIF says."""
        name = shorten(source, "picture")
        data = await self._read(source, name)
        return await self._in_thread(lambda: read_image(data, name, self.limits))

    async def video(self, source: str) -> list[Image.Image]:
        """video_frames RGB frames, evenly spread. `data:video/jpeg;base64,A,B,...` is the frames themselves, as vLLM
        takes them."""
        name = shorten(source, "video")
        if source.lower().startswith("data:video/jpeg;base64,"):
            return await self._in_thread(lambda: self._frames(source.split(",")[1:], name))
        data = await self._read(source, name)
        return await self._in_thread(lambda: read_video(data, name, self.video_frames, self.limits))

    def _frames(self, texts: list[str], name: str) -> list[Image.Image]:
        frames = [texts[index] for index in choose_frames(len(texts), self.video_frames)]
        return [read_image(self._from_base64(text, name), name, self.limits) for text in frames]

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except TooLarge as error:
            raise ServeError(413, str(error)) from error
        except UserError as error:
            raise ServeError(422, str(error)) from error

    async def _read(self, source: str, name: str) -> bytes:
        scheme, separator, _ = source[:10].lower().partition(":")
        if separator and scheme == "data":
            head, comma, payload = source.partition(",")
            if not comma or not head.lower().endswith(";base64"):
                raise ServeError(422, f"{name}: expected data:TYPE;base64,...")
            return await self._in_thread(lambda: self._from_base64(payload, name))
        if separator and scheme in ("http", "https"):
            return await self.fetcher.fetch(source, name)
        if separator and scheme == "file":
            parts = urlsplit(source)
            if parts.netloc not in ("", "localhost"):
                raise ServeError(422, f"{name}: a file of another host")
            return await self._in_thread(lambda: self._from_file(unquote(parts.path), name))
        if "." in source and "://" not in source:
            return await self._in_thread(lambda: self._from_file(source, name))
        try:
            return await self._in_thread(lambda: self._from_base64(source, name))
        except ServeError as error:
            if error.status == 413:
                raise
            raise ServeError(422, f"{name}: expected {SOURCES}") from error

    def _from_base64(self, text: str, name: str) -> bytes:
        if len(text) * 3 // 4 > self.max_bytes:
            raise too_large(name, self.max_bytes)
        try:
            return base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise ServeError(422, f"{name}: not base64 ({error})") from error

    def _from_file(self, text: str, name: str) -> bytes:
        if self.root is None:
            raise ServeError(422, f"{name}: this server reads no files (server.allowed_media_path is not set)")
        try:
            path = (self.root / text).resolve()
            if not path.is_relative_to(self.root):
                raise ServeError(422, f"{name}: not below server.allowed_media_path")
            with open(path, "rb", opener=open_once) as file:
                data = file.read(self.max_bytes + 1)
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle
            raise ServeError(422, f"{name}: no such file below server.allowed_media_path") from error
        if len(data) > self.max_bytes:
            raise too_large(name, self.max_bytes)
        return data


def open_once(path: str, flags: int) -> int:
    """For a path whose links are resolved: one that was put there meanwhile is not followed, no pipe is waited for (and
    what there is to read in one is no picture)."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def shorten(source: str, kind: str) -> str:
    """How errors name it: addresses and paths by themselves, what is sent within the request by its kind."""
    inline = source[:5].lower() == "data:" or "." not in source
    return kind if inline else source if len(source) <= 100 else f"{source[:97]}..."
