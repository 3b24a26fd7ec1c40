"""From a request's outputs to a response: whole or streamed, and stopped when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import StreamingResponse

from mmdist.engine.request import Output
from mmdist.serving.errors import ServeError

T = TypeVar("T")
Outputs = AsyncGenerator[tuple[int, Output], None]  # of Service.generate
CLIENT_GONE = 499  # nginx's number, for the log alone


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; the work is cancelled when the client leaves."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(wait_until_gone(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ServeError(CLIENT_GONE, "the client left")
        return task.result()
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)  # what the work holds is let go


async def wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def collect(request: Request, outputs: Outputs) -> list[Output]:
    """Each answer's last output, in their order (of one that was aborted, its last before); ServeError where one of
    them has failed or been timed out."""

    async def run() -> list[Output]:
        last: dict[int, Output] = {}
        async with aclosing(outputs):
            async for index, output in outputs:
                check_ended_well(output)
                before = last.get(index, output) if output.finish_reason == "abort" else output
                last[index] = replace(before, finish_reason=output.finish_reason)
        return [last[index] for index in sorted(last)]

    return await unless_gone(request, run())


async def begin(request: Request, outputs: Outputs) -> Outputs:
    """Wait for the first output, so that what cannot be answered is an HTTP error; -> all of the outputs."""

    async def pull() -> tuple[int, Output]:
        try:
            return await anext(outputs)
        except BaseException:
            await outputs.aclose()
            raise

    first = await unless_gone(request, pull())

    async def all_of_them() -> Outputs:
        async with aclosing(outputs):
            yield first
            async for item in outputs:
                yield item

    return all_of_them()


async def merge(sources: list[Outputs], n: int) -> Outputs:
    """The outputs of several prompts as those of one, the answers to each numbered behind those before."""
    queue: asyncio.Queue[tuple[int, Output] | Exception | None] = asyncio.Queue()

    async def pump(number: int, source: Outputs) -> None:
        try:
            async with aclosing(source):
                async for index, output in source:
                    queue.put_nowait((number * n + index, output))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(number, source)) for number, source in enumerate(sources)]
    try:
        num_open = len(tasks)
        while num_open:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def check_ended_well(output: Output) -> None:
    if output.finish_reason == "timeout":
        raise ServeError(504, output.error or "")
    if output.finish_reason == "error":
        raise ServeError(500, output.error or "")


async def until_error(outputs: Outputs) -> AsyncGenerator[tuple[int, Output | ServeError], None]:
    """As they come; where one of them has failed or been timed out its error is the last."""
    async with aclosing(outputs):
        async for index, output in outputs:
            try:
                check_ended_well(output)
            except ServeError as error:
                yield index, error
                return
            yield index, output


def sse(events: AsyncIterator[str]) -> StreamingResponse:
    """Server-sent events; each of `events` is one event's whole text, with its "data:" and blank line."""
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
