"""The scheduler alone, without torch: random traffic over tiny pools always ends, nothing leaks."""

from __future__ import annotations

import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.runtime.blocks import PagedMemory
from smelt.runtime.sampling_params import SamplingParams
from smelt.runtime.scheduler import Scheduler
from smelt.runtime.sequence import Sequence, Session


def request(number: int, prompt: int, answer: int, session: Session | None = None) -> Sequence:
    tokens = list(range(1000 * number, 1000 * number + prompt))
    return Sequence(number, tokens, SamplingParams(), prompt + answer, session=session)


def step(scheduler: Scheduler) -> list[Sequence]:
    """One step with made-up tokens; returns the requests that reached their limit."""
    chunks = scheduler.plan()
    assert sum(chunk.count for chunk in chunks) <= scheduler.max_tokens
    assert len({id(chunk.sequence) for chunk in chunks}) == len(chunks)
    lanes = [sequence.lane for sequence in scheduler.running]
    assert len(set(lanes)) == len(lanes)
    assert all(0 <= lane < scheduler.max_running for lane in lanes)
    for chunk in chunks:
        assert chunk.start == chunk.sequence.computed
        assert chunk.rows == (chunk.start + chunk.count == len(chunk.sequence.tokens))
        for table in chunk.sequence.tables:
            assert len(table.blocks) * table.block_size >= chunk.start + chunk.count
    scheduler.commit(chunks)
    ended = []
    for chunk in chunks:
        if chunk.rows:
            chunk.sequence.tokens.append(7)
            if len(chunk.sequence.tokens) >= chunk.sequence.limit:
                scheduler.finish(chunk.sequence)
                ended.append(chunk.sequence)
    owners = [s.tables for s in scheduler.running]
    scheduler.memory.check_integrity([*owners, *scheduler.sessions.tables()])
    return ended


def test_never_imports_torch() -> None:
    code = "import smelt.runtime.scheduler, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_decodes_come_first_and_prompts_are_cut() -> None:
    scheduler = Scheduler(PagedMemory(100, 4, [0]), max_tokens=8, max_running=4)
    scheduler.add(request(1, 3, 5))
    step(scheduler)
    scheduler.add(request(2, 20, 1))
    chunks = scheduler.plan()
    assert [(c.sequence.id, c.count, c.rows) for c in chunks] == [(1, 1, 1), (2, 7, 0)]


def test_first_come_first_served() -> None:
    scheduler = Scheduler(PagedMemory(100, 4, [0]), max_tokens=8, max_running=2)
    for number in range(5):
        scheduler.add(request(number, 4, 3))
    ended = []
    while scheduler.has_work:
        ended += [s.id for s in step(scheduler)]
    assert ended == sorted(ended)


def test_the_youngest_steps_back_and_returns_first() -> None:
    scheduler = Scheduler(PagedMemory(4, 2, [0]), max_tokens=8, max_running=4)
    first, second, third = request(1, 3, 5), request(2, 3, 3), request(3, 2, 2)
    for each in (first, second, third):
        scheduler.add(each)
    ended = []
    while scheduler.has_work:
        ended += [s.id for s in step(scheduler)]
    assert scheduler.preemptions > 0
    assert first.preempted == 0
    assert ended == [1, 2, 3]


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 30), st.integers(1, 12), st.integers(-1, 2)),
        st.tuples(st.just("step"), st.integers(1, 4)),
        st.tuples(st.just("cancel"), st.integers(0, 50)),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(
    ACTIONS,
    st.integers(1, 20),
    st.integers(1, 5),
    st.integers(1, 16),
    st.integers(1, 4),
    st.sampled_from([[0], [0, 5], [4], [3, 0, 9]]),
)
def test_random_traffic_ends_and_leaks_nothing(
    actions: list[tuple],
    blocks: int,
    block_size: int,
    max_tokens: int,
    max_running: int,
    windows: list[int],
) -> None:
    memory = PagedMemory(blocks, block_size, windows)
    scheduler = Scheduler(memory, max_tokens, max_running)
    sessions = [Session() for _ in range(3)]
    alive: dict[int, Sequence] = {}

    def end(sequences: list[Sequence]) -> None:
        for sequence in sequences:
            del alive[sequence.id]
            if sequence.session:
                sequence.session.busy = False

    number = 0
    for action in actions:
        if action[0] == "add":
            _, prompt, answer, choice = action
            session = sessions[choice] if choice >= 0 and not sessions[choice].busy else None
            if prompt + answer > memory.capacity:
                continue
            # Few distinct first tokens, so that sessions find common prefixes.
            sequence = request(number % 2, prompt, answer, session)
            sequence.id = number
            if session:
                session.busy = True
            alive[number] = sequence
            scheduler.add(sequence)
            number += 1
        elif action[0] == "step":
            for _ in range(action[1]):
                end(step(scheduler))
        elif alive:
            victim = alive[sorted(alive)[action[1] % len(alive)]]
            scheduler.finish(victim)
            end([victim])
    for _ in range(20000):
        if not scheduler.has_work:
            break
        end(step(scheduler))
    assert not alive
    assert not scheduler.has_work
    for session in sessions:
        scheduler.sessions.drop(session)
    assert memory.free == blocks
    memory.check_integrity([])
