"""Filters equal transformers' logits processors; tokens depend on nothing but seed and logits."""

from __future__ import annotations

import random

import pytest
import torch
from helpers.fake_step import one_thread  # noqa: F401  (autouse fixture)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from smelt.runtime.sampler import SamplerState, constrain, draw, probabilities, sample
from smelt.runtime.sampling_params import SamplingParams

VOCAB = 211


def reference(logits: torch.Tensor, params: SamplingParams, history: list[int]) -> torch.Tensor:
    """[V]: the distribution transformers would draw from."""
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    processors.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    return processors(torch.tensor([history]), logits[None].clone())[0].softmax(-1)


PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0.1, 3.0),
    top_k=st.sampled_from([0, 1, 2, 7, 50, VOCAB, VOCAB + 9]),
    top_p=st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.1, 0.001]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(PARAMS, min_size=1, max_size=6), st.integers(0, 10**6))
def test_distributions_equal_transformers(params: list[SamplingParams], seed: int) -> None:
    make = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(params), VOCAB, generator=make) * 3
    histories = torch.randint(0, VOCAB, (len(params), 12), generator=make).tolist()
    states = [SamplerState(p, 12) for p in params]
    ours = probabilities(constrain(logits, states, histories), params)
    for row, p in enumerate(params):
        expected = reference(logits[row], p, histories[row])
        torch.testing.assert_close(ours[row], expected, atol=1e-5, rtol=1e-4)


def test_greedy_is_the_exact_argmax() -> None:
    logits = torch.randn(5, VOCAB)
    states = [SamplerState(SamplingParams()) for _ in range(5)]
    assert sample(logits, states, [[]] * 5) == logits.argmax(-1).tolist()
    assert sample(logits.bfloat16(), states, [[]] * 5) == logits.bfloat16().argmax(-1).tolist()


def test_greedy_with_penalty_equals_transformers() -> None:
    logits = torch.randn(3, VOCAB) * 2
    histories = [[int(i) for i in row.topk(5).indices] for row in logits]
    params = SamplingParams(repetition_penalty=1.5)
    got = sample(logits, [SamplerState(params) for _ in range(3)], histories)
    processor = RepetitionPenaltyLogitsProcessor(1.5)
    expected = processor(torch.tensor(histories), logits.clone()).argmax(-1).tolist()
    assert got == expected


def test_penalty_follows_a_growing_history() -> None:
    state = SamplerState(SamplingParams(repetition_penalty=2.0))
    history = [1, 2]
    for token in (5, 9, 5):
        logits = torch.randn(1, 20)
        ours = constrain(logits, [state], [history])
        expected = RepetitionPenaltyLogitsProcessor(2.0)(torch.tensor([history]), logits.clone())
        torch.testing.assert_close(ours, expected)
        history.append(token)


def test_min_tokens_equal_transformers() -> None:
    params = SamplingParams(min_tokens=3)
    state = SamplerState(params, prompt_length=4, ends=[7, 11])
    processor = MinNewTokensLengthLogitsProcessor(4, 3, [7, 11])
    for length in range(4, 9):
        logits = torch.zeros(1, 20)
        logits[0, 7] = 5
        history = list(range(length))
        expected = processor(torch.tensor([history]), logits.clone()).argmax(-1).tolist()
        assert sample(logits, [state], [history]) == expected


@pytest.mark.parametrize("others", [0, 1, 6])
def test_same_seed_same_tokens_in_any_batch(others: int) -> None:
    mine = SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=3)
    other = [
        SamplingParams(),
        SamplingParams(temperature=2.0, min_p=0.1),
        SamplingParams(temperature=1.0, repetition_penalty=1.2, top_p=0.3),
    ]
    make = torch.Generator().manual_seed(0)
    steps = [torch.randn(1, VOCAB, generator=make) * 2 for _ in range(20)]
    alone = SamplerState(mine)
    expected = [sample(logits, [alone], [[1]])[0] for logits in steps]
    states = [SamplerState(other[i % 3]) for i in range(others)]
    place = others // 2
    states.insert(place, SamplerState(mine))
    got = []
    for logits in steps:
        rows = torch.randn(len(states), VOCAB)
        rows[place] = logits[0]
        got.append(sample(rows, states, [[1]] * len(states))[place])
    assert got == expected
    assert len(set(got)) > 3


def test_draw_follows_the_distribution() -> None:
    probs = torch.tensor([[0.5, 0.0, 0.3, 0.0, 0.2, 0.0]])
    rng = random.Random(0)
    counts = [0] * 6
    for _ in range(4000):
        counts[draw(probs, [rng.random()])[0]] += 1
    assert counts[1] == counts[3] == counts[5] == 0
    for count, p in ((counts[0], 0.5), (counts[2], 0.3), (counts[4], 0.2)):
        assert abs(count / 4000 - p) < 0.03


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_draw_never_takes_an_impossible_token(uniform: float) -> None:
    probs = torch.zeros(1, 1000)
    probs[0, 1:-1] = torch.rand(998)
    assert 1 <= draw(probs, [uniform])[0] <= 998


def test_rows_of_nan_are_reported_and_others_are_not() -> None:
    logits = torch.randn(3, VOCAB)
    logits[1, 5] = float("nan")
    for params in (
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=1.0, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.1),
    ):
        picked = sample(logits, [SamplerState(params) for _ in range(3)], [[1]] * 3)
        assert picked[1] is None
        assert picked[0] is not None
        assert picked[2] is not None


def test_nothing_allowed_is_reported() -> None:
    logits = torch.full((1, 10), float("-inf"))
    assert sample(logits, [SamplerState(SamplingParams(temperature=1.0))], [[1]]) == [None]
