"""What several formats share: bodies that are checked strictly, messages of text and pictures, the texts of tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Discriminator, Tag, model_validator

from mmdist.models.base import Processor
from mmdist.serving.errors import ServeError
from mmdist.serving.service import Service

CONTEXT = 4  # tokens before one that can change its text (a blank in front, the bytes of one character)


class Body(BaseModel):
    """What a client sends: no unknown fields, no text where a number belongs; null is as good as left out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class MediaUrl(Body):
    """detail is OpenAI's and changes nothing: pictures are cut as the family does it."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


def tag_source(value: Any) -> str:
    return "source" if isinstance(value, str) else "url"


# data:TYPE;base64,..., base64, http(s)://... or file://..., as text or {"url": text}
Source = Annotated[Annotated[str, Tag("source")] | Annotated[MediaUrl, Tag("url")], Discriminator(tag_source)]


class TextPart(Body):
    type: Literal["text"]
    text: str


class ImageUrlPart(Body):
    type: Literal["image_url"]
    image_url: Source


class VideoUrlPart(Body):
    type: Literal["video_url"]
    video_url: Source


class ImagePart(Body):
    type: Literal["image"]
    image: str


def tag_part(value: Any) -> str | None:
    """Tags are no names of fields, so that an error's place can be told from them."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"{kind} part" if kind in ("text", "image_url", "video_url", "image") else None


Part = Annotated[
    Annotated[TextPart, Tag("text part")]
    | Annotated[ImageUrlPart, Tag("image_url part")]
    | Annotated[VideoUrlPart, Tag("video_url part")]
    | Annotated[ImagePart, Tag("image part")],
    Discriminator(
        tag_part,
        custom_error_type="part",
        custom_error_message='expected an object with a "type" of text, image_url, video_url or image',
    ),
]


def tag_content(value: Any) -> str:
    return "(text)" if isinstance(value, str) else "(parts)"


# Text, or a list of parts in the order in which the model reads them.
Content = Annotated[Annotated[str, Tag("(text)")] | Annotated[list[Part], Tag("(parts)")], Discriminator(tag_content)]


@dataclass
class Conversation:
    """messages: as Processor.prompt takes them, media in place. images, videos: those media, in their order."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    videos: list[list[Image.Image]] = field(default_factory=list)

    @property
    def arguments(self) -> dict[str, Any]:
        """For Service.prompt()."""
        return {"messages": self.messages, "images": self.images, "videos": self.videos}


async def read_messages(service: Service, messages: Iterable[tuple[str, str | Sequence[Part]]]) -> Conversation:
    """(role, content) of each message -> what the engine's prompts are made of; ServeError 413 or 422."""
    found = Conversation()
    images: list[Source] = []
    videos: list[Source] = []
    for role, content in messages:
        parts: Sequence[Any] = [TextPart(type="text", text=content)] if isinstance(content, str) else content
        found.messages.append({"role": role, "content": [plain_part(part, images, videos) for part in parts]})
    check_count(service, len(images) + len(videos))
    service.check_videos(len(videos))
    found.images = await read_images(service, images)
    found.videos = await gather([service.media.video(address(source)) for source in videos])
    return found


async def read_images(service: Service, sources: Sequence[Source]) -> list[Image.Image]:
    """Side by side; ServeError 413 or 422 for the first that is none."""
    return await gather([service.media.image(address(source)) for source in sources])


async def read_content(service: Service, content: str | Sequence[Part]) -> Conversation:
    """One message of a user."""
    return await read_messages(service, [("user", content)])


def plain_part(part: Any, images: list[Source], videos: list[Source]) -> dict[str, str]:
    """A part as chat templates know it; its source is put behind the others."""
    match part:
        case TextPart():
            return {"type": "text", "text": part.text}
        case VideoUrlPart():
            videos.append(part.video_url)
            return {"type": "video"}
        case ImageUrlPart():
            images.append(part.image_url)
        case ImagePart():
            images.append(part.image)
    return {"type": "image"}


def address(source: str | MediaUrl) -> str:
    return source if isinstance(source, str) else source.url


def check_count(service: Service, count: int) -> None:
    most = service.config.server.max_pictures
    if count > most:
        raise ServeError(422, f"{count} pictures and videos; at most {most} a request (server.max_pictures)")


async def gather(work: Sequence[Awaitable[Any]]) -> list[Any]:
    """All results in their order; the first failure stops the others."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def as_list(value: str | list[str] | None) -> list[str]:
    """Of a field that is a text or several, as `stop` is everywhere."""
    return [value] if isinstance(value, str) else list(value or ())


def token_text(processor: Processor, before: Sequence[int], token_id: int, *, skip_special_tokens: bool = False) -> str:
    """What a token adds to the text of those before it; U+FFFD for a part of a character."""
    context = list(before[-CONTEXT:])
    old = processor.decode(context, skip_special_tokens) if context else ""
    new = processor.decode([*context, token_id], skip_special_tokens)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False)))
    return new[same:]
