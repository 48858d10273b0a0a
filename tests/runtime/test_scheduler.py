"""The scheduler alone, without torch: random traffic over tiny pools always ends, nothing leaks."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.runtime.blocks import PagedMemory
from smelt.runtime.errors import UserError
from smelt.runtime.policies import Fcfs, Mlfq, Priority
from smelt.runtime.sampling_params import SamplingParams
from smelt.runtime.scheduler import Scheduler
from smelt.runtime.sequence import Sequence


def request(number: int, prompt: int, answer: int, priority: int = 0) -> Sequence:
    tokens = list(range(1000 * number, 1000 * number + prompt))
    return Sequence(number, tokens, SamplingParams(), prompt + answer, priority=priority)


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


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
    scheduler.memory.check_integrity(scheduler.tables(), scheduler.cache.blocks())
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


def drain(scheduler: Scheduler) -> list[int]:
    ended = []
    for _ in range(20000):
        if not scheduler.has_work:
            return ended
        ended += [s.id for s in step(scheduler)]
    raise AssertionError("requests did not end")


def test_a_higher_priority_overtakes_and_waiting_counts() -> None:
    clock = Clock()
    scheduler = Scheduler(
        PagedMemory(100, 4, [0]), 8, max_running=1, policy=Priority(aging_s=10.0), clock=clock
    )
    scheduler.add(request(1, 4, 6, priority=1))
    step(scheduler)
    scheduler.add(request(2, 4, 3, priority=0))
    step(scheduler)
    assert [s.id for s in scheduler.running] == [2]
    # What was overtaken keeps its cache: nothing of it is computed again.
    assert scheduler.waiting[0].computed == 4
    assert drain(scheduler) == [2, 1]
    scheduler.add(request(3, 4, 3, priority=1))
    clock.now += 11
    scheduler.add(request(4, 4, 3, priority=0))
    assert drain(scheduler) == [3, 4]


def test_short_answers_pass_long_ones_under_mlfq() -> None:
    orders = {}
    for policy in (Fcfs(), Mlfq(quantum=4)):
        scheduler = Scheduler(
            PagedMemory(100, 4, [0]), 8, max_running=1, policy=policy, clock=Clock()
        )
        scheduler.add(request(1, 4, 60))
        scheduler.add(request(2, 4, 3))
        orders[policy.name] = drain(scheduler)
    assert orders == {"fcfs": [1, 2], "mlfq": [2, 1]}


def test_a_long_prompt_joins_below_the_top() -> None:
    policy = Mlfq(quantum=1)
    scheduler = Scheduler(PagedMemory(100, 4, [0]), 8, max_running=1, policy=policy, clock=Clock())
    long, short = request(1, 60, 2), request(2, 4, 2)
    scheduler.add(long)
    scheduler.add(short)
    assert (long.level, short.level) == (3, 0)
    assert drain(scheduler) == [2, 1]


def test_nobody_starves_under_mlfq() -> None:
    clock = Clock()
    policy = Mlfq(quantum=2, starvation_s=5.0)
    scheduler = Scheduler(PagedMemory(100, 4, [0]), 8, max_running=1, policy=policy, clock=clock)
    long = request(0, 4, 40)
    scheduler.add(long)
    ended: list[int] = []
    for number in range(1, 200):
        scheduler.add(request(number, 4, 2))
        for _ in range(3):
            ended += [s.id for s in step(scheduler)]
            clock.now += 1.0
        if 0 in ended:
            return
    raise AssertionError("the long request never ended")


def test_a_deadline_is_reported_once() -> None:
    clock = Clock()
    scheduler = Scheduler(PagedMemory(100, 4, [0]), 8, max_running=1, clock=clock)
    late = request(1, 4, 6)
    late.deadline = 5.0
    scheduler.add(late)
    scheduler.add(request(2, 4, 6))
    assert scheduler.expired() == []
    clock.now = 6.0
    assert scheduler.expired() == [late]
    scheduler.finish(late)
    assert scheduler.expired() == []
    assert drain(scheduler) == [2]


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(UserError, match="fcfs, priority, mlfq"):
        Scheduler(PagedMemory(4, 4, [0]), 8, 1, policy="fair")


def test_drafts_take_what_is_left_of_a_step() -> None:
    scheduler = Scheduler(PagedMemory(100, 4, [0]), max_tokens=8, max_running=4)
    first, second = request(1, 2, 20), request(2, 2, 20)
    scheduler.add(first)
    scheduler.add(second)
    step(scheduler)
    first.draft, second.draft = [1, 2, 3, 4], [5, 6, 7, 8]
    chunks = scheduler.plan()
    assert [(c.count, c.rows, c.draft) for c in chunks] == [
        (5, 5, [1, 2, 3, 4]),
        (3, 3, [5, 6]),
    ]
    scheduler.commit(chunks)
    assert [c.sequence.computed for c in chunks] == [3, 3]


def test_samples_of_one_prompt_share_its_blocks() -> None:
    memory = PagedMemory(100, 4, [0])
    scheduler = Scheduler(memory, max_tokens=16, max_running=4, prefix_cache=False)
    lead = request(1, 10, 20)
    scheduler.add(lead)
    scheduler.commit(scheduler.plan())
    lead.tokens.append(7)
    for index in range(1, 4):
        fork = request(1, 10, 20)
        fork.index = index
        scheduler.fork(lead, fork)
        fork.tokens.append(7)
    assert [memory.pools[0].references(b) for b in lead.tables[0].blocks] == [4, 4, 4]
    assert memory.free == 97
    chunks = scheduler.plan()
    assert len(chunks) == 4
    # The last, half-filled block is copied by all but the one that is left with it.
    assert len(scheduler.copies) == 3
    assert [memory.pools[0].references(b) for b in lead.tables[0].blocks[:2]] == [4, 4]
    assert memory.free == 94


ACTIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"), st.integers(1, 30), st.integers(1, 12), st.integers(0, 2), st.booleans()
        ),
        st.tuples(st.just("step"), st.integers(1, 4)),
        st.tuples(st.just("cancel"), st.integers(0, 50)),
        st.tuples(st.just("wait"), st.integers(1, 40)),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(
    actions=ACTIONS,
    blocks=st.integers(1, 20),
    block_size=st.integers(1, 5),
    max_tokens=st.integers(1, 16),
    max_running=st.integers(1, 4),
    windows=st.sampled_from([[0], [0, 5], [4], [3, 0, 9]]),
    policy=st.sampled_from(["fcfs", "priority", "mlfq"]),
    prefix_cache=st.booleans(),
)
def test_random_traffic_ends_and_leaks_nothing(
    actions: list[tuple],
    blocks: int,
    block_size: int,
    max_tokens: int,
    max_running: int,
    windows: list[int],
    policy: str,
    prefix_cache: bool,
) -> None:
    memory = PagedMemory(blocks, block_size, windows)
    clock = Clock()
    scheduler = Scheduler(
        memory, max_tokens, max_running, prefix_cache=prefix_cache, policy=policy, clock=clock
    )
    alive: dict[int, Sequence] = {}
    ended: list[int] = []
    number = 0

    def steps(count: int) -> None:
        for _ in range(count):
            for sequence in step(scheduler):
                del alive[sequence.id]
                ended.append(sequence.id)

    for action in actions:
        if action[0] == "add":
            _, prompt, answer, priority, fresh = action
            if prompt + answer > memory.capacity:
                continue
            # Few distinct first tokens, so that prompts share prefixes.
            sequence = request(number % 2, prompt, answer, priority)
            sequence.id, sequence.salt = number, fresh or None
            alive[number] = sequence
            scheduler.add(sequence)
            number += 1
        elif action[0] == "step":
            steps(action[1])
        elif action[0] == "wait":
            clock.now += action[1]
        elif alive:
            victim = alive.pop(sorted(alive)[action[1] % len(alive)])
            scheduler.finish(victim, keep=action[1] % 2 == 0)
    for _ in range(20000):
        if not scheduler.has_work:
            break
        steps(1)
    assert not alive
    if policy == "fcfs" and max_running == 1:
        assert ended == sorted(ended)
    scheduler.cache.clear()
    assert memory.free == blocks
    memory.check_integrity([])
