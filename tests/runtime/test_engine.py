"""The engine over a tiny attention model: tokens never depend on how they were computed."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from helpers.fake_step import FakeStep, one_thread  # noqa: F401  (autouse fixture)
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.runtime.engine import Engine
from smelt.runtime.errors import SmeltError, UserError
from smelt.runtime.kv_cache import allocate_cache, cache_blocks, free_memory
from smelt.runtime.sampling_params import SamplingParams
from smelt.runtime.scoring import score

BOTH = {"tokens": 5, "fraction": 0.5}
EXPECTED: dict[tuple[object, ...], list[int]] = {}


def run(engine: Engine) -> dict[int, tuple[list[int], str]]:
    """Step until all is done: tokens and finish reason of each request."""
    tokens: dict[int, list[int]] = {}
    reasons: dict[int, str] = {}
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.id, []).extend(output.token_ids)
            if output.finish_reason:
                reasons[output.id] = output.finish_reason
            if output.error:
                raise output.error
        engine.check_integrity()
    assert engine.metrics.running == engine.metrics.waiting == 0
    return {i: (tokens[i], reasons[i]) for i in reasons}


def expected(step: FakeStep, prompt: list[int], count: int) -> list[int]:
    key = (step.windows, count, *prompt)
    if key not in EXPECTED:
        EXPECTED[key] = step.greedy(prompt, count)
    return EXPECTED[key]


def prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(97) for _ in range(rng.randint(1, longest))] for _ in range(count)]


@settings(max_examples=12, deadline=None)
@given(
    windows=st.sampled_from([(0,), (0, 7), (5, 5)]),
    block_size=st.sampled_from([1, 3, 16]),
    max_tokens=st.sampled_from([3, 16, 64]),
    max_sequences=st.integers(1, 6),
    tightness=st.sampled_from([1, 2, 10]),
)
def test_greedy_is_the_same_batched_chunked_and_preempted(
    windows: tuple[int, ...],
    block_size: int,
    max_tokens: int,
    max_sequences: int,
    tightness: int,
) -> None:
    step = FakeStep(
        windows=windows,
        block_size=block_size,
        max_tokens=max_tokens,
        max_sequences=max_sequences,
    )
    engine = Engine(step, blocks=tightness * -(-32 // block_size))
    wanted = prompts(6, 22)
    ids = [engine.add_request(p, SamplingParams(max_tokens=8)) for p in wanted]
    results = run(engine)
    for request, prompt in zip(ids, wanted, strict=True):
        assert results[request] == (expected(step, prompt, 8), "length")
    engine.scheduler.cache.clear()
    assert engine.memory.free == engine.memory.pools[0].size


def test_preemption_happens_and_changes_nothing() -> None:
    step = FakeStep()
    engine = Engine(step, blocks=10)
    wanted = prompts(6, 20, seed=1)
    ids = [engine.add_request(p, SamplingParams(max_tokens=8)) for p in wanted]
    results = run(engine)
    assert engine.metrics.preemptions > 0
    assert [results[i][0] for i in ids] == [expected(step, p, 8) for p in wanted]


def test_sampled_tokens_survive_batching_and_preemption() -> None:
    params = [SamplingParams(temperature=1.5, seed=i, max_tokens=8) for i in range(6)]
    wanted = prompts(6, 20, seed=1)
    alone = []
    for prompt, each in zip(wanted, params, strict=True):
        engine = Engine(FakeStep(), blocks=100)
        request = engine.add_request(prompt, each)
        alone.append(run(engine)[request][0])
    engine = Engine(FakeStep(), blocks=10)
    ids = [engine.add_request(p, each) for p, each in zip(wanted, params, strict=True)]
    results = run(engine)
    assert engine.metrics.preemptions > 0
    assert [results[i][0] for i in ids] == alone


def test_window_blocks_are_freed_while_running() -> None:
    step = FakeStep(windows=(7,), max_position=256)
    engine = Engine(step, blocks=64, prefix_cache=False)
    request = engine.add_request(prompts(1, 1)[0], SamplingParams(max_tokens=60))
    used = []
    result: list[int] = []
    while engine.has_work:
        for output in engine.step():
            result += output.token_ids
        used.append(64 - engine.memory.free)
    assert max(used) <= 3
    assert result == expected(step, prompts(1, 1)[0], 60), request


def run_one(engine: Engine, prompt: list[int], count: int = 3) -> list[int]:
    request = engine.add_request(prompt, SamplingParams(max_tokens=count))
    return run(engine)[request][0]


def test_end_tokens_stop_and_can_be_ignored() -> None:
    step = FakeStep()
    prompt = [3, 1, 4]
    answer = expected(step, prompt, 8)
    place = next(i for i in range(2, 8) if answer[i] not in answer[:i])
    end = answer[place]
    for ends, params in (
        ([96, end], SamplingParams(max_tokens=8)),
        ([], SamplingParams(max_tokens=8, stop_token_ids=[end])),
    ):
        engine = Engine(step, blocks=32, eos_token_ids=ends)
        request = engine.add_request(prompt, params)
        assert run(engine)[request] == (answer[: place + 1], "stop")
    engine = Engine(step, blocks=32, eos_token_ids=[end])
    request = engine.add_request(prompt, SamplingParams(max_tokens=8, ignore_eos=True))
    assert run(engine)[request] == (answer, "length")
    request = engine.add_request(prompt, SamplingParams(max_tokens=8, min_tokens=8))
    assert end not in run(engine)[request][0][:7]


def test_the_context_ends_an_answer() -> None:
    step = FakeStep(max_position=24)
    engine = Engine(step, blocks=64)
    request = engine.add_request(list(range(20)), SamplingParams(max_tokens=None))
    assert run(engine)[request] == (expected(step, list(range(20)), 4), "length")
    with pytest.raises(UserError, match=r"24 tokens.*context is 24"):
        engine.add_request(list(range(24)))
    engine = Engine(step, blocks=3)
    with pytest.raises(UserError, match=r"20 tokens.*holds 12"):
        engine.add_request(list(range(20)))
    request = engine.add_request([1, 2, 3], SamplingParams(max_tokens=None))
    assert len(run(engine)[request][0]) == 9


def test_bad_prompts_are_refused() -> None:
    engine = Engine(FakeStep(), blocks=8)
    with pytest.raises(UserError, match="no tokens"):
        engine.add_request([])
    for token in (-1, 97):
        with pytest.raises(UserError, match=str(token)):
            engine.add_request([1, token])
    with pytest.raises(UserError, match="tokenizer"):
        engine.add_request([1], SamplingParams(stop=["x"]))


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_abort_at_any_point_frees_everything(steps: int) -> None:
    engine = Engine(FakeStep(max_tokens=4), blocks=8)
    ids = [engine.add_request(list(range(10))) for _ in range(4)]
    for _ in range(steps):
        engine.step()
    for request in ids:
        engine.abort(request)
        engine.abort(request)
        engine.check_integrity()
    outputs = engine.step()
    assert [o.finish_reason for o in outputs] == ["abort"] * 4
    assert not engine.has_work
    engine.scheduler.cache.clear()
    assert engine.memory.free == 8


class Failing(FakeStep):
    """Raises in the third step, then works again."""

    def run(self, batch, caches):  # type: ignore[no-untyped-def]
        logits = super().run(batch, caches)
        if len(self.batches) == 3:
            raise RuntimeError("kernel failed")
        return logits


def test_a_failing_step_ends_its_requests_only() -> None:
    step = Failing(max_sequences=2)
    engine = Engine(step, blocks=64)
    ids = [engine.add_request(p, SamplingParams(max_tokens=4)) for p in prompts(3, 4)]
    reasons = {}
    while engine.has_work:
        for output in engine.step():
            if output.finish_reason:
                reasons[output.id] = output.finish_reason
                assert (output.finish_reason == "error") == (output.error is not None)
        engine.check_integrity()
    assert [reasons[i] for i in ids] == ["error", "error", "length"]
    engine.scheduler.cache.clear()
    assert engine.memory.free == 64


class NotANumber(FakeStep):
    """The logits of its first row are NaN."""

    def run(self, batch, caches):  # type: ignore[no-untyped-def]
        logits = super().run(batch, caches)
        logits[0] = float("nan")
        return logits


def test_nan_logits_end_that_request_alone() -> None:
    engine = Engine(NotANumber(), blocks=64)
    engine.add_request([1, 2])
    other = engine.add_request([3, 4])
    outputs = {o.id: o for o in engine.step()}
    assert outputs[0].finish_reason == "error"
    assert isinstance(outputs[0].error, SmeltError)
    assert outputs[other].finish_reason is None


@pytest.mark.parametrize("blocks", [11, 64])
def test_scores_equal_the_oracle(blocks: int) -> None:
    step = FakeStep(max_rows=5, max_tokens=16)
    engine = Engine(step, blocks=blocks)
    run_one(engine, list(range(12)))
    wanted = [*prompts(5, 30, seed=2), [], list(range(44))]
    for prompt, logits in zip(wanted, score(engine, wanted), strict=True):
        assert logits.dtype == torch.float32
        assert logits.shape == (len(prompt), 97)
        if prompt:
            torch.testing.assert_close(logits, step.oracle(prompt), atol=1e-5, rtol=1e-5)
    engine.scheduler.cache.clear()
    assert engine.memory.free == blocks


@pytest.mark.parametrize("max_rows", [1, 5, 16])
def test_scores_of_the_last_tokens_are_those_rows_alone(max_rows: int) -> None:
    step = FakeStep(max_rows=max_rows, max_tokens=16)
    engine = Engine(step, blocks=24)
    wanted = prompts(5, 40, seed=3)
    last = [0, 1, 2, len(wanted[3]), min(7, len(wanted[4]))]
    for prompt, count, logits in zip(wanted, last, score(engine, wanted, last), strict=True):
        assert logits.shape == (count, 97)
        rows = step.oracle(prompt)[len(prompt) - count :]
        torch.testing.assert_close(logits, rows, atol=1e-5, rtol=1e-5)
    # Tokens without a row do not count against the rows of a step.
    steps = len(step.batches)
    score(engine, [list(range(48))], [1])
    assert len(step.batches) - steps == 3
    with pytest.raises(UserError, match="at most the number"):
        score(engine, [[1, 2]], [3])


def test_cache_size_follows_what_is_asked() -> None:
    step = FakeStep()
    spec, layout, device = step.spec, step.layout, step.device
    assert cache_blocks(spec, layout, device, tokens=9) == 3
    assert cache_blocks(spec, layout, device) == 8 * 32
    assert cache_blocks(spec, layout, device, fraction=1e-6) < 8 * 32
    for wrong in ({"tokens": 0}, {"tokens": 10**15}, {"fraction": 0.0}, {"fraction": 1.5}, BOTH):
        with pytest.raises(UserError):
            cache_blocks(spec, layout, device, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_tensors_are_zero_and_take_no_memory_before_use(dtype: str) -> None:
    spec = replace(FakeStep().spec, dtype=dtype)
    for ours, plain in zip(
        allocate_cache(spec, 7, torch.device("cpu")), spec.allocate(7), strict=True
    ):
        assert torch.equal(ours, plain)
        assert ours.dtype == plain.dtype
        assert ours.stride() == plain.stride()
        ours[3] = 1
        assert int(ours.sum()) == plain[3].numel()
    before = free_memory(torch.device("cpu"))
    caches = allocate_cache(spec, 2**20, torch.device("cpu"))
    assert sum(c.nbytes for c in caches) > 2**28
    assert before - free_memory(torch.device("cpu")) < 2**27
