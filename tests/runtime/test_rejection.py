"""Rejection sampling gives the target's distribution whatever the draft proposes (chi-square)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from helpers.fake_step import one_thread  # noqa: F401  (autouse fixture)
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.runtime.filters import draw
from smelt.runtime.rejection import accept_chain, residual
from smelt.runtime.sampler import ACCEPT, DRAFT, DRAW, Row, SamplerState, distributions
from smelt.runtime.sampling_params import SamplingParams

RUNS = 6000
LIMIT = 1e-4  # below this the difference is not chance; the seeds are fixed, so no test is flaky

P = [0.4, 0.3, 0.15, 0.1, 0.05]
PAIRS = {
    "equal": P,
    "reversed": P[::-1],
    "far": [0.01, 0.01, 0.01, 0.02, 0.95],
    "flat": [0.2] * 5,
    "narrow": [0.0, 0.0, 0.5, 0.5, 0.0],
    "one-hot": [0.0, 1.0, 0.0, 0.0, 0.0],
}


def chance(counts: Counter[int], p: list[float], runs: int) -> float:
    """Probability of counts at least as far from p, by Pearson's chi-square."""
    possible = [i for i, value in enumerate(p) if value > 0]
    if any(i not in possible for i in counts):
        return 0.0
    statistic = sum((counts[i] - runs * p[i]) ** 2 / (runs * p[i]) for i in possible)
    half = torch.tensor([(len(possible) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def row(values: list[float]) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def first_tokens(p: list[float], q: list[float], rest: Callable[..., torch.Tensor]) -> Counter[int]:
    """Counts of the first token of chains of one draft; `rest` is drawn from after a rejection."""
    rng = random.Random(0)
    p_rows, q_rows = row(p).expand(2, -1), row(q)
    counts: Counter[int] = Counter()
    for _ in range(RUNS):
        token = draw(q_rows, [rng.random()])[0]
        uniforms = [(rng.random(), rng.random()) for _ in range(2)]
        accepted, following = accept_chain(p_rows, q_rows, [token], uniforms)
        if not accepted and rest is not residual:
            following = draw(rest(p_rows[:1], q_rows), [uniforms[0][1]])[0]
        counts[token if accepted else following] += 1
    return counts


@pytest.mark.parametrize("name", PAIRS)
def test_the_first_token_follows_the_target(name: str) -> None:
    assert chance(first_tokens(P, PAIRS[name], residual), P, RUNS) > LIMIT


def test_a_request_s_own_numbers_and_filters_follow_the_target() -> None:
    """The engine's way: three streams of one seed, and distributions after the filters."""
    make = torch.Generator().manual_seed(5)
    logits, other = torch.randn(2, 12, generator=make, dtype=torch.float64) * 2
    target = SamplingParams(temperature=0.8, top_k=7)
    p = distributions(logits[None].float(), [Row(SamplerState(target), [])])
    q = distributions(other[None].float(), [Row(SamplerState(SamplingParams(temperature=1.5)), [])])
    counts: Counter[int] = Counter()
    for seed in range(RUNS):
        state = SamplerState(SamplingParams(temperature=0.8, top_k=7, seed=seed))
        token = draw(q, [state.peek(0, DRAFT)])[0]
        uniforms = [(state.peek(i, ACCEPT), state.peek(i, DRAW)) for i in range(2)]
        accepted, following = accept_chain(p.expand(2, -1), q, [token], uniforms)
        counts[token if accepted else following] += 1
    assert chance(counts, p[0].tolist(), RUNS) > LIMIT


def test_disjoint_supports_always_reject_and_follow_the_target() -> None:
    p, q = [0.7, 0.3, 0.0, 0.0], [0.0, 0.0, 0.6, 0.4]
    counts = first_tokens(p, q, residual)
    assert chance(counts, p, RUNS) > LIMIT
    assert accept_chain(row(p).expand(2, -1), row(q), [2], [(0.0, 0.5)] * 2) == (0, 0)


@pytest.mark.parametrize("name", ["reversed", "far", "flat"])
def test_drawing_from_the_target_after_a_rejection_would_be_noticed(name: str) -> None:
    wrong = first_tokens(P, PAIRS[name], lambda p, q: p)
    assert chance(wrong, P, RUNS) < LIMIT


def test_pairs_follow_the_target() -> None:
    """A two-token model: the second distribution depends on the first token, as does the draft's.

    Chains of two drafts; where a chain ends after its first token, the second is drawn from p.
    """
    make = torch.Generator().manual_seed(3)
    start_p, start_q = torch.rand(2, 3, generator=make, dtype=torch.float64).softmax(-1) ** 2
    start_p, start_q = start_p / start_p.sum(), start_q / start_q.sum()
    next_p = (torch.randn(3, 3, generator=make, dtype=torch.float64) * 2).softmax(-1)
    next_q = (torch.randn(3, 3, generator=make, dtype=torch.float64) * 2).softmax(-1)
    rng = random.Random(1)
    counts: Counter[int] = Counter()
    lengths: Counter[int] = Counter()
    for _ in range(RUNS):
        first = draw(start_q[None], [rng.random()])[0]
        second = draw(next_q[first][None], [rng.random()])[0]
        p_rows = torch.stack([start_p, next_p[first], next_p[second]])
        q_rows = torch.stack([start_q, next_q[first]])
        uniforms = [(rng.random(), rng.random()) for _ in range(3)]
        accepted, following = accept_chain(p_rows, q_rows, [first, second], uniforms)
        tokens = [*[first, second][:accepted], following]
        if len(tokens) == 1:
            tokens.append(draw(next_p[tokens[0]][None], [rng.random()])[0])
        counts[3 * tokens[0] + tokens[1]] += 1
        lengths[accepted] += 1
    expected = (start_p[:, None] * next_p).flatten().tolist()
    assert chance(counts, expected, RUNS) > LIMIT
    assert all(lengths[n] > RUNS / 50 for n in range(3))  # every way through was taken


def test_a_chain_of_equal_distributions_is_accepted_whole() -> None:
    rows = row(P).expand(4, -1)
    assert accept_chain(rows, rows[:3], [4, 0, 2], [(1 - 2**-53, 0.0)] * 4) == (3, 0)


def test_a_chain_stops_at_the_first_rejection() -> None:
    p_rows = torch.eye(3, dtype=torch.float64)[[0, 1, 2]]
    q_rows = torch.eye(3, dtype=torch.float64)[[0, 2]]
    assert accept_chain(p_rows, q_rows, [0, 2], [(0.0, 0.5)] * 3) == (1, 1)


def test_without_drafts_the_token_comes_from_the_target() -> None:
    assert accept_chain(row([0.0, 1.0, 0.0]), torch.empty(0, 3), [], [(0.9, 0.9)]) == (0, 1)


def test_rows_of_nan_accept_nothing_and_give_nothing() -> None:
    p_rows = torch.full((2, 5), float("nan"))
    assert accept_chain(p_rows, row(P), [0], [(0.0, 0.5)] * 2) == (0, None)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="1 drafts need 2 rows of p"):
        accept_chain(row(P), row(P), [0], [(0.0, 0.5)] * 2)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9), st.sampled_from([0.1, 1.0, 10.0]))
def test_accepting_and_residual_add_up_to_the_target(seed: int, size: int, width: float) -> None:
    make = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(2, size, generator=make, dtype=torch.float64) * width).softmax(-1)
    accepted = torch.minimum(p, q)
    total = accepted + (1 - accepted.sum()) * residual(p, q)
    torch.testing.assert_close(total, p, atol=1e-12, rtol=0)


def test_the_residual_of_equal_rows_is_the_target() -> None:
    p = row(P)
    torch.testing.assert_close(residual(p, p.clone()), p)
    both = torch.cat([p, p])
    found = residual(both, torch.cat([p, row(P[::-1])]))
    torch.testing.assert_close(found[0], p[0])
    torch.testing.assert_close(found.sum(-1), torch.ones(2, dtype=torch.float64))
