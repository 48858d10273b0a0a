"""Sequences that pass the length at which rotary factors switch: one stated rule, whatever happens.

longrope: as one forward over all tokens. dynamic NTK: a prompt's tokens by the prompt's length,
generated tokens by their own. The model of `FakeStep` gives positions another meaning beyond.
"""

from __future__ import annotations

import random

import pytest
import torch
from helpers.fake_step import FakeModel, FakeStep, one_thread  # noqa: F401  (autouse fixture)
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.runtime.batch import ContractError
from smelt.runtime.blocks import PagedMemory
from smelt.runtime.engine import Engine
from smelt.runtime.length_scaling import DYNAMIC, LONGROPE, LengthScaling
from smelt.runtime.sampling_params import SamplingParams
from smelt.runtime.scheduler import Scheduler
from smelt.runtime.scoring import score
from smelt.runtime.sequence import Sequence
from smelt.runtime.speculation.drafter import Proposal
from smelt.runtime.speculation.model import ModelDrafter

KINDS = (LONGROPE, DYNAMIC)
LIMIT = 24


def fake(kind: str, **sizes: object) -> FakeStep:
    return FakeStep(rope=LengthScaling(kind, LIMIT), **sizes)  # type: ignore[arg-type]


def prompt(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(97) for _ in range(count)]


def run(engine: Engine) -> dict[int, list[int]]:
    """Step until all is done: the tokens of each request."""
    tokens: dict[int, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            if output.error:
                raise output.error
            tokens.setdefault(output.id, []).extend(output.token_ids)
        engine.check_integrity()
    return tokens


def answer(engine: Engine, tokens: list[int], count: int) -> list[int]:
    request = engine.add_request(tokens, SamplingParams(max_tokens=count))
    return run(engine)[request]


@pytest.mark.parametrize("kind", KINDS)
def test_regimes_and_lengths(kind: str) -> None:
    scaling = LengthScaling(kind, 10)
    assert scaling.regime(10, 10) == scaling.regime(10, 3) == 0
    assert scaling == LengthScaling.from_json(scaling.to_json())
    if kind == LONGROPE:
        assert scaling.regime(11, 3) == scaling.regime(11, 11) == 1
        assert scaling.lengths(12, 3, [0, 1, 11]) == [12, 12, 12]
        assert (scaling.room(8), scaling.room(10), scaling.room(11)) == (2, 0, None)
    else:
        assert scaling.regime(15, 3) == 0
        assert scaling.regime(15, 11) == scaling.regime(16, 11) == 11
        assert scaling.lengths(12, 3, [0, 1, 11]) == [3, 3, 12]
        assert scaling.room(8) is scaling.room(11) is None


def test_other_kinds_do_not_depend_on_the_length() -> None:
    with pytest.raises(ValueError, match="'yarn' does not depend on the length"):
        LengthScaling("yarn", 10)


def test_a_batch_without_lengths_is_refused() -> None:
    step = fake(LONGROPE)
    engine = Engine(step, blocks=40)
    engine.add_request(prompt(3), SamplingParams(max_tokens=1))
    engine.step()
    (batch,) = step.batches
    assert batch.rope_lens is not None and batch.rope_lens.dtype == torch.int64
    batch.rope_lens = None
    with pytest.raises(ContractError, match="rope_lens: the graph needs the lengths"):
        batch.check(step.layout, step.spec)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [5, LIMIT - 1, LIMIT, LIMIT + 1, 2 * LIMIT])
def test_a_sequence_alone(kind: str, length: int) -> None:
    """Prompts below, at and beyond the limit; answers that cross it and go far beyond."""
    step = fake(kind)
    tokens = prompt(length)
    assert answer(Engine(step, blocks=40), tokens, 30) == step.greedy(tokens, 30)


