"""From a request's text, with pictures in it or beside it, to the engine's prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mmdist.models.base import Prompt
from mmdist.serving.errors import ServeError
from mmdist.serving.messages import Content, TextPart, check_count, gather, read_content
from mmdist.serving.service import Service

MARKDOWN_PICTURE = re.compile(r"!\[\]\(([^)]*)\)")  # TGI's way to write one


async def read_prompt(service: Service, field: str, content: Content, sources: Sequence[str] = ()) -> Prompt:
    """Parts are a user's message; a text is taken as it is, its placeholders being those of `sources`, in their order.

    field: its name, for errors. ServeError 413, 422, 429, 503.
    """
    service.check_room()
    if not content and not sources:
        raise ServeError(422, f"{field} is empty", param=field)
    if isinstance(content, str):
        check_count(service, len(sources))
        return await service.prompt(text=content, images=await gather([service.media.image(one) for one in sources]))
    if sources:
        raise ServeError(422, f"{field} has parts, with the pictures among them; leave image out", param="image")
    return await service.prompt(**(await read_content(service, content)).arguments)


async def read_markdown_prompt(service: Service, field: str, content: Content) -> Prompt:
    """read_prompt with ![](SOURCE) in a text, each of which becomes the family's placeholder."""
    if not isinstance(content, str):
        return await read_prompt(service, field, content)
    sources = MARKDOWN_PICTURE.findall(content)
    text = MARKDOWN_PICTURE.sub(lambda found: service.processor.placeholder, content)
    return await read_prompt(service, field, text, sources)


def check_generates(service: Service, wanted: str) -> None:
    """ServeError 422 where the family chooses one of the answers it knows."""
    if service.encoder is not None:
        raise ServeError(422, f"{wanted}: {service.model_name} generates no text; ask it for an answer alone")


async def truncate(service: Service, prompt: Prompt, size: int, field: str) -> Prompt:
    """The last `size` tokens of a prompt without pictures; ServeError 422."""
    if len(prompt.token_ids) <= size:
        return prompt
    if prompt.vision:
        raise ServeError(422, f"{field}: a prompt with pictures cannot be cut", param=field)
    return await service.prompt(token_ids=prompt.token_ids[-size:])


def plain_text(content: Content) -> str:
    """What the client wrote, as far as it is text."""
    if isinstance(content, str):
        return content
    return "".join(part.text for part in content if isinstance(part, TextPart))
