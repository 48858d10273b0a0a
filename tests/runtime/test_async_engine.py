"""The engine behind asyncio: streams, back-pressure, cancellation and the end."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.fake_artifact import fake_artifact
from helpers.fake_step import one_thread  # noqa: F401  (autouse fixture)

from smelt.runtime.async_engine import AsyncEngine, Overloaded
from smelt.runtime.errors import SmeltError, UserError
from smelt.runtime.llm import LLM, load
from smelt.runtime.sampling_params import SamplingParams

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
LONG = SamplingParams(max_tokens=100, ignore_eos=True)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], LLM]:
    def make() -> LLM:
        artifact = fake_artifact(tmp_path / "OUT", max_position=160)
        module = SimpleNamespace(open_artifact=lambda path: artifact)
        monkeypatch.setitem(sys.modules, "smelt.runtime.artifact", module)
        return load(artifact.folder, kv_cache_tokens=2000)

    return make


def test_streams_give_what_generate_gives(make: Callable[[], LLM]) -> None:
    texts = [f"prompt {i}" for i in range(12)]
    wanted = [o.text for o in make().generate(texts, PARAMS)]

    async def main() -> None:
        async with AsyncEngine(make()) as engine:
            streams = [await engine.add(text, PARAMS) for text in texts]

            async def read(stream) -> str:  # type: ignore[no-untyped-def]
                return "".join([piece async for piece in stream])

            assert await asyncio.gather(*map(read, streams)) == wanted
            assert [o.text for o in await engine.generate(texts, PARAMS)] == wanted
            assert engine.metrics.requests == 24
            engine.llm.engine.check_integrity()

    asyncio.run(main())


def test_a_slow_reader_gets_everything_at_once(make: Callable[[], LLM]) -> None:
    async def main() -> None:
        async with AsyncEngine(make()) as engine:
            stream = await engine.add("hello", PARAMS)
            await engine._idle.wait()
            pieces = [piece async for piece in stream]
            assert len(pieces) == 1
            assert pieces[0] == stream.output.text

    asyncio.run(main())


def test_requests_wait_for_a_place_or_are_refused(make: Callable[[], LLM]) -> None:
    async def main() -> None:
        async with AsyncEngine(make(), max_requests=2) as engine:
            first = [await engine.add("a", LONG) for _ in range(2)]
            with pytest.raises(Overloaded):
                await engine.add("b", LONG, wait=False)
            third = await engine.add("c", PARAMS)  # waits
            assert any(s.output.finish_reason for s in first)
            await third.finish()

    asyncio.run(main())


def test_a_consumer_that_goes_away_ends_its_request(make: Callable[[], LLM]) -> None:
    async def main() -> None:
        async with AsyncEngine(make(), max_requests=1) as engine:
            stream = await engine.add("a", LONG)
            async for _ in stream:
                break
            await stream.aclose()
            # The place is free again: this would wait for ever otherwise.
            task = asyncio.create_task((await engine.add("b", LONG)).finish())
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            last = await (await engine.add("c", PARAMS)).finish()
            assert len(last.token_ids) == 12
            engine.llm.engine.check_integrity()

    asyncio.run(main())


def test_mistakes_and_failures_are_the_requests_own(
    make: Callable[[], LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with AsyncEngine(make(), max_requests=1) as engine:
            with pytest.raises(UserError, match="context"):
                await engine.add("x" * 200, PARAMS)
            assert len((await (await engine.add("a", PARAMS)).finish()).token_ids) == 12
            program = engine.llm.engine.program
            run = program.run

            def broken(*_: object) -> None:
                raise RuntimeError("no such kernel")

            program.run = broken  # type: ignore[method-assign,assignment]
            with pytest.raises(SmeltError, match="no such kernel"):
                await (await engine.add("a", PARAMS)).finish()
            program.run = run  # type: ignore[method-assign]
            assert len((await (await engine.add("a", PARAMS)).finish()).token_ids) == 12

    asyncio.run(main())


def test_draining_finishes_what_runs_and_takes_nothing_new(make: Callable[[], LLM]) -> None:
    async def main() -> None:
        engine = AsyncEngine(make())
        stream = await engine.add("a", LONG)
        drained = asyncio.create_task(engine.drain())
        await asyncio.sleep(0)
        with pytest.raises(SmeltError, match="shutting down"):
            await engine.add("b", PARAMS)
        assert await drained
        assert stream.output.finish_reason == "length"
        await engine.close()

        engine = AsyncEngine(make())
        run = engine.llm.engine.program.run

        def slow(*inputs):  # type: ignore[no-untyped-def]
            time.sleep(0.01)
            return run(*inputs)

        engine.llm.engine.program.run = slow  # type: ignore[method-assign]
        stream = await engine.add("a", LONG)
        assert not await engine.drain(0.05)
        assert stream.output.finish_reason == "abort"
        await engine.close()

    asyncio.run(main())


def test_a_timeout_keeps_what_there_is(make: Callable[[], LLM]) -> None:
    async def main() -> None:
        async with AsyncEngine(make()) as engine:
            run = engine.llm.engine.program.run

            def slow(*inputs):  # type: ignore[no-untyped-def]
                time.sleep(0.01)
                return run(*inputs)

            engine.llm.engine.program.run = slow  # type: ignore[method-assign]
            output = await (await engine.add("a", LONG, timeout_s=0.1)).finish()
            assert output.finish_reason == "timeout"
            assert 0 < len(output.token_ids) < 100

    asyncio.run(main())
