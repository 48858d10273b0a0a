"""The engine for asyncio: one thread steps it, any number of tasks wait for their answers.

    async with AsyncEngine(smelt.load("OUT")) as engine:
        stream = await engine.add("Once upon a time", params)
        async for piece in stream:
            print(piece, end="")

A task that goes away ends its request. At most `max_requests` are taken at a time: `add` waits for
a place, or refuses at once. A consumer that is slow loses nothing and holds nobody up: what arrives
meanwhile is handed over as one piece.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import SmeltError, UserError
from .llm import LLM, Prompt
from .metrics import Metrics
from .outputs import Collector, Output
from .sampling_params import SamplingParams
from .sequence import StepOutput


class Overloaded(SmeltError):
    """All places are taken; the caller asked not to wait."""


@dataclass
class _Command:
    """Work for the engine's thread: `run` there, then `done` with what it gave, in the loop."""

    run: Callable[[], Any]
    done: asyncio.Future[Any] | None


class AsyncStream:
    """Pieces of one answer as they become final; `output` is the answer so far.

    Leaving the loop, `aclose`, or a cancelled task ends the request.
    """

    def __init__(self, engine: AsyncEngine, collector: Collector) -> None:
        self._engine = engine
        self._collector = collector
        self._arrived = asyncio.Event()

    @property
    def output(self) -> Output:
        return self._collector.output

    def __aiter__(self) -> AsyncIterator[str]:
        return self._pieces()

    async def _pieces(self) -> AsyncIterator[str]:
        try:
            while True:
                piece = self._collector.piece()
                if piece:
                    yield piece
                    continue
                if self._collector.done:
                    self._collector.raise_error()
                    return
                self._arrived.clear()
                await self._arrived.wait()
        finally:
            await self.aclose()

    async def finish(self) -> Output:
        """Wait for the whole answer. Raises what ended it, if it failed."""
        try:
            while not self._collector.done:
                self._arrived.clear()
                await self._arrived.wait()
        finally:
            await self.aclose()
        self._collector.raise_error()
        return self._collector.output

    async def aclose(self) -> None:
        """End the request if it still runs."""
        if not self._collector.done:
            self._engine._abort(self._collector.id)

    def _take(self, output: StepOutput) -> None:
        self._collector.take(output)
        self._arrived.set()


class AsyncEngine:
    """Serves an `LLM` to the tasks of one event loop; it owns the LLM from then on.

    max_requests: taken at a time, running or waiting in the engine.
    """

    def __init__(self, llm: LLM, *, max_requests: int = 256) -> None:
        if max_requests < 1:
            raise UserError(f"max_requests is {max_requests}: give 1 or more")
        self.llm = llm
        self._places = asyncio.Semaphore(max_requests)
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._streams: dict[int, AsyncStream] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._draining = False
        self._starting = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def metrics(self) -> Metrics:
        """Of the engine; numbers may be of the step under way."""
        return self.llm.engine.metrics

    async def add(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        wait: bool = True,
        priority: int = 0,
        timeout_s: float | None = None,
        salt: Hashable = None,
    ) -> AsyncStream:
        """Start an answer. wait False: `Overloaded` instead of waiting for a place.

        Raises UserError for a request that can never run. Others as `Engine.add_request`.
        """
        if self._draining:
            raise SmeltError("the engine is shutting down and takes no more requests")
        if not wait and self._places.locked():
            raise Overloaded("all places for requests are taken: try again later")
        await self._places.acquire()
        self._starting += 1
        self._idle.clear()
        try:
            return await self._start(
                prompt,
                params or SamplingParams(),
                priority=priority,
                timeout_s=timeout_s,
                salt=salt,
            )
        except BaseException:
            self._places.release()
            raise
        finally:
            self._starting -= 1
            self._check_idle()

    async def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | None = None
    ) -> list[Output]:
        """All answers, in the order of the prompts."""
        streams = [await self.add(prompt, params) for prompt in prompts]
        return list(await asyncio.gather(*(stream.finish() for stream in streams)))

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Take no more requests and wait for those under way; False if some had to be ended."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
            return True
        except asyncio.TimeoutError:
            for number in list(self._streams):
                self._abort(number)
            await self._idle.wait()
            return False

    async def close(self) -> None:
        """End every request, then the thread and the LLM."""
        await self.drain(0)
        thread, self._thread = self._thread, None
        if thread is not None:
            self._commands.put(None)
            await asyncio.get_running_loop().run_in_executor(None, thread.join)
        self.llm.close()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _start(self, prompt: Prompt, params: SamplingParams, **how: Any) -> AsyncStream:
        loop = asyncio.get_running_loop()
        if self._thread is None:
            self._loop = loop
            self._thread = threading.Thread(target=self._serve, name="smelt-engine", daemon=True)
            self._thread.start()
        elif loop is not self._loop:
            raise SmeltError("an AsyncEngine belongs to the event loop of its first request")
        # Encoding a long text takes milliseconds that the engine's thread should not lose.
        tokens = await loop.run_in_executor(None, self.llm.encode, prompt)
        collector = self.llm.collector(len(tokens), params)
        stream = AsyncStream(self, collector)

        def add() -> None:
            collector.id = self.llm.engine.add_request(tokens, params, detokenize=False, **how)
            self._streams[collector.id] = stream

        done: asyncio.Future[Any] = loop.create_future()
        self._commands.put(_Command(add, done))
        try:
            await asyncio.shield(done)
        except asyncio.CancelledError:
            # The caller is gone; the request ends as soon as it has begun.
            self._commands.put(_Command(lambda: self._abort_here(collector.id), None))
            raise
        return stream

    def _abort(self, number: int) -> None:
        self._commands.put(_Command(lambda: self._abort_here(number), None))

    def _abort_here(self, number: int) -> None:
        self.llm.engine.abort(number)

    def _serve(self) -> None:
        """The engine's thread: commands between steps, a rest when there is no work."""
        engine, loop = self.llm.engine, self._loop
        assert loop is not None
        while True:
            block = not engine.has_work
            while True:
                try:
                    command = self._commands.get(block=block)
                except queue.Empty:
                    break
                block = False
                if command is None:
                    return
                self._execute(command, loop)
            if engine.has_work:
                outputs = engine.step()
                if outputs:
                    loop.call_soon_threadsafe(self._deliver, outputs)

    def _execute(self, command: _Command, loop: asyncio.AbstractEventLoop) -> None:
        error: Exception | None = None
        try:
            command.run()
        except Exception as raised:
            error = raised
        if command.done is not None:
            loop.call_soon_threadsafe(_resolve, command.done, error)

    def _deliver(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            stream = self._streams.get(output.id)
            if stream is None:
                continue
            stream._take(output)
            if stream._collector.done:
                del self._streams[output.id]
                self._places.release()
        self._check_idle()

    def _check_idle(self) -> None:
        if not self._streams and not self._starting:
            self._idle.set()


def _resolve(future: asyncio.Future[Any], error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
