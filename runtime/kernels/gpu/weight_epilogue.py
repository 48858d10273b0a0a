"""What follows the sum over K in the linears of linear_int4.py and linear_int8.py.

    bias -> act(gate) * up, or residual -> one rounding

in float32. Where the output has too few features to keep the memory busy, K is split among several
programs, which leave their sums in a workspace; `add_parts` adds them in order and does the rest.
No sum depends on the order of programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rounding import narrow, wide
from .tiles import activate


@triton.jit
def tile_of(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(first row, first output) of this program: GROUP_M row tiles share weights in the cache."""
    tile = tl.program_id(0)
    down = tl.cdiv(M, BLOCK_M)
    across = tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * across)
    height = tl.minimum(down - group * GROUP_M, GROUP_M)
    inside = tile - group * GROUP_M * across
    return (group * GROUP_M + inside % height) * BLOCK_M, inside // height * BLOCK_N


@triton.jit
def steps_of(K, STEP: tl.constexpr, SPLIT: tl.constexpr):
    """(first, one past the last) of this program's steps of STEP features along K."""
    steps = tl.cdiv(K, STEP)
    share = tl.cdiv(steps, SPLIT)
    first = tl.minimum(tl.program_id(1) * share, steps)
    return first, tl.minimum(first + share, steps)


@triton.jit
def finish(
    y, up, rows, columns, M, N, bias, residual, out,
    GATE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, DTYPE: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """y and, with a gate, up float32 [R, C] -> out [M, N] at `rows` and `columns`."""
    inside = columns < N
    keep = (rows < M)[:, None] & inside[None, :]
    at = rows.to(tl.int64)[:, None] * N + columns[None, :]
    if HAS_BIAS:
        y += wide(tl.load(bias + columns, mask=inside, other=0.0), WIDEN)[None, :]
    if GATE != "":
        if HAS_BIAS:
            up += wide(tl.load(bias + N + columns, mask=inside, other=0.0), WIDEN)[None, :]
        y = activate(y, GATE) * up
    if HAS_RESIDUAL:
        y += wide(tl.load(residual + at, mask=keep, other=0.0), WIDEN)
    tl.store(out + at, narrow(y, DTYPE, WIDEN), mask=keep)


@triton.jit
def deliver(
    y, up, rows, columns, M, N, bias, residual, out,
    SPLIT: tl.constexpr, GATE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    DTYPE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """`finish`, or where K is split: the sums -> out float32 [SPLIT, M, N or 2N]."""
    if SPLIT == 1:
        finish(
            y, up, rows, columns, M, N, bias, residual, out,
            GATE, HAS_BIAS, HAS_RESIDUAL, DTYPE, WIDEN,
        )  # fmt: skip
    else:
        WIDTH = N * 2 if GATE != "" else N
        part = tl.program_id(1).to(tl.int64) * M
        at = (part + rows)[:, None] * WIDTH + columns[None, :]
        keep = (rows < M)[:, None] & (columns < N)[None, :]
        tl.store(out + at, y, mask=keep)
        if GATE != "":
            tl.store(out + N + at, up, mask=keep)


@triton.jit
def add_parts(
    parts, bias, residual, out, M, N,
    SPLIT: tl.constexpr, GATE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    DTYPE: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parts float32 [SPLIT, M, N or 2N] -> out [M, N]."""
    WIDTH = N * 2 if GATE != "" else N
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = (rows < M)[:, None] & (columns < N)[None, :]
    at = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    y = tl.zeros((ROWS, BLOCK), tl.float32)
    up = y
    for part in tl.static_range(SPLIT):
        here = parts + at + tl.cast(part, tl.int64) * M * WIDTH
        y += tl.load(here, mask=keep, other=0.0)
        if GATE != "":
            up += tl.load(here + N, mask=keep, other=0.0)
    finish(
        y, up, rows, columns, M, N, bias, residual, out,
        GATE, HAS_BIAS, HAS_RESIDUAL, DTYPE, WIDEN,
    )  # fmt: skip
