"""Engines whose steps are graphs (here: plain calls), with drafts and running ahead."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.fake_step import FakeStep, one_thread  # noqa: F401  (autouse fixture)
from helpers.graphs import Calls
from helpers.traffic import Plan, drive, settled, tidy
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.runtime.cuda_graphs import CudaBackend, GraphedProgram, Replay
from smelt.runtime.engine import Engine
from smelt.runtime.sampling_params import SamplingParams
from smelt.runtime.speculation.model import ModelDrafter

from .speculation.test_speculation import Guesses
from .test_engine import prompts, run


def test_a_capture_that_fails_leaves_steps_as_they_are() -> None:
    class Full(Calls):
        def capture(self, call: Callable[[], None]) -> Replay:
            if self.captures:
                raise RuntimeError("out of memory\nand more")
            return super().capture(call)

    step = FakeStep(max_tokens=64, max_rows=64)
    backend = Full()
    engine = Engine(GraphedProgram(step, backend), blocks=100)
    ids = [engine.add_request(p, SamplingParams(max_tokens=6)) for p in ([1], [2, 3], [4])]
    with pytest.warns(UserWarning, match="without new CUDA graphs: out of memory$") as caught:
        found = run(engine)
        ids.append(engine.add_request([5], SamplingParams(max_tokens=6)))
        found |= run(engine)
    assert len(caught) == 1
    wanted = [step.greedy(prompt, 6) for prompt in ([1], [2, 3], [4], [5])]
    assert [found[i][0] for i in ids] == wanted
    assert engine.metrics.graphs == 1 and engine.metrics.graph_bytes > 1000


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    windows=st.sampled_from([(0,), (0, 7)]),
    max_sequences=st.sampled_from([1, 3, 8]),
    few=st.booleans(),
    deterministic=st.booleans(),
)
def test_an_engine_with_graphs_that_runs_ahead_gives_the_same_answers(
    seed: int, windows: tuple[int, ...], max_sequences: int, few: bool, deterministic: bool
) -> None:
    plan = Plan(seed)
    results = []
    for graphs in (False, True):
        step: Any = FakeStep(
            windows=windows, max_tokens=32, max_rows=32, max_sequences=max_sequences
        )
        engine = Engine(
            GraphedProgram(step, Calls()) if graphs else step,
            blocks=13 if few else 200,
            eos_token_ids=range(0, 97, 9),
            deterministic=deterministic,
            run_ahead=graphs,
        )
        results.append(settled(drive(engine, plan), plan))
        tidy(engine)
    assert results[0] == results[1]


@pytest.mark.parametrize("tree", [False, True])
def test_drafts_are_verified_in_graphs(tree: bool) -> None:
    wanted = prompts(5, 20, seed=3)
    step = FakeStep(max_tokens=64, max_rows=64)
    backend = Calls()
    drafter = Guesses(step, 0.7, tree, 1)
    engine = Engine(GraphedProgram(step, backend), blocks=200, drafter=drafter, draft_tokens=3)
    ids = [engine.add_request(prompt, SamplingParams(max_tokens=12)) for prompt in wanted]
    found = run(engine)
    assert [found[i][0] for i in ids] == [step.greedy(prompt, 12) for prompt in wanted]
    assert engine.metrics.accepted_tokens > 0 and backend.replays > 5
    assert any(bucket.tree for bucket, _ in engine.program._graphs) == tree  # type: ignore[attr-defined]


def test_a_draft_model_runs_in_graphs_too() -> None:
    step = FakeStep(max_tokens=64, max_rows=64)
    own, other = Calls(), Calls()
    drafter = ModelDrafter(GraphedProgram(step, other), step.vocab_size)
    engine = Engine(GraphedProgram(step, own), blocks=200, drafter=drafter, draft_tokens=4)
    wanted = prompts(3, 9, seed=5)
    ids = [engine.add_request(prompt, SamplingParams(max_tokens=16)) for prompt in wanted]
    found = run(engine)
    assert [found[i][0] for i in ids] == [step.greedy(prompt, 16) for prompt in wanted]
    assert engine.metrics.acceptance > 0.9
    assert own.replays and other.replays


def test_how_torch_is_asked_to_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a device: a call outside, a call inside, one pool and one stream for all graphs."""
    told: list[Any] = []
    free = iter([1000, 900, 850, 860])

    class Stream:
        def __init__(self, device: Any = None) -> None: ...

        def wait_stream(self, other: Any) -> None:
            told.append("wait")

    class Graph:
        def replay(self) -> None:
            told.append("replay")

    @contextmanager
    def within(name: str, **how: Any) -> Iterator[None]:
        told.append((name, how))
        yield
        told.append("end")

    def graph(made: Graph, pool: Any, stream: Any, capture_error_mode: str) -> Any:
        return within("capture", pool=pool, stream=stream, mode=capture_error_mode)

    known = inspect.signature(torch.cuda.graph.__init__).parameters
    assert {"pool", "stream", "capture_error_mode"} <= set(known)
    stand_ins = {
        "graph_pool_handle": lambda: "pool",
        "Stream": Stream,
        "current_stream": Stream,
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device: (next(free), 0),
        "stream": lambda stream: within("stream"),
        "CUDAGraph": Graph,
        "graph": graph,
    }
    for name, stand_in in stand_ins.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, stand_in)
    backend = CudaBackend(torch.device("cuda"))
    how = {"pool": "pool", "stream": backend._stream, "mode": "thread_local"}
    for taken in (100, 100):  # the second one gave memory back
        told.clear()
        replay = backend.capture(lambda: told.append("call"))
        inside = [("capture", how), "call", "end"]
        assert told == ["wait", ("stream", {}), "call", "end", "wait", *inside]
        assert backend.nbytes == taken
        told.clear()
        replay()
        assert told == ["replay"]