def test_longrope_crosses_once_and_computes_the_sequence_again() -> None:
    step = fake(LONGROPE, max_tokens=64)
    engine = Engine(step, blocks=40)
    tokens = prompt(LIMIT - 3)
    assert answer(engine, tokens, 10) == step.greedy(tokens, 10)
    counts = [len(batch.input_ids) for batch in step.batches]
    # The token at position 24 is the first that needs 25 tokens' factors.
    assert counts == [LIMIT - 3, 1, 1, 1, LIMIT + 1, 1, 1, 1, 1, 1]
    assert engine.metrics.preemptions == 1


def test_longrope_that_ends_at_the_limit_is_not_computed_again() -> None:
    step = fake(LONGROPE)
    engine = Engine(step, blocks=40)
    tokens = prompt(LIMIT - 3)
    # The last token of an answer is never computed, so one more than the limit fits.
    assert answer(engine, tokens, 4) == step.greedy(tokens, 4)
    assert engine.metrics.preemptions == 0


def test_dynamic_keeps_its_cache_when_it_crosses() -> None:
    step = fake(DYNAMIC, max_tokens=64)
    engine = Engine(step, blocks=40)
    answer(engine, prompt(LIMIT - 3), 10)
    assert [len(batch.input_ids) for batch in step.batches] == [LIMIT - 3] + [1] * 9
    lengths = [int(batch.rope_lens[-1]) for batch in step.batches if batch.rope_lens is not None]
    assert lengths == list(range(LIMIT - 3, LIMIT + 7))


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    windows=st.sampled_from([(0,), (0, 7)]),
    block_size=st.sampled_from([1, 3, 16]),
    max_tokens=st.sampled_from([5, 16, 64]),
    tightness=st.sampled_from([1, 2, 10]),
    deterministic=st.booleans(),
    policy=st.sampled_from(["fcfs", "mlfq"]),
    seed=st.integers(0, 1000),
)
def test_batches_chunks_preemption_and_reuse_change_nothing(
    kind: str,
    windows: tuple[int, ...],
    block_size: int,
    max_tokens: int,
    tightness: int,
    deterministic: bool,
    policy: str,
    seed: int,
) -> None:
    """Prompts that share their beginnings, some short, some long, some crossing."""
    step = fake(kind, windows=windows, block_size=block_size, max_tokens=max_tokens)
    engine = Engine(
        step,
        blocks=tightness * -(-48 // block_size),
        deterministic=deterministic,
        policy=policy,
    )
    rng = random.Random(seed)
    whole = prompt(40, seed % 3)
    for _ in range(2):  # the second round finds what the first has left
        asked = {}
        for _ in range(5):
            tokens = whole[: rng.randint(1, 38)] + prompt(rng.randint(0, 2), rng.randrange(9))
            count = rng.randint(1, 8)
            asked[engine.add_request(tokens, SamplingParams(max_tokens=count))] = (tokens, count)
        for request, found in run(engine).items():
            assert found == step.greedy(*asked[request])
    engine.scheduler.cache.clear()
    assert engine.memory.free == engine.memory.pools[0].size


@pytest.mark.parametrize("kind", KINDS)
def test_prefixes_are_shared_within_a_regime_and_never_across(kind: str) -> None:
    engine = Engine(fake(kind), blocks=200)
    whole = prompt(60)

    def reused(tokens: list[int]) -> int:
        engine.add_request(tokens, SamplingParams(max_tokens=1))
        found = 0
        while engine.has_work:
            found += sum(output.reused_tokens for output in engine.step())
        return found

    assert reused(whole[:20]) == 0
    assert reused(whole[:24]) == 20  # both below the limit
    assert reused(whole[:40]) == 0  # beyond it: other keys
    assert reused(whole[:20]) == 19
    again = [*whole[:39], whole[39] ^ 1]  # as long as one before
    assert reused(again) == 39
    assert reused(whole[:50]) == (40 if kind == LONGROPE else 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [LIMIT - 4, LIMIT, LIMIT + 3])
def test_samples_of_one_prompt_cross_by_themselves(kind: str, length: int) -> None:
    step = fake(kind)
    tokens = prompt(length)
    engine = Engine(step, blocks=100)
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=9)
    engine.add_request(tokens, params)
    found: dict[int, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.index, []).extend(output.token_ids)
        engine.check_integrity()
    plain = Engine(step, blocks=100, prefix_cache=False, max_tokens=7)
    plain.add_request(tokens, params)
    again: dict[int, list[int]] = {}
    while plain.has_work:
        for output in plain.step():
            again.setdefault(output.index, []).extend(output.token_ids)
    assert found == again and len(found) == 3
    if length > LIMIT or kind == DYNAMIC:  # forks go on from the prompt's cache
        assert engine.metrics.preemptions == 0
    # Each token is likely under the rule's logits; factors of the other regime make others likely.
    for tokens_of in found.values():
        for i in range(1, len(tokens_of)):
            logits = step.oracle(tokens + tokens_of[:i], length)[-1]
            assert logits.log_softmax(-1)[tokens_of[i]] > -12


