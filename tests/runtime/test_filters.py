"""Filters equal transformers' warpers, and drawing follows the distribution."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from helpers.fake_step import FakeStep, one_thread  # noqa: F401  (an autouse fixture)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from smelt.runtime import filters
from smelt.runtime.engine import Engine
from smelt.runtime.filters import draw, probabilities
from smelt.runtime.sampling_params import SamplingParams

VOCAB = 211


def reference(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """[V]: the distribution transformers would draw from."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(params.temperature))])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    if params.typical_p < 1:
        warpers.append(TypicalLogitsWarper(params.typical_p))
    return warpers(torch.tensor([[0]]), logits[None].clone())[0].softmax(-1)


PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0.1, 3.0),
    top_k=st.sampled_from([0, 1, 2, 7, 50, VOCAB, VOCAB + 9]),
    top_p=st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.1, 0.001]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    typical_p=st.sampled_from([1.0, 1.0, 0.95, 0.5, 0.01]),
)
ALONE = [
    {"temperature": 0.3},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"typical_p": 0.6},
]


@settings(max_examples=80, deadline=None)
@given(st.lists(PARAMS, min_size=1, max_size=6), st.integers(0, 10**6))
def test_distributions_equal_transformers(params: list[SamplingParams], seed: int) -> None:
    logits = torch.randn(len(params), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    ours = probabilities(logits, params)
    for row, p in enumerate(params):
        torch.testing.assert_close(ours[row], reference(logits[row], p), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fields", ALONE, ids=lambda f: next(iter(f)))
def test_each_filter_alone_equals_transformers_and_does_something(fields: dict[str, float]) -> None:
    params = replace(SamplingParams(temperature=1.0), **fields)
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    ours = probabilities(logits, [params, SamplingParams(temperature=1.0), params])
    for row in (0, 2):
        torch.testing.assert_close(ours[row], reference(logits[row], params))
        assert (ours[row] - logits[row].softmax(-1)).abs().sum() > 0.01
    torch.testing.assert_close(ours[1], logits[1].softmax(-1))


@settings(max_examples=60, deadline=None)
@given(PARAMS, st.lists(PARAMS, max_size=5), st.integers(0, 10**6))
def test_a_row_does_not_depend_on_the_others(
    mine: SamplingParams, others: list[SamplingParams], seed: int
) -> None:
    logits = torch.randn(len(others) + 1, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    place = seed % (len(others) + 1)
    params = [*others[:place], mine, *others[place:]]
    together = probabilities(logits, params)[place]
    alone = probabilities(logits[place : place + 1], [mine])[0]
    assert torch.equal(together, alone)


def test_tokens_tied_with_the_last_one_are_kept() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    for fields in ({"top_k": 2}, {"top_p": 0.5}):
        probs = probabilities(logits, [SamplingParams(temperature=1.0, **fields)])
        assert (probs > 0).tolist() == [[True, True, True, True, False]]


def test_the_batched_nucleus_equals_that_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices other than the CPU sort whole rows at once."""
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(2)) * 3
    top_p = [1.0, 0.99, 0.9, 0.5, 0.1, 0.001]
    expected = filters._top_p(logits, top_p)
    sorted_rows = filters._sorted_floors(logits.softmax(-1), top_p)
    probs = logits.softmax(-1)
    got = logits.masked_fill(probs < sorted_rows, filters.NO_VALUE)
    assert torch.equal(got, expected)


def test_masked_tokens_stay_out_of_every_filter() -> None:
    logits = torch.randn(len(ALONE), VOCAB, generator=torch.Generator().manual_seed(4))
    logits[:, 100:] = filters.NO_VALUE
    params = [replace(SamplingParams(temperature=1.0), **fields) for fields in ALONE]
    probs = probabilities(logits, params)
    assert (probs[:, 100:] == 0).all()
    torch.testing.assert_close(probs.sum(-1), torch.ones(len(ALONE)))


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


def test_an_engine_compiles_its_filter_before_requests_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes = []

    def kernel(scores: torch.Tensor, top_k: list[int], top_p: list[float]) -> torch.Tensor:
        shapes.append(tuple(scores.shape))
        return scores

    monkeypatch.setattr(filters, "_kernel", lambda *of: kernel)
    step = FakeStep()
    Engine(step, blocks=8)
    assert shapes == [(1, step.vocab_size)]
