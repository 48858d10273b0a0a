"""Paged attention of sequences with few tokens, against attention in float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from .paged import ROUNDING, Case, PagedStep

FORMATS = ("auto", "fp8", "int8", "int4")
DTYPES = tuple(ROUNDING)
FEW = ((40, 1), (0, 3), (0, 0), (95, 2))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Sequences of at most 16 tokens, some without any, of layers of every kind."""
    sequences = st.tuples(st.integers(0, 70), st.sampled_from([0, 1, 1, 1, 2, 5]))
    kv_heads = draw(st.sampled_from([1, 2]))
    steps = draw(st.lists(sequences, min_size=1, max_size=3))
    return Case(
        sequences=tuple(steps),
        heads=kv_heads * draw(st.sampled_from([1, 2, 3])),
        kv_heads=kv_heads,
        size=draw(st.sampled_from([16, 24, 32])),
        block_size=draw(st.sampled_from([8, 16, 64])),
        format=draw(st.sampled_from(FORMATS)),
        dtype=draw(st.sampled_from(DTYPES)),
        window=draw(st.sampled_from([0, 0, 3, 20, 33])),
        softcap=draw(st.sampled_from([0.0, 0.0, 4.0])),
        sinks=draw(st.booleans()),
        tree=draw(st.booleans()),
        padding=draw(st.sampled_from([0, 1, 3])),
        strided=draw(st.booleans()),
        max_query=max(1, *(new for _, new in steps)),
        seed=draw(st.integers(0, 9)),
    )


@settings(max_examples=15, deadline=None)
@example(case=Case(((33, 16), (1, 5)), heads=2, tree=True, window=3, max_query=16))
@example(case=Case(((60, 9),), tree=True, window=20, sinks=True, format="int4", max_query=16))
@example(case=Case(((40, 1), (3, 2)), heads=24, kv_heads=3, size=64, max_query=2))
@given(case=cases())
def test_against_float32(case: Case) -> None:
    PagedStep(case).check()


@pytest.mark.parametrize("format", FORMATS)
def test_every_format(format: str) -> None:
    """Long enough for many pieces, a window that frees blocks, a softcap, sinks and padding."""
    for dtype in DTYPES:
        case = Case(FEW, heads=2, kv_heads=1, size=40, format=format, dtype=dtype, padding=2, max_query=3)
        PagedStep(case).check()
    PagedStep(replace(case, window=37, softcap=5.0, sinks=True)).check()
