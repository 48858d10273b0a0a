"""What waits for nothing and leaves the host out, on the CPU and, with `make test-gpu`, on CUDA."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.device_step import VOCAB, DeviceStep
from helpers.fake_step import one_thread  # noqa: F401  (autouse fixture)
from helpers.graphs import Calls

from smelt.runtime.cuda_graphs import CudaBackend, GraphedProgram, with_graphs
from smelt.runtime.engine import Engine
from smelt.runtime.sampler import Row, SamplerState, pick
from smelt.runtime.sampling_params import SamplingParams
from smelt.runtime.transfer import HostCopy, Packing, read, send, upload

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """On CUDA, an operation that waits for the device raises."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def answers(program: Any, **options: Any) -> list[tuple[list[int], str]]:
    """Of twelve requests, of which some come late."""
    rng = random.Random(4)
    engine = Engine(program, blocks=60, eos_token_ids=[3, 9], **options)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))] for _ in range(12)]
    kinds: list[dict[str, Any]] = [{}, {"temperature": 0.9}, {"temperature": 1.1, "top_k": 8}]
    found: dict[int, tuple[list[int], str]] = {}
    while prompts or engine.has_work:
        while prompts and (len(prompts) > 6 or not engine.has_work or rng.random() < 0.2):
            params = SamplingParams(max_tokens=20, seed=len(prompts), **kinds[len(prompts) % 3])
            found[engine.add_request(prompts.pop(), params)] = ([], "")
        for output in engine.step():
            assert output.error is None
            tokens, _ = found[output.id]
            found[output.id] = ([*tokens, *output.token_ids], output.finish_reason or "")
        engine.check_integrity()
    engine.scheduler.cache.clear()
    assert engine.memory.free == 60
    return list(found.values())


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
def test_answers_are_those_of_the_plain_engine(
    device: torch.device, graphs: bool, ahead: bool
) -> None:
    plain = answers(DeviceStep(torch.device("cpu")), run_ahead=False)
    assert len({tuple(tokens) for tokens, _ in plain}) > 8
    step: Any = DeviceStep(device)
    if graphs and device.type == "cpu":
        step = GraphedProgram(step, Calls())
    assert answers(step, cuda_graphs=graphs, run_ahead=ahead) == plain


def test_steps_of_graphs_write_what_steps_write(device: torch.device) -> None:
    step = DeviceStep(device)
    backend = Calls() if device.type == "cpu" else CudaBackend(device)
    graphed = GraphedProgram(step, backend)
    engine = Engine(graphed, blocks=40, cuda_graphs=False, run_ahead=False)
    ids = [engine.add_request([i, 5, 7 * i % VOCAB]) for i in range(5)]
    engine.caches[0].fill_(float("nan"))
    for _ in range(9):
        engine.step()
    wanted = torch.full((40, 4), float("nan"))
    for sequence in engine.scheduler.running:
        table = sequence.tables[0]
        for position, token in enumerate(sequence.tokens[: sequence.computed]):
            wanted[table.blocks[position // 4], position % 4] = token + 1.0
    found = engine.caches[0][:, 0, :, 0, 0].cpu()
    assert torch.equal(found.nan_to_num(-1.0), wanted.nan_to_num(-1.0))
    assert graphed.graphs == 1 and len(ids) == 5
    if device.type == "cuda":
        assert step.runs == 3  # a prompt, and twice while capturing
        assert graphed.graph_bytes > 0


def test_nothing_that_runs_ahead_waits_for_the_device(device: torch.device) -> None:
    program = with_graphs(DeviceStep(device))
    engine = Engine(program, blocks=60, cuda_graphs=False, run_ahead=True)
    for i in range(3):
        params = SamplingParams(
            max_tokens=30, temperature=float(i), seed=i, top_k=5 * (i == 2), ignore_eos=True
        )
        engine.add_request([i, 1, 2], params)
    for _ in range(4):  # graphs are captured, pinned memory is taken
        engine.step()
    assert engine._ahead is not None
    chunks = engine._ahead.chunks()
    assert len(chunks) == 3
    with no_waiting(device):
        logits = engine._ahead.logits(chunks)
        assert logits is not None
        launch = engine._ahead.after(chunks)
        assert launch is not None
        rows = [Row(c.sequence.sampler, c.sequence.tokens) for c in chunks]  # type: ignore[arg-type]
        launch(pick(logits, rows))
    assert [c.start for c in engine._ahead.chunks()] == [c.start + 1 for c in chunks]


def test_picking_waits_for_nothing(device: torch.device) -> None:
    kinds: list[dict[str, Any]] = [
        *({}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 5}),
        *({"temperature": 1.0, "min_p": 0.1}, {"temperature": 1.0, "typical_p": 0.7}),
        {"temperature": 1.0, "top_p": 0.8, "seed": 3},
    ]
    states = [SamplerState(SamplingParams(**{"seed": 1, **fields})) for fields in kinds]
    rows = [Row(state, [1, 2]) for state in states]
    logits = torch.randn(len(rows), 200, generator=torch.Generator().manual_seed(1))
    wanted = pick(logits, rows)
    there = logits.to(device)
    pick(there, rows)  # kernels are loaded
    with no_waiting(device):
        found = pick(there, rows)
    assert found.device.type == device.type and found.tolist() == wanted.tolist()
    logits[1] = float("nan")
    assert pick(logits.to(device), rows).tolist()[1] == -1


def test_what_is_sent_arrives(device: torch.device) -> None:
    given = [torch.arange(7), torch.zeros(3, 0, dtype=torch.bool), torch.ones(2, 5).int()]
    with no_waiting(device):
        moved = upload([*given, send([4, 5], torch.int64, device)], device)
        numbers = send([0.5, 2.0], torch.float64, device)
    assert all(tensor.device.type == device.type for tensor in moved)
    for mine, theirs in zip(moved, given, strict=False):
        assert torch.equal(mine.cpu(), theirs)
    assert read(moved[-1]) == [4, 5] and read(numbers) == [0.5, 2.0]
    packing = Packing(((3,),), (torch.int64,))
    copies = [HostCopy(packing, device) for _ in range(2)]
    buffer = torch.zeros(packing.nbytes, dtype=torch.uint8, device=device)
    (view,) = packing.views(buffer)
    seen = []
    for i in range(6):
        copies.reverse()
        copies[0].arrays()[0].fill(i)
        copies[0].send(buffer)
        seen.append(view.clone())
    assert [tensor.tolist() for tensor in seen] == [[i] * 3 for i in range(6)]
