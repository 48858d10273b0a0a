"""The knapsack: within the budget, at least as good as anything uniform, near the optimum."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.passes.quantize.budget import Choice, choose

CHOICES = st.tuples(st.integers(1, 50), st.floats(0, 10)).map(lambda pair: Choice(*pair))
LAYERS = st.lists(st.lists(CHOICES, min_size=1, max_size=4), min_size=1, max_size=4)


def totals(layers: list[list[Choice]], indices: tuple[int, ...] | list[int]) -> tuple[float, float]:
    chosen = [choices[i] for choices, i in zip(layers, indices, strict=True)]
    return sum(c.size for c in chosen), sum(c.cost for c in chosen)


@given(LAYERS, st.floats(0, 1))
@settings(deadline=None, max_examples=200)
def test_a_choice_fits_and_is_bounded_by_the_optimum(
    layers: list[list[Choice]], share: float
) -> None:
    smallest = sum(min(c.size for c in choices) for choices in layers)
    largest = sum(max(c.size for c in choices) for choices in layers)
    budget = smallest + share * (largest - smallest)
    size, cost = totals(layers, choose(layers, budget))
    assert size <= budget
    every = [totals(layers, found) for found in product(*(range(len(c)) for c in layers))]
    best = min(c for s, c in every if s <= budget)
    worst = sum(max(c.cost for c in choices) for choices in layers)
    assert best - 1e-9 <= cost <= worst + 1e-9
    for i in range(min(len(choices) for choices in layers)):
        uniform = totals(layers, [i] * len(layers))
        assert uniform[0] > budget or cost <= uniform[1] + 1e-9
    if share == 1:
        assert cost == pytest.approx(sum(min(c.cost for c in choices) for choices in layers))


def test_bits_go_where_they_save_most() -> None:
    layer = [Choice(2, 8.0), Choice(3, 4.0), Choice(4, 1.0)]
    calm = [Choice(size, cost / 10) for size, cost in layer]
    assert choose([layer, calm], 6) == [2, 0]
    assert choose([layer, calm], 7) == [2, 1]
    assert choose([layer, calm], 100) == [2, 2]


def test_a_choice_that_is_larger_and_no_better_is_never_taken() -> None:
    assert choose([[Choice(2, 1.0), Choice(3, 1.5), Choice(4, 0.5)]], 3) == [0]


def test_a_budget_below_the_smallest_says_so() -> None:
    with pytest.raises(ValueError, match=r"smallest choices take 4, the budget is 3"):
        choose([[Choice(2, 1.0)], [Choice(2, 1.0), Choice(3, 0.0)]], 3)
