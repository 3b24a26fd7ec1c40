"""What every format asks of the engine: prompts made off the event loop, answers as they come, an end on every path."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any, TypeVar

from mmdist.config import SamplingParams, UserError
from mmdist.engine.encoder import EncoderEngine
from mmdist.engine.engine import Engine
from mmdist.engine.loop import EngineLoop
from mmdist.engine.request import LEAST_URGENT, Output, Request, failed
from mmdist.models.base import Processor, Prompt
from mmdist.serving.errors import ServeError
from mmdist.serving.metrics import Metrics
from mmdist.serving.pictures import Media
from mmdist.task_config import ServeConfig

T = TypeVar("T")
RETRY_S = 1  # what a client that finds the queue full is told to wait


@dataclass(eq=False)
class Call:
    """One client's request: `n` answers to a prompt. ids: the engine's, one an answer."""

    name: str
    ids: list[str]
    arrived: float = field(default_factory=time.monotonic)
    outputs: asyncio.Queue[tuple[int, Output]] = field(default_factory=asyncio.Queue)
    ended: set[int] = field(default_factory=set)  # answers whose last output is there


class Service:
    """Lives on the event loop of the HTTP server; the engine's thread only calls deliver() and fail().

    processor: the one rank 0 loaded; copies of it serve the other threads, as tokenizers are not safe to share.
    """

    def __init__(self, engine_loop: EngineLoop, processor: Processor, config: ServeConfig, metrics: Metrics):
        self.engine_loop, self.config, self.metrics = engine_loop, config, metrics
        self.media = Media(config.server, config.video_frames)
        self.processor = copy.deepcopy(processor)  # the event loop's, to decode single tokens
        self._prompts = copy.deepcopy(processor)  # the prompt thread's
        self._prompt_thread = ThreadPoolExecutor(1, "prompts")
        self._numbers = count()
        self._calls: dict[str, tuple[Call, int]] = {}  # by the engine's id
        self.event_loop: asyncio.AbstractEventLoop | None = None  # set when the server starts
        self.problem: str | None = None  # why no request can be answered any more
        self.stopping = False

    @property
    def model_name(self) -> str:
        return self.config.server.model_name or self.config.model.name

    @property
    def max_model_len(self) -> int | None:
        return getattr(self.engine_loop.engine, "max_model_len", None)

    @property
    def encoder(self) -> EncoderEngine | None:
        """The engine of a family that answers at once (VLMo); None where answers are generated."""
        engine = self.engine_loop.engine
        return engine if isinstance(engine, EncoderEngine) else None

    @property
    def num_active(self) -> int:
        return len(self._calls)

    @property
    def capacity(self) -> int:
        return self.config.engine.max_num_seqs + self.config.server.max_queue

    @property
    def is_full(self) -> bool:
        return self.num_active >= self.capacity

    async def prompt(
        self,
        *,
        messages: list[dict[str, Any]] | None = None,
        text: str | None = None,
        token_ids: list[int] | None = None,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
    ) -> Prompt:
        """Chat messages (parts {"type": "text"|"image"|"video"}), raw text, or tokens -> Prompt; ServeError 422."""
        if token_ids is not None:
            return self._token_prompt(token_ids)
        self.check_videos(len(videos))
        media: dict[str, Any] = {"images": list(images)} | ({"videos": list(videos)} if videos else {})
        build = partial(self._prompts.prompt, messages=messages, text=text, **media)
        return await self._aside(lambda: self._hashed(build()))

    def _hashed(self, prompt: Prompt) -> Prompt:
        """With its pictures' hashes, which the engine's thread then need not compute."""
        if isinstance(self.engine_loop.engine, Engine):
            self.engine_loop.engine.pictures.hash(prompt)
        return prompt

    async def _aside(self, work: Callable[[], T]) -> T:
        """In the prompt thread; ServeError 422."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._prompt_thread, work)
        except UserError as error:
            raise ServeError(422, str(error)) from error

    def check_videos(self, count: int) -> None:
        """ServeError 422 where the family takes none; ask before reading them."""
        if count and not self.processor.takes_video:
            raise ServeError(422, f"{self.config.model.name} takes pictures, no videos")

    def _token_prompt(self, token_ids: list[int]) -> Prompt:
        size = getattr(self.engine_loop.engine.model, "vocab_size", 0)
        wrong = [token for token in token_ids if not 0 <= token < size]
        if wrong or not token_ids:
            found = f"{wrong[0]} is none" if wrong else "the list is empty"
            raise ServeError(422, f"expected token ids of 0 to {size - 1}: {found}")
        return Prompt(token_ids)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        name: str,
        n: int = 1,
        timeout_s: float | None = None,
        priority: int = LEAST_URGENT,
    ) -> AsyncGenerator[tuple[int, Output], None]:
        """(answer 0 to n - 1, its next output) as they come; each answer's last output has its finish_reason.

        name: the client's id of the request, for cancel(). priority: as Request's. ServeError before the first output
        where the request cannot be taken or its time is over; an answer that fails later ends with finish_reason error,
        abort or timeout. Leaving the iterator early stops the computation.
        """
        if params.json_schema is not None or params.regex is not None:  # compiled while the engine steps
            await self._aside(partial(self.engine_loop.engine.check_params, params))
        call, request = self._open(name, n), Request(name, prompt, params, priority)
        limit = min(timeout_s or float("inf"), self.config.server.request_timeout_s)
        alarm = asyncio.get_running_loop().call_later(limit, self._end, call, "timeout", f"not finished in {limit:g} s")
        try:
            self._submit(call, request, [0])
            async for index, output in self._outputs(call):
                if index == 0 and output.num_tokens == 1:  # the others share its prompt in the prefix cache
                    self._submit(call, request, range(1, n))
                yield index, output
        finally:
            alarm.cancel()
            self._close(call)

    async def compute(self, work: Iterator[T], *, name: str) -> T:
        """The last value of `work`, each step of which is one of the engine's thread, between those of other requests;
        errors as in generate()."""
        call = self._open(name, 1)
        limit = self.config.server.request_timeout_s
        alarm = asyncio.get_running_loop().call_later(limit, self._end, call, "timeout", f"not finished in {limit:g} s")
        ended = asyncio.ensure_future(call.outputs.get())
        last: T | None = None
        try:
            while True:
                step = asyncio.wrap_future(self.engine_loop.call(partial(next, work, None)))
                await asyncio.wait([step, ended], return_when=asyncio.FIRST_COMPLETED)
                if ended.done():
                    raise self._refusal(ended.result()[1])
                if (value := step.result()) is None:
                    break
                last = value
            self._post(call, 0, replace(failed(call.ids[0], [], ""), finish_reason="stop"))
            assert last is not None, "work has a value"
            return last
        finally:
            ended.cancel()
            alarm.cancel()
            self._close(call)

    def _open(self, name: str, n: int) -> Call:
        self.check_room(n)
        call = Call(name, [f"{next(self._numbers)}" for _ in range(n)])
        self._calls.update({id: (call, index) for index, id in enumerate(call.ids)})
        return call

    def check_room(self, n: int = 1) -> None:
        """ServeError 429 where `n` more answers are too many, 503 where none is given; ask before reading pictures."""
        self.check_open()
        if self.num_active + n > self.capacity:
            raise ServeError(429, f"{self.num_active} requests are being answered or wait", retry_after=RETRY_S)

    def check_open(self) -> None:
        """ServeError 503 where no request is taken."""
        if self.problem is not None:
            raise ServeError(503, self.problem)
        if self.stopping:
            raise ServeError(503, "the server is stopping", retry_after=RETRY_S)

    def _submit(self, call: Call, request: Request, indices: Iterable[int]) -> None:
        """The request with the engine's ids, each with a seed of its own."""
        for index in indices:
            seed = None if request.params.seed is None else (request.params.seed + index) % 2**64  # torch's range
            params = replace(request.params, seed=seed)
            self.engine_loop.submit(replace(request, id=call.ids[index], params=params))

    async def _outputs(self, call: Call) -> AsyncIterator[tuple[int, Output]]:
        begun, num_open = False, len(call.ids)
        while num_open:
            index, output = await call.outputs.get()
            num_open -= output.finish_reason is not None
            if not begun and output.finish_reason in ("error", "timeout"):
                raise self._refusal(output)
            begun = True
            yield index, output

    def _close(self, call: Call) -> None:
        self._end(call, "abort", "")
        for id in call.ids:
            del self._calls[id]

    def cancel(self, name: str) -> bool:
        """End a request by the id its client gave it, with finish_reason abort; False where there is none."""
        calls = {call for call, _ in self._calls.values() if call.name == name}
        for call in calls:
            self._end(call, "abort", "")
        return bool(calls)

    def _end(self, call: Call, reason: str, error: str) -> None:
        for index in set(range(len(call.ids))) - call.ended:
            self.engine_loop.abort(call.ids[index])
            self._post(call, index, replace(failed(call.ids[index], [], error), finish_reason=reason))

    def _post(self, call: Call, index: int, output: Output) -> None:
        """To whoever reads the call's outputs; what was computed while the answer was ended is dropped."""
        if index not in call.ended:
            if output.finish_reason is not None:
                call.ended.add(index)
            self.metrics.take(call, output)
            call.outputs.put_nowait((index, output))

    def deliver(self, outputs: list[Output]) -> None:
        """From the engine's thread."""
        if outputs and self.event_loop is not None:
            self.event_loop.call_soon_threadsafe(self._dispatch, outputs)

    def _dispatch(self, outputs: list[Output]) -> None:
        for output in outputs:
            found = self._calls.get(output.id)
            if found is not None:
                self._post(*found, output)

    def fail(self, problem: str) -> None:
        """From any thread: the ranks are lost; every open request ends with this error, new ones are refused."""
        self.problem = self.problem or problem
        self.end_all(self.problem)

    def end_all(self, problem: str) -> None:
        """From any thread: end every open request with this error."""
        if self.event_loop is not None:
            self.event_loop.call_soon_threadsafe(self._end_all, problem)

    def _end_all(self, problem: str) -> None:
        for call in {call for call, _ in self._calls.values()}:
            self._end(call, "error", problem)

    def _refusal(self, output: Output) -> ServeError:
        """Before the first token the answer is an error as a whole."""
        if output.finish_reason == "timeout":
            return ServeError(504, output.error or "")
        status = 500 if self.problem is not None else 503 if self.stopping else 422
        return ServeError(status, output.error or "")
