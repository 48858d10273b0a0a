"""Which format each layer gets under a budget: the multiple-choice knapsack.

Every layer takes one of its choices; the sum of their costs is to be least while the sum of their
sizes stays within a budget. On the lower convex hull of a layer's choices every step to a larger
one saves less a byte than the step before, so taking the best step anywhere, as long as it fits, is
optimal up to the last step (Sinha and Zoltners 1979).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Choice(NamedTuple):
    """size and cost of one choice, in any units."""

    size: float
    cost: float


def choose(layers: Sequence[Sequence[Choice]], budget: float) -> list[int]:
    """The index of each layer's choice. Raises ValueError when not even the smallest ones fit.

    Never worse than any choice of one index for all layers that fits the budget.
    """
    hulls = [_hull(choices) for choices in layers]
    taken = [hull[0] for hull in hulls]
    left = budget - sum(c[i].size for c, i in zip(layers, taken, strict=True))
    if left < 0:
        raise ValueError(f"the smallest choices take {budget - left:g}, the budget is {budget:g}")
    steps = []
    for layer, (choices, hull) in enumerate(zip(layers, hulls, strict=True)):
        for before, after in pairwise(hull):
            grown = choices[after].size - choices[before].size
            steps.append(((choices[before].cost - choices[after].cost) / grown, layer, after))
    stopped = set()
    for _, layer, after in sorted(steps, key=lambda step: (-step[0], step[1])):
        grown = layers[layer][after].size - layers[layer][taken[layer]].size
        if layer in stopped or grown > left:
            stopped.add(layer)
            continue
        left -= grown
        taken[layer] = after
    return min([taken, *_uniform(layers, budget)], key=lambda found: _total(layers, found).cost)


def _hull(choices: Sequence[Choice]) -> list[int]:
    """Indices on the lower convex hull, from the smallest to the one of least cost."""
    hull: list[int] = []
    for i in sorted(range(len(choices)), key=lambda i: choices[i]):
        if hull and choices[i].cost >= choices[hull[-1]].cost:
            continue
        while len(hull) > 1 and _above(choices[hull[-2]], choices[hull[-1]], choices[i]):
            hull.pop()
        hull.append(i)
    return hull


def _above(a: Choice, b: Choice, c: Choice) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (a.cost - b.cost) * (c.size - a.size) <= (a.cost - c.cost) * (b.size - a.size)


def _uniform(layers: Sequence[Sequence[Choice]], budget: float) -> list[list[int]]:
    """One index for all layers, where every layer has it and it fits."""
    count = min((len(choices) for choices in layers), default=0)
    found = [[i] * len(layers) for i in range(count)]
    return [indices for indices in found if _total(layers, indices).size <= budget]


def _total(layers: Sequence[Sequence[Choice]], indices: Sequence[int]) -> Choice:
    chosen = [choices[i] for choices, i in zip(layers, indices, strict=True)]
    return Choice(sum(c.size for c in chosen), sum(c.cost for c in chosen))
