"""Choices sorted on the device, against torch's stable sort and a count."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from smelt.runtime.kernels.gpu import routing
from smelt.runtime.kernels.gpu.routing import FEW_CHOICES, most_blocks, sort_by_expert


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors of whole numbers hold what no list may: a place that is not written shows."""
    made = torch.Tensor.new_empty

    def filled(*args: object, **named: object) -> torch.Tensor:
        return made(*args, **named).fill_(-77)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


def check(index: torch.Tensor, experts: int, block_m: int, rows: int) -> None:
    flat = index.flatten()
    order, blocks = sort_by_expert(index, experts, block_m, rows)
    expected = torch.sort(flat, stable=True)
    assert order.tolist() == expected.indices.tolist()

    want, first = [], 0
    for expert, count in enumerate(torch.bincount(flat, minlength=experts).tolist()):
        for done in range(0, count, block_m):
            want.append((expert, first + done, min(block_m, count - done)))
        first += count
    assert len(blocks) == most_blocks(len(flat), experts, block_m) >= len(want)
    assert [tuple(row) for row in blocks[: len(want)].tolist()] == want
    assert not blocks[len(want) :, 2].any()


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 90),
    st.integers(1, 8),
    st.integers(1, 40),
    st.sampled_from([16, 32, 128]),
    st.booleans(),
    st.sampled_from([1.0, 0.3, 0.0]),
    st.integers(0, 2**31),
)
@example(90, 8, 40, 16, False, 1.0, 0)
@example(1, 1, 1, 16, True, 1.0, 0)
@example(90, 8, 40, 16, False, 0.0, 0)
def test_sorted(
    tokens: int, top_k: int, experts: int, block_m: int, bounded: bool, spread: float, seed: int
) -> None:
    """spread: 0 sends every choice to one expert, so that one token names it top_k times."""
    source = torch.Generator().manual_seed(seed)
    index = torch.randint(experts, (tokens, top_k), generator=source)
    index = (index * spread).long() if spread else torch.full_like(index, experts - 1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        poison(monkeypatch)
        check(index, experts, block_m, tokens if bounded else 0)


def test_both_ways_agree_at_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound decides which kernels run: exactly FEW_CHOICES is sorted by one."""
    launched: list[str] = []
    run = routing.launch
    monkeypatch.setattr(
        *(routing, "launch"),
        lambda kernel, *args, **named: (
            launched.append(kernel.__name__),
            run(kernel, *args, **named),
        ),
    )
    index = torch.randint(8, (FEW_CHOICES // 8, 8))
    check(index, 8, 16, len(index))
    assert launched == ["_sort_few"]
    check(index, 8, 16, len(index) + 1)
    assert launched == ["_sort_few", "_count", "_place"]


def test_transposed_choices() -> None:
    """Choices that do not lie end to end in memory."""
    check(torch.randint(5, (3, 70)).T, 5, 16, 0)


@pytest.mark.parametrize("choices", range(20))
@pytest.mark.parametrize("experts", [1, 3, 8])
def test_most_blocks_is_reached_and_never_passed(choices: int, experts: int) -> None:
    """The worst split of so many choices over experts, found by trying all block counts."""

    def worst(left: int, experts: int) -> int:
        if experts == 1:
            return -(-left // 4)
        return max(
            -(-n // 4) + worst(left - n, experts - 1) for n in {0, 1, left, left % 4} if n <= left
        )

    assert most_blocks(choices, experts, 4) == worst(choices, experts)
