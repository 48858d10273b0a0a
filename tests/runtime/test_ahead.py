"""Running ahead changes no token and no reason to end, whatever comes and goes meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.fake_artifact import EOS, VOCAB, write_tokenizer
from helpers.fake_step import FakeModel, FakeStep, one_thread  # noqa: F401  (autouse fixture)
from helpers.traffic import Key, Plan, drive, settled, tidy
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.runtime.batch import Batch
from smelt.runtime.engine import Engine
from smelt.runtime.length_scaling import LengthScaling
from smelt.runtime.sampling_params import SamplingParams
from smelt.runtime.sequence import Chunk
from smelt.runtime.speculation.ngram import NgramDrafter
from smelt.runtime.structured import Structured
from smelt.runtime.tokenizer import Tokenizer


def counting(engine: Engine) -> Callable[[], int]:
    """How many steps were launched early, from now on."""
    assert engine._ahead is not None
    launched: list[object] = []
    after = engine._ahead.after

    def counted(chunks: list[Chunk]) -> Callable[[torch.Tensor], None] | None:
        launch = after(chunks)
        launched.extend([launch] if launch is not None else [])
        return launch

    engine._ahead.after = counted  # type: ignore[method-assign]
    return lambda: len(launched)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    windows=st.sampled_from([(0,), (0, 7), (5, 5)]),
    block_size=st.sampled_from([1, 3, 4]),
    max_sequences=st.sampled_from([1, 3, 8]),
    blocks=st.sampled_from(["few", "some", "many"]),
    prefix_cache=st.booleans(),
    policy=st.sampled_from(["fcfs", "priority", "mlfq"]),
    deterministic=st.booleans(),
)
def test_tokens_and_reasons_are_the_same(
    seed: int,
    windows: tuple[int, ...],
    block_size: int,
    max_sequences: int,
    blocks: str,
    prefix_cache: bool,
    policy: str,
    deterministic: bool,
) -> None:
    plan = Plan(seed)
    needed = -(-45 // block_size)  # the longest prompt and answer
    count = {"few": needed, "some": 2 * needed + 1, "many": 12 * needed}[blocks]
    results, scores = [], []
    for ahead in (False, True):
        step = FakeStep(
            windows=windows,
            block_size=block_size,
            max_tokens=32,
            max_sequences=max_sequences,
            max_rows=32,
        )
        engine = Engine(
            step,
            blocks=count,
            eos_token_ids=range(0, 97, 9),
            prefix_cache=prefix_cache,
            policy=policy,
            deterministic=deterministic,
            run_ahead=ahead,
        )
        said: dict[Key, Any] = {}
        results.append(drive(engine, plan, said))
        scores.append(
            {key: value for key, value in said.items() if plan.requests[key[0]][3] is None}
        )
        tidy(engine)
    assert settled(results[1], plan) == settled(results[0], plan)
    assert scores[0].keys() == scores[1].keys()
    for key, said in scores[0].items():
        assert [entry.token for entry in said] == [entry.token for entry in scores[1][key]]
    for key, (tokens, reason) in results[1].items():  # an aborted answer is a part of the whole one
        other, why = results[0][key]
        shorter = min(len(tokens), len(other))
        assert tokens[:shorter] == other[:shorter]
        assert reason and why


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_plain_decoding_runs_ahead_all_the_time(prefix_cache: bool) -> None:
    step = FakeStep()
    engine = Engine(step, blocks=100, run_ahead=True, prefix_cache=prefix_cache)
    early = counting(engine)
    ids = [engine.add_request([i, 1, 2], SamplingParams(max_tokens=9)) for i in range(3)]
    tokens: dict[int, list[int]] = {i: [] for i in ids}
    steps = 0
    while engine.has_work:
        launched = len(step.batches)
        outputs = engine.step()
        steps += 1
        # What a step reports comes from the launch before; it launches the next one.
        assert len(step.batches) - launched == (2 if steps == 1 else 1 if steps < 9 else 0)
        for output in outputs:
            tokens[output.id] += output.token_ids
    assert steps == 9 and early() == 8
    assert [tokens[i] for i in ids] == [step.greedy([i, 1, 2], 9) for i in range(3)]
    tidy(engine)


def test_the_next_step_is_launched_before_tokens_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from smelt.runtime import selection, transfer

    step = FakeStep()
    order: list[str] = []
    run = step.run

    def running(batch: Batch, caches: list[torch.Tensor]) -> torch.Tensor:
        order.append("run")
        return run(batch, caches)

    def reading(values: torch.Tensor, meanwhile: Callable[[], None] | None = None) -> list[Any]:
        found = transfer.read(values, meanwhile)
        order.append("read")
        return found

    step.run = running  # type: ignore[method-assign]
    monkeypatch.setattr(selection, "read", reading)
    engine = Engine(step, blocks=100, run_ahead=True)
    engine.add_request([1, 2, 3], SamplingParams(max_tokens=4, temperature=1.0, seed=3))
    while engine.has_work:
        engine.step()
    assert order == ["run", "run", "read", "run", "read", "run", "read", "read"]


def test_who_ends_leaves_its_row_behind_and_the_others_go_on() -> None:
    step = FakeStep()
    prompts = [[3, 1, 4], [2, 7], [6]]
    answers = [step.greedy(prompt, 10) for prompt in prompts]
    place = next(i for i in range(2, 9) if answers[0][i] not in answers[0][:i])
    engine = Engine(step, blocks=100, run_ahead=True)
    ends = SamplingParams(max_tokens=10, stop_token_ids=[answers[0][place]])
    ids = [
        engine.add_request(p, ends if i == 0 else SamplingParams(max_tokens=10))
        for i, p in enumerate(prompts)
    ]
    before = len(step.batches)
    tokens: dict[int, list[int]] = {i: [] for i in ids}
    while engine.has_work:
        for output in engine.step():
            tokens[output.id] += output.token_ids
        engine.check_integrity()
    assert tokens[ids[0]] == answers[0][: place + 1]
    assert [tokens[i] for i in ids[1:]] == answers[1:]
    # One launch a token: the step that was under way when the first one ended was not wasted.
    assert len(step.batches) - before == 10
    tidy(engine)


def test_what_was_written_for_an_ended_answer_harms_nobody() -> None:
    """Its last blocks go to the prefix cache or to others; both read what they should."""
    step = FakeStep(windows=(0,), block_size=4)
    wrote: list[set[int]] = []
    run = step.run

    def watching(batch: Batch, caches: list[torch.Tensor]) -> torch.Tensor:
        wrote.append(set(batch.slot_mapping[0].tolist()))
        return run(batch, caches)

    step.run = watching  # type: ignore[method-assign]
    prompt = [5, 9, 2]
    answer = step.greedy(prompt, 12)
    engine = Engine(step, blocks=7, run_ahead=True)
    stop = SamplingParams(max_tokens=12, stop_token_ids=[answer[5]])
    first = answer.index(answer[5])
    number = engine.add_request(prompt, stop)
    tokens = []
    while engine.has_work:
        for output in engine.step():
            tokens += output.token_ids
    assert tokens == answer[: first + 1]
    kept = {b for node in engine.scheduler.cache.blocks() for b in node}
    late = {slot // 4 for slot in wrote[-1]}
    assert late <= kept or not late & kept
    # The same conversation goes on from the kept blocks, and strangers take the free ones.
    longer = prompt + answer[: first + 1] + [7]
    ids = [engine.add_request(longer, SamplingParams(max_tokens=4))]
    ids.append(engine.add_request([8, 8, 1], SamplingParams(max_tokens=4)))
    found: dict[int, list[int]] = {i: [] for i in ids}
    while engine.has_work:
        for output in engine.step():
            found[output.id] += output.token_ids
    assert number not in found and engine.metrics.reused_tokens > 0
    assert found[ids[0]] == step.greedy(longer, 4)
    assert found[ids[1]] == step.greedy([8, 8, 1], 4)
    tidy(engine)


def first_launch(engine: Engine, prompts: list[list[int]], **params: Any) -> bool:
    """Whether the step that finishes these prompts launches the next one."""
    early = counting(engine)
    for prompt in prompts:
        engine.add_request(prompt, SamplingParams(**{"max_tokens": 5, **params}))
    engine.step()
    return early() > 0


def test_when_it_runs_ahead() -> None:
    def engine(**options: Any) -> Engine:
        return Engine(FakeStep(max_sequences=3), **{"blocks": 50, "run_ahead": True, **options})

    prompts = [[1, 2], [3], [4, 5, 6]]
    assert first_launch(engine(), prompts)
    assert first_launch(engine(), prompts, temperature=1.0)
    assert first_launch(engine(), prompts, repetition_penalty=1.2)
    assert first_launch(engine(), prompts, prompt_logprobs=1)
    assert not first_launch(engine(), prompts, max_tokens=1)
    assert not first_launch(engine(), prompts, logprobs=0)
    assert not first_launch(engine(), prompts, n=2, temperature=1.0)
    assert not first_launch(engine(), [list(range(20)), [1]])  # a prompt of two chunks
    assert first_launch(engine(), [*prompts, [7]])  # one waits, and there is no lane for it
    assert not first_launch(engine(policy="mlfq"), [*prompts, [7]])
    assert not first_launch(engine(blocks=6), [list(range(12)), [1, 2], list(range(8))])
    assert engine(run_ahead=False)._ahead is None
    assert engine(run_ahead=None)._ahead is None  # on the CPU
    assert engine(drafter=NgramDrafter())._ahead is None
    scaled = Engine(FakeStep(rope=LengthScaling("longrope", 32)), blocks=50, run_ahead=True)
    assert not first_launch(scaled, prompts)


def test_idle_blocks_of_the_prefix_cache_make_room() -> None:
    step = FakeStep(windows=(0,), block_size=2)
    engine = Engine(step, blocks=8, run_ahead=True)
    for prompt in ([1] * 7, [2] * 7):
        engine.add_request(prompt, SamplingParams(max_tokens=6))
        while engine.has_work:
            engine.step()
            engine.check_integrity()
    assert engine.metrics.evictions > 0 and engine.metrics.preemptions == 0
    early = counting(engine)
    engine.add_request([3] * 9, SamplingParams(max_tokens=7))
    while engine.has_work:
        engine.step()
    assert early() == 6
    tidy(engine)


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_failing_launch_ends_its_requests_as_a_step_does(at: int) -> None:
    class Failing(FakeStep):
        def run(self, batch: Batch, caches: list[torch.Tensor]) -> torch.Tensor:
            logits = super().run(batch, caches)
            if len(self.batches) == at:
                raise RuntimeError("kernel failed")
            return logits

    results = []
    for ahead in (False, True):
        engine = Engine(Failing(max_sequences=2), blocks=64, run_ahead=ahead)
        ids = [engine.add_request([i, 2], SamplingParams(max_tokens=4)) for i in range(3)]
        found: dict[int, Any] = {i: ([], None) for i in ids}
        while engine.has_work:
            for output in engine.step():
                found[output.id] = (found[output.id][0] + output.token_ids, output.finish_reason)
                assert (output.finish_reason == "error") == (output.error is not None)
            engine.check_integrity()
        results.append(found)
        tidy(engine)
    assert results[0] == results[1]
    assert [reason for _, reason in results[0].values()] == ["error", "error", "length"]


def test_nan_logits_end_that_request_alone() -> None:
    class NotANumber(FakeStep):
        def run(self, batch: Batch, caches: list[torch.Tensor]) -> torch.Tensor:
            logits = super().run(batch, caches)
            assert int(batch.input_ids.min()) >= 0
            if len(self.batches) == 2:
                logits[0] = float("nan")
            return logits

    step = NotANumber()
    engine = Engine(step, blocks=64, run_ahead=True)
    ids = [engine.add_request([i, 2], SamplingParams(max_tokens=5)) for i in range(2)]
    reasons, tokens = {}, []
    while engine.has_work:
        for output in engine.step():
            reasons[output.id] = output.finish_reason
            tokens += output.token_ids if output.id == ids[1] else []
    assert reasons == {ids[0]: "error", ids[1]: "length"}
    assert tokens == step.greedy([1, 2], 5)
    tidy(engine)


def test_structures_and_stop_strings_end_where_they_should(tmp_path: Any) -> None:
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    engines: list[Engine] = []
    found = []
    for ahead in (False, True):
        engine = Engine(
            FakeStep(FakeModel(VOCAB), max_tokens=64, max_rows=64),
            blocks=100,
            tokenizer=tokenizer,
            eos_token_ids=[EOS],
            run_ahead=ahead,
        )
        engines.append(engine)
        # Starting the process that compiles grammars takes the longest: once is enough.
        engine.requests._compiler = engines[0].requests._compiler
        ids = [
            engine.add_request([1, 2, 3], each)
            for each in (
                SamplingParams(max_tokens=40, structured=Structured(regex="(ab|cd){3}[0-9]{2}")),
                SamplingParams(max_tokens=30, temperature=1.0, seed=1, stop=["e", "x"]),
                SamplingParams(max_tokens=12),
            )
        ]
        texts = {i: ["", "", 0] for i in ids}
        while engine.has_work:
            for output in engine.step():
                entry = texts[output.id]
                entry[0] += output.text
                entry[1] = output.finish_reason
                entry[2] += len(output.token_ids)
        found.append([texts[i] for i in ids])
    engines[0].close()
    assert found[0] == found[1]
    assert found[0][0][1] == "stop"


def test_a_deadline_ends_an_answer_under_way() -> None:
    step = FakeStep()
    engine = Engine(step, blocks=64, run_ahead=True)
    now = [0.0]
    engine.scheduler.clock = lambda: now[0]
    late = engine.add_request([1, 2], SamplingParams(max_tokens=50), timeout_s=2.5)
    other = engine.add_request([1, 3], SamplingParams(max_tokens=8))
    tokens: dict[int, list[int]] = {late: [], other: []}
    reasons = {}
    while engine.has_work:
        for output in engine.step():
            tokens[output.id] += output.token_ids
            reasons[output.id] = output.finish_reason
        now[0] += 1.0
    assert reasons == {late: "timeout", other: "length"}
    assert tokens[late] == step.greedy([1, 2], 3)
    assert tokens[other] == step.greedy([1, 3], 8)
    tidy(engine)