class Oracle:
    """Drafts what the model itself will say, so that every draft is taken."""

    name = "oracle"

    def __init__(self, step: FakeStep) -> None:
        self.step = step

    def propose(self, sequences: list[Sequence], counts: list[int]) -> list[Proposal | None]:
        found: list[Proposal | None] = []
        for sequence, count in zip(sequences, counts, strict=True):
            tokens = list(sequence.tokens)
            for _ in range(count):
                logits = self.step.oracle(tokens, sequence.prompt_length)
                tokens.append(int(logits[-1].argmax()))
            found.append(Proposal(tokens[len(sequence.tokens) :]))
        return found

    def observe(self, sequence: Sequence, features: torch.Tensor) -> None: ...

    def drop(self, sequence: Sequence) -> None: ...


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_do_not_reach_over_the_limit(kind: str) -> None:
    step = fake(kind, max_tokens=64)
    tokens = prompt(LIMIT - 8)
    engine = Engine(step, blocks=40, drafter=Oracle(step), draft_tokens=4)
    assert answer(engine, tokens, 20) == step.greedy(tokens, 20)
    metrics = engine.metrics
    assert metrics.accepted_tokens == metrics.drafted_tokens > 8
    assert metrics.preemptions == (kind == LONGROPE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_model_switches_too(kind: str) -> None:
    """A draft from the same model is always right, if its cache follows the same rule."""
    step = fake(kind, max_tokens=64)
    drafter = ModelDrafter(fake(kind, max_tokens=64), 97)
    engine = Engine(step, blocks=40, drafter=drafter, draft_tokens=3)
    tokens = prompt(LIMIT - 8)
    assert answer(engine, tokens, 24) == step.greedy(tokens, 24)
    metrics = engine.metrics
    assert metrics.accepted_tokens == metrics.drafted_tokens > 8


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_one_forward(kind: str) -> None:
    step = fake(kind)
    wanted = [prompt(n, n) for n in (5, LIMIT, LIMIT + 1, 60)]
    for tokens, logits in zip(wanted, score(Engine(step, blocks=60), wanted), strict=True):
        torch.testing.assert_close(logits, step.oracle(tokens))


def test_a_paused_sequence_gives_an_outgrown_cache_up() -> None:
    """Between its token and its next step it may wait with its blocks; then it must not go on."""
    memory = PagedMemory(100, 4, [0])
    scheduler = Scheduler(memory, 64, 4, policy="priority", rope=LengthScaling(LONGROPE, 8))
    sequence = Sequence(1, list(range(8)), SamplingParams(), 20)
    scheduler.add(sequence)
    scheduler.commit(scheduler.plan())
    scheduler._pause(sequence, 0.0)
    sequence.tokens.append(9)
    (chunk,) = scheduler.plan()
    assert (chunk.start, chunk.count, sequence.regime) == (0, 9, 1)


def test_the_model_of_this_test_tells_the_factors_apart() -> None:
    for kind in KINDS:
        step, tokens = fake(kind), prompt(LIMIT + 6)
        other = FakeStep(FakeModel()).oracle(tokens)[-1]
        assert (step.oracle(tokens)[-1] - other).abs().max() > 1
