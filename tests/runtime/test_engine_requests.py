"""What a request may ask for: several answers, log probabilities, deadlines, determinism."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
from helpers.fake_step import FakeStep, one_thread  # noqa: F401  (autouse fixture)

from smelt.runtime.engine import Engine
from smelt.runtime.errors import UserError
from smelt.runtime.sampling_params import SamplingParams
from smelt.runtime.sequence import StepOutput


def collect(engine: Engine) -> dict[tuple[int, int], list[StepOutput]]:
    found: dict[tuple[int, int], list[StepOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault((output.id, output.index), []).append(output)
        engine.check_integrity()
    return found


def tokens(outputs: list[StepOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def test_answers_of_one_prompt_share_its_cache_and_differ() -> None:
    step = FakeStep(max_tokens=64, max_sequences=8)
    params = SamplingParams(temperature=1.5, seed=3, max_tokens=12, n=4, ignore_eos=True)
    prompt = list(range(30))
    engine = Engine(step, blocks=64, prefix_cache=False)
    number = engine.add_request(prompt, params)
    found = collect(engine)
    answers = [tokens(found[number, i]) for i in range(4)]
    assert engine.metrics.prefilled_tokens == 30
    assert len({tuple(a) for a in answers}) == 4
    # Each is what a request of its own would give: the first one of the same seed at least.
    alone = Engine(step, blocks=64)
    single = alone.add_request(
        prompt, SamplingParams(temperature=1.5, seed=3, max_tokens=12, ignore_eos=True)
    )
    assert tokens(collect(alone)[single, 0]) == answers[0]
    assert engine.memory.free == 64


@pytest.mark.parametrize("blocks", [10, 64])
@pytest.mark.parametrize("lanes", [1, 2, 8])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_several_answers_do_not_depend_on_room(blocks: int, lanes: int, prefix_cache: bool) -> None:
    params = SamplingParams(temperature=1.5, seed=3, max_tokens=10, n=3, ignore_eos=True)
    reference = Engine(FakeStep(max_tokens=64), blocks=200)
    first = reference.add_request([5] * 17, params)
    wanted = collect(reference)
    engine = Engine(
        FakeStep(max_tokens=6, max_sequences=lanes), blocks=blocks, prefix_cache=prefix_cache
    )
    number = engine.add_request([5] * 17, params)
    other = engine.add_request([6] * 9, SamplingParams(max_tokens=10))
    found = collect(engine)
    for i in range(3):
        assert tokens(found[number, i]) == tokens(wanted[first, i])
    assert len(tokens(found[other, 0])) == 10


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_aborting_ends_every_answer(steps: int) -> None:
    engine = Engine(FakeStep(max_tokens=8), blocks=64)
    params = SamplingParams(temperature=1.0, n=3, max_tokens=20, ignore_eos=True)
    number = engine.add_request([1] * 20, params)
    for _ in range(steps):
        engine.step()
    engine.abort(number)
    found = [o for o in engine.step() if o.finish_reason]
    assert sorted((o.index, o.finish_reason) for o in found) == [(i, "abort") for i in range(3)]
    assert not engine.has_work
    engine.scheduler.cache.clear()
    assert engine.memory.free == 64


@pytest.mark.parametrize("max_tokens", [4, 64])
@pytest.mark.parametrize("blocks", [9, 64])
def test_log_probabilities_are_the_models_own(max_tokens: int, blocks: int) -> None:
    step = FakeStep(max_tokens=max_tokens)
    engine = Engine(step, blocks=blocks)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    engine.add_request(prompt, SamplingParams(max_tokens=2))
    collect(engine)  # the prompt is in the cache now, and is computed again all the same
    params = SamplingParams(
        max_tokens=6, temperature=0.8, seed=1, top_k=5, logprobs=3, prompt_logprobs=2
    )
    number = engine.add_request(prompt, params)
    engine.add_request([7] * 12, SamplingParams(max_tokens=8))
    found = collect(engine)[number, 0]
    answer = tokens(found)
    logprobs = [entry for output in found for entry in output.logprobs or ()]
    oracle = step.oracle([*prompt, *answer]).log_softmax(-1)
    for i, (token, entry) in enumerate(zip(answer, logprobs, strict=True)):
        row = oracle[len(prompt) - 1 + i]
        assert entry.token == token
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert entry.rank == int((row > row[token]).sum()) + 1
        assert [t for t, _ in entry.top] == row.topk(3).indices.tolist()
    of_prompt = found[0].prompt_logprobs
    assert of_prompt is not None
    assert [entry.token for entry in of_prompt] == prompt[1:]
    for i, entry in enumerate(of_prompt):
        assert entry.logprob == pytest.approx(float(oracle[i, prompt[i + 1]]), abs=1e-4)
        assert len(entry.top) == 2


def test_the_hit_rate_of_branching_prompts_is_the_oracles() -> None:
    rng = random.Random(0)
    step = FakeStep(max_tokens=64, max_position=256)
    engine = Engine(step, blocks=2000)
    seen: list[list[int]] = []
    expected = asked = 0
    trunk = [rng.randrange(97) for _ in range(60)]
    for _ in range(40):
        prompt = trunk[: rng.randint(1, 60)] + [rng.randrange(97) for _ in range(rng.randint(1, 9))]
        if seen and rng.random() < 0.4:
            prompt = rng.choice(seen) + [rng.randrange(97) for _ in range(rng.randint(1, 5))]
        longest = 0
        for earlier in seen:
            common = next(
                (i for i, (a, b) in enumerate(zip(earlier, prompt, strict=False)) if a != b),
                min(len(earlier), len(prompt)),
            )
            longest = max(longest, common)
        expected += min(longest, len(prompt) - 1)
        asked += len(prompt)
        engine.add_request(prompt, SamplingParams(max_tokens=1))
        collect(engine)
        seen.append(prompt)
    metrics = engine.metrics
    assert (metrics.reused_tokens, metrics.asked_tokens) == (expected, asked)
    assert metrics.prefilled_tokens == asked - expected
    assert metrics.hit_rate == pytest.approx(expected / asked)


@pytest.mark.parametrize("windows", [(0,), (0, 7), (5,)])
def test_a_conversation_computes_only_what_is_new(windows: tuple[int, ...]) -> None:
    step = FakeStep(windows=windows, max_tokens=64)
    engine = Engine(step, blocks=64)
    history = [2, 7, 1, 8, 2, 8, 1, 8, 2, 8]
    for turn in range(3):
        before = engine.metrics.prefilled_tokens
        number = engine.add_request(history, SamplingParams(max_tokens=6))
        answer = tokens(collect(engine)[number, 0])
        assert answer == step.greedy(history, 6)
        # The last sampled token of the turn before was never in the cache.
        assert engine.metrics.prefilled_tokens - before == (len(history) if turn == 0 else 1 + 5)
        history = history + answer + [turn] * 5


def test_tenants_share_nothing() -> None:
    engine = Engine(FakeStep(max_tokens=64), blocks=64)
    for salt, hits in (("a", 0), ("b", 0), ("a", 19), (None, 0)):
        before = engine.metrics.reused_tokens
        engine.add_request([4] * 20, SamplingParams(max_tokens=1), salt=salt)
        collect(engine)
        assert engine.metrics.reused_tokens - before == hits


def test_a_deadline_ends_an_answer_with_what_it_has() -> None:
    step = FakeStep()
    run = step.run

    def slow(*inputs: Any) -> torch.Tensor:
        time.sleep(0.01)
        return run(*inputs)

    step.run = slow  # type: ignore[method-assign]
    engine = Engine(step, blocks=64)
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    late = engine.add_request([1, 2], params, timeout_s=0.05)
    other = engine.add_request([1, 3], SamplingParams(max_tokens=20, ignore_eos=True))
    found = collect(engine)
    assert found[late, 0][-1].finish_reason == "timeout"
    assert 0 < len(tokens(found[late, 0])) < 100
    assert found[other, 0][-1].finish_reason == "length"


def test_a_failed_request_leaves_nothing_in_the_cache() -> None:
    step = FakeStep(max_tokens=64)
    run = step.run
    broken = True

    def sometimes(*inputs: Any) -> torch.Tensor:
        logits = run(*inputs)
        return logits * float("nan") if broken else logits

    step.run = sometimes  # type: ignore[method-assign]
    engine = Engine(step, blocks=64)
    number = engine.add_request([9] * 20)
    assert collect(engine)[number, 0][-1].finish_reason == "error"
    assert engine.memory.free == 64
    broken = False
    number = engine.add_request([9] * 20, SamplingParams(max_tokens=3))
    assert tokens(collect(engine)[number, 0]) == step.greedy([9] * 20, 3)


def test_a_deterministic_engine_gives_every_step_the_same_shape() -> None:
    step = FakeStep(max_tokens=64, max_rows=64, max_sequences=16)
    engine = Engine(step, blocks=100, deterministic=True)
    rng = random.Random(0)
    wanted = [[rng.randrange(97) for _ in range(rng.randint(1, 50))] for _ in range(6)]
    ids = [engine.add_request(prompt, SamplingParams(max_tokens=5)) for prompt in wanted]
    found = collect(engine)
    for number, prompt in zip(ids, wanted, strict=True):
        assert tokens(found[number, 0]) == step.greedy(prompt, 5)
    assert {len(batch.input_ids) for batch in step.batches} == {32}
    assert {len(batch.logits_rows) for batch in step.batches} == {32}


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="policy"):
        Engine(FakeStep(), blocks=8, policy="best")
    with pytest.raises(TypeError):
        Engine(FakeStep(), blocks=8, fast=True)
    with pytest.raises(UserError, match="tokens a step"):
        Engine(FakeStep(), blocks=8, max_tokens=-1)
