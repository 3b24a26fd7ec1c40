"""From requests as users write them to outputs as they come: what a file of requests and a Python program share."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import Any

from mmdist.config import UserError
from mmdist.engine.load import AnyEngine
from mmdist.engine.request import Output, Request, failed


def answer(
    engine: AnyEngine, entries: Iterable[dict[str, Any]], build: Callable[[dict[str, Any]], Request]
) -> Generator[Output, None, None]:
    """The outputs of all entries; one that `build` refuses (UserError) has a single output, with its error.

    Requests are built as the engine asks for them, so that no more than a batch of pictures is in memory. Closing the
    iterator stops what is being computed.
    """
    refused: deque[Output] = deque()

    def requests() -> Iterator[Request]:
        seen: set[str] = set()
        for entry in entries:
            name = str(entry["id"])
            try:
                if name in seen:
                    raise UserError(f"id {name} is given twice; ids must differ")
                seen.add(name)
                request = build(entry)
            except UserError as error:
                refused.append(failed(name, [], str(error)))
                continue
            yield request

    with closing(engine.generate(requests())) as outputs:
        for output in outputs:
            while refused:
                yield refused.popleft()
            yield output
    yield from refused
