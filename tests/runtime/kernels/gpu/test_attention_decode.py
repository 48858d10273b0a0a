"""Paged attention of sequences with few tokens, against attention in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from smelt.runtime.kernels.gpu import attention as kernels
from smelt.runtime.kernels.gpu.attention_shapes import Shape, pieces, unsupported
from smelt.runtime.kernels.gpu.launch import INTERPRETED
from smelt.runtime.kernels.gpu.tuning import Config
from smelt.runtime.ops.cache_format import quantize_rows, row_bytes

from .paged import REAL_LAYERS, ROUNDING, Case, PagedStep

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
        case = Case(
            FEW, heads=2, kv_heads=1, size=40, format=format, dtype=dtype, padding=2, max_query=3
        )
        PagedStep(case).check()
    PagedStep(replace(case, window=37, softcap=5.0, sinks=True)).check()


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
def test_layers_of_real_models(format: str) -> None:
    long = ((2999, 1), (700, 1), (0, 1), (5000, 4), (129, 16))
    for heads, kv_heads, size, block_size in REAL_LAYERS:
        case = Case(long, heads, kv_heads, size, block_size, format, torch.bfloat16, padding=3)
        PagedStep(replace(case, max_query=16)).check()
        PagedStep(replace(case, window=1024, softcap=50.0, sinks=True, tree=True)).check()


interpreted = pytest.mark.skipif(not INTERPRETED, reason="by the interpreter's tile sizes")


@contextmanager
def launches() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """Names and arguments of the kernels launched meanwhile."""
    seen: list[tuple[str, tuple[Any, ...]]] = []
    launch = kernels.launch

    def spy(kernel: Any, grid: Any, *args: Any, **named: Any) -> None:
        launch(kernel, grid, *args, **named)
        seen.append((kernel.fn.__name__, args))

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(kernels, "launch", spy)
        yield seen


@pytest.mark.parametrize("tree", [False, True])
def test_a_bound_says_which_kernels_run(tree: bool) -> None:
    """And the decode kernel gives the same bits beside the other as alone."""
    case = Case(FEW, heads=2, kv_heads=1, size=16, padding=2, tree=tree)
    names, outputs = {}, {}
    for bound in (3, 16, 17, 64, 65, 0):
        with launches() as seen:
            outputs[bound] = PagedStep(replace(case, max_query=bound)).kernels()
        names[bound] = [name for name, _ in seen]
    few = ["attend_pieces", "combine_pieces"]
    assert names[3] == names[16] == few
    assert names[17] == names[64] == [*few, "attend_rows"]
    assert names[65] == names[0] == [*few, *["attend_rows"] * (2 if tree else 1)]
    assert all(torch.equal(outputs[3], out) for out in outputs.values())


@interpreted
def test_short_sequences_leave_pieces_empty() -> None:
    """How many pieces a sequence has follows from its own length: 32 keys each, here."""
    lengths = (20, 33, 95, 150)
    case = Case(tuple((n - 1, 1) for n in lengths), heads=1, kv_heads=1, size=16, max_query=1)
    with launches() as seen:
        PagedStep(case).check()
    parts, logs = seen[0][1][8:10]
    assert parts.shape == (4, 1, 6, 16) and logs.shape == (4, 1, 6)
    for row, want in enumerate((0, 2, 3, 5)):
        assert logs[row, 0, :want].isfinite().all() and logs[row, 0, want:].isnan().all()
        assert parts[row, 0, :want].isfinite().all() and parts[row, 0, want:].isnan().all()


@interpreted
def test_a_window_needs_few_pieces() -> None:
    """The pieces of a long sequence are those of its window."""
    case = Case(((400, 1),), heads=1, kv_heads=1, size=16, window=40, max_query=1)
    with launches() as seen:
        PagedStep(case).check()
    logs = seen[0][1][9]
    assert logs.shape[2] == 2 and logs.isfinite().all()


@pytest.mark.parametrize("bound", [1, 0])
def test_nothing_to_attend(bound: int) -> None:
    """No sequence, no token of any, no row at all."""
    for sequences, padding in (((), 3), (((5, 0), (0, 0)), 3), (((5, 0),), 0)):
        out = PagedStep(Case(sequences, size=16, padding=padding, max_query=bound)).check()
        assert len(out) == padding


def test_more_sequences_than_are_looked_at_at_once() -> None:
    lengths = [(i % 2, 0 if i % 9 == 4 else 1) for i in range(131)]
    case = Case(tuple(lengths), heads=1, kv_heads=1, size=16, padding=2, max_query=1)
    PagedStep(case).check()


def test_number_of_pieces() -> None:
    config = Config({"PIECE": 128, "PROGRAMS": 3})
    assert pieces(8, 8192, 0, 132, config) == 396 // 8
    assert pieces(8, 1000, 0, 132, config) == 8  # none below 128 keys
    assert pieces(8, 100_000, 100, 132, config) == 1  # a window, with a step's tokens
    assert pieces(512, 8192, 0, 132, config) == 1
    assert pieces(512, 100_000, 0, 132, config) == 13  # none above 8192
    assert pieces(0, 8192, 0, 132, config) == 64 and pieces(8, 0, 0, 132, config) == 1


@pytest.mark.parametrize("format", FORMATS)
def test_nan_in_a_key_reaches_who_sees_it(format: str) -> None:
    """Of row 0 it lies ahead."""
    step = PagedStep(Case(((40, 2),), size=16, format=format, max_query=2))
    block, slot = int(step.table[0, 41 // 16]), 41 % 16
    nan = torch.full((16,), float("nan"))
    step.poisoned[block, 0, slot, 1] = nan if format == "auto" else quantize_rows(nan, format)
    out = step.kernels()
    assert out[0].isfinite().all() and out[1, :2].isfinite().all()
    assert out[1, 2:].isnan().all()


def test_it_refuses_what_it_cannot_serve() -> None:
    step = PagedStep(Case(((3, 1),), size=16, max_query=1))

    def call(cache: torch.Tensor, format: str = "auto", kv_heads: int = 2) -> None:
        kernels.paged_attention_triton(
            *(step.q, cache, step.starts, step.lengths, step.table, 1.0, 0, 0.0),
            *(None, None, format, kv_heads, 1),
        )

    with pytest.raises(ValueError, match="kv_heads says 4"):
        call(step.cache, kv_heads=4)
    with pytest.raises(ValueError, match="not contiguous"):
        call(step.cache.transpose(0, 1).contiguous().transpose(0, 1))
    with pytest.raises(ValueError, match="hold 16, those of int8 20"):
        call(step.cache.to(torch.uint8), "int8")
    with pytest.raises(ValueError, match="no multiple of 3 kv heads"):
        call(torch.zeros(2, 2, 16, 3, 16), kv_heads=3)
    assert unsupported(Shape(32, 8, 128, 16, "int4")) is None
    assert "at most 256" in str(unsupported(Shape(8, 8, 288, 16)))
    assert "divisible by 8" in str(unsupported(Shape(8, 8, 92, 16, "int4")))
    assert "power of two" in str(unsupported(Shape(8, 8, 64, 24)))
    assert "unknown cache format" in str(unsupported(Shape(8, 8, 64, 16, "int2")))


def test_it_exports_with_any_number_of_everything() -> None:
    step = PagedStep(Case(FEW, size=16, tree=True, max_query=3))

    class Layer(torch.nn.Module):
        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            *tensors, tree = inputs
            return kernels.paged_attention_triton(
                *(*tensors, 0.25, 0, 0.0, None, tree, "auto", 2, 0)
            )

    tokens, blocks, sequences, wide, width = map(torch.export.Dim, "TNBMW")
    inputs = (step.q, step.cache, step.starts, step.lengths, step.table, step.tree)
    shapes = (
        *({0: tokens}, {0: blocks}, {0: sequences + 1}, {0: sequences}),
        *({0: sequences, 1: wide}, {0: tokens, 1: width}),
    )
    program = torch.export.export(Layer(), inputs, dynamic_shapes=(shapes,), strict=False)
    (node,) = [n for n in program.graph.nodes if n.op == "call_function"]
    assert node.target is torch.ops.smelt.paged_attention_triton.default
    assert node.meta["val"].shape[1:] == (4, 16)


def test_cost() -> None:
    """One token of Llama's sees 1000 keys and values of 8 heads; a prompt of 100, half of 100."""
    shape = Shape(32, 8, 128, 16)
    one = kernels.cost([999], [1], shape)
    assert one.bytes == 2 * 1000 * 8 * 256 + 2 * 32 * 256
    assert one.operations == 4 * 1000 * 32 * 128
    assert kernels.cost([0], [100], shape).operations == 4 * 5050 * 32 * 128
    assert kernels.cost([999], [1], shape, window=100).bytes == 2 * 100 * 8 * 256 + 2 * 32 * 256
    quantized = kernels.cost([999], [1], replace(shape, format="int8"), pieces=2)
    between = 2 * 4 * 32 * 2 * 129
    assert quantized.bytes == 2 * 1000 * 8 * row_bytes(128, "int8", torch.half) + 16384 + between


def test_candidates_and_variants() -> None:
    for found in (80, 86, 90, 100, 120):
        made = list(kernels.variants(found))
        assert len({v.name for v in made}) == len(made) < 20
        for v in made:
            known = {*v.signature, *v.constants, *v.config.constants}
            assert known == {*v.kernel.arg_names}, v.name
        for kernel in (kernels.DECODE, kernels.PREFILL):
            for shape in ("16bit/128", "int4/256", "fp8/64"):
                tried = kernels.candidates(shape, found, kernel)
                assert 4 <= len(tried) <= 10 and len({str(c) for c in tried}) == len(tried)
