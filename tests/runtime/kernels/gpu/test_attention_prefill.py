"""Paged attention of packed ragged chunks, few and many tokens mixed, against float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from .paged import REAL_LAYERS, ROUNDING, Case, PagedStep

FORMATS = ("auto", "fp8", "int8", "int4")
DTYPES = tuple(ROUNDING)
MIXED = ((0, 35), (40, 1), (0, 0), (30, 17))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Sequences on both sides of the 16 tokens that part the kernels, of layers of every kind."""
    sequences = st.tuples(st.integers(0, 50), st.sampled_from([0, 1, 1, 17, 18, 40]))
    kv_heads = draw(st.sampled_from([1, 2]))
    return Case(
        sequences=tuple(draw(st.lists(sequences, min_size=1, max_size=3))),
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
        padding=draw(st.sampled_from([0, 1, 40])),
        strided=draw(st.booleans()),
        max_query=draw(st.sampled_from([0, 64])),
        seed=draw(st.integers(0, 9)),
    )


@settings(max_examples=12, deadline=None)
@example(case=Case(((9, 40), (33, 2)), tree=True, window=11))
@example(case=Case(((9, 40),), tree=True, window=100, sinks=True, format="int4", padding=33))
@example(case=Case(((0, 40), (60, 2)), heads=2, kv_heads=1, size=16))
@given(case=cases())
def test_against_float32(case: Case) -> None:
    PagedStep(case).check()


@pytest.mark.parametrize("format", FORMATS)
def test_every_format(format: str) -> None:
    for dtype in DTYPES:
        case = Case(MIXED, heads=2, kv_heads=1, size=40, format=format, dtype=dtype, padding=2)
        PagedStep(case).check()
    PagedStep(replace(case, window=19, softcap=5.0, sinks=True)).check()


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
def test_layers_of_real_models(format: str) -> None:
    mixed = ((0, 700), (2000, 1), (300, 17), (1000, 513), (90, 4))
    for heads, kv_heads, size, block_size in REAL_LAYERS:
        case = Case(mixed, heads, kv_heads, size, block_size, format, torch.bfloat16, padding=99)
        PagedStep(case).check()
        PagedStep(replace(case, window=256, softcap=50.0, sinks=True, tree=True)).check()
