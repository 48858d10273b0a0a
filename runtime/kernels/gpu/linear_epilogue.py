"""What follows the sum over K in the quantized linears.

    scales -> bias -> act(gate) * up, or residual -> one rounding -> int8 or e4m3 if wanted

all in float32. Where a step has few rows and the output few features, there are too few programs to
keep the memory busy: then K is split among several, which leave their sums in a workspace, and
`sum_splits` adds them in order and does the rest. No sum depends on the order of programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .e4m3 import to_e4m3
from .quantize import row_scale, to_int8
from .rounding import narrow, wide
from .tiles import activate


@triton.jit
def scaled(
    total,
    x_scale,
    scales,
    rows,
    columns,
    M,
    WIDTH,
    X_SCALED: tl.constexpr,
    W_SCALED: tl.constexpr,
):
    """total [R, C], int32 or float32 -> float32, times x_scale[rows] and scales[columns]."""
    total = total.to(tl.float32)
    if W_SCALED:
        factor = tl.load(scales + columns, mask=columns < WIDTH, other=0.0)[None, :]
        if X_SCALED:
            factor = tl.load(x_scale + rows, mask=rows < M, other=0.0)[:, None] * factor
        # Rounded here: the compiler would make one operation of this product and a bias after it.
        return tl.fma(total, factor, 0.0)
    elif X_SCALED:
        return total * tl.load(x_scale + rows, mask=rows < M, other=0.0)[:, None]
    else:
        return total


@triton.jit
def finish(
    y,
    up,
    rows,
    first,
    M,
    N,
    bias,
    residual,
    out,
    out_scale,
    output_scale,
    GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    FORMAT: tl.constexpr,
    OUT_GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDEN: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """y (and with a gate up) float32 [R, C], scaled -> out [M, N] at `rows` and columns first...

    OUT_GROUP: the tile is that many features wide and gets a scale of its own for every row, at
    out_scale [M, ceil(N/OUT_GROUP)]; 0: output_scale[0] is the scale.
    """
    columns = first + tl.arange(0, y.shape[1])
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
    rounded = narrow(y, DTYPE, WIDEN)
    if FORMAT == "same":
        tl.store(out + at, rounded, mask=keep)
    else:
        y = tl.where(keep, wide(rounded, WIDEN), 0.0)
        if FORMAT == "int8":
            tl.store(out + at, to_int8(y, tl.load(output_scale)), mask=keep)
        elif OUT_GROUP == 0:
            y = tl.where(tl.abs(y) < float("inf"), y, float("nan"))
            codes = to_e4m3(tl.math.div_rn(y, tl.load(output_scale)), NATIVE)
            tl.store(out + at, codes, mask=keep)
        else:
            scale = row_scale(y, output_scale, 448.0, False)
            codes = to_e4m3(tl.math.div_rn(y, scale[:, None]), NATIVE)
            tl.store(out + at, codes, mask=keep)
            place = rows * tl.cdiv(N, OUT_GROUP) + first // OUT_GROUP
            tl.store(out_scale + place, scale, mask=rows < M)


@triton.jit
def deliver_part(
    total,
    up_total,
    rows,
    first,
    M,
    N,
    x_scale,
    scales,
    bias,
    residual,
    out,
    out_scale,
    output_scale,
    X_SCALED: tl.constexpr,
    W_SCALED: tl.constexpr,
    SPLIT: tl.constexpr,
    GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    FORMAT: tl.constexpr,
    OUT_GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDEN: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """`deliver` without halves."""
    columns = first + tl.arange(0, total.shape[1])
    WIDTH = N * 2 if GATE != "" else N
    if SPLIT > 1:
        part = tl.program_id(1).to(tl.int64) * M
        at = (part + rows)[:, None] * WIDTH + columns[None, :]
        keep = (rows < M)[:, None] & (columns < N)[None, :]
        tl.store(out + at, total, mask=keep)
        if GATE != "":
            tl.store(out + N + at, up_total, mask=keep)
    else:
        y = scaled(total, x_scale, scales, rows, columns, M, WIDTH, X_SCALED, W_SCALED)
        up = y
        if GATE != "":
            up = scaled(up_total, x_scale, scales, rows, N + columns, M, WIDTH, X_SCALED, W_SCALED)
        finish(
            y, up, rows, first, M, N, bias, residual, out, out_scale, output_scale,
            GATE, HAS_BIAS, HAS_RESIDUAL, FORMAT, OUT_GROUP, DTYPE, WIDEN, NATIVE,
        )  # fmt: skip


@triton.jit
def deliver(
    total,
    up_total,
    rows,
    first,
    M,
    N,
    x_scale,
    scales,
    bias,
    residual,
    out,
    out_scale,
    output_scale,
    X_SCALED: tl.constexpr,
    W_SCALED: tl.constexpr,
    SPLIT: tl.constexpr,
    GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    FORMAT: tl.constexpr,
    OUT_GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDEN: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """A tile's sums [R, C] of `rows` and outputs first.. -> out: finished, or a part of them."""
    C: tl.constexpr = total.shape[1]
    if C > 128 and OUT_GROUP == 0:
        # Half at a time: what is read beside the sums would not fit in the registers.
        low, high = _halves(total)
        up_low, up_high = low, high
        if GATE != "":
            up_low, up_high = _halves(up_total)
        deliver_part(
            low, up_low, rows, first, M, N,
            x_scale, scales, bias, residual, out, out_scale, output_scale, X_SCALED, W_SCALED,
            SPLIT, GATE, HAS_BIAS, HAS_RESIDUAL, FORMAT, OUT_GROUP, DTYPE, WIDEN, NATIVE,
        )  # fmt: skip
        deliver_part(
            high, up_high, rows, first + C // 2, M, N,
            x_scale, scales, bias, residual, out, out_scale, output_scale, X_SCALED, W_SCALED,
            SPLIT, GATE, HAS_BIAS, HAS_RESIDUAL, FORMAT, OUT_GROUP, DTYPE, WIDEN, NATIVE,
        )  # fmt: skip
    else:
        deliver_part(
            total, up_total, rows, first, M, N,
            x_scale, scales, bias, residual, out, out_scale, output_scale, X_SCALED, W_SCALED,
            SPLIT, GATE, HAS_BIAS, HAS_RESIDUAL, FORMAT, OUT_GROUP, DTYPE, WIDEN, NATIVE,
        )  # fmt: skip


@triton.jit
def _halves(x):
    """x [R, C] -> its left and right halves."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _summed(
    parts,
    x_scale,
    scales,
    rows,
    first,
    offset,
    M,
    N,
    X_SCALED: tl.constexpr,
    W_SCALED: tl.constexpr,
    SPLIT: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The scaled sums of `rows` and outputs first.., of the weight's rows from `offset` on."""
    columns = first + tl.arange(0, BLOCK)
    WIDTH = N * 2 if GATE != "" else N
    keep = (rows < M)[:, None] & (columns < N)[None, :]
    far = rows.to(tl.int64)
    total = tl.load(parts + far[:, None] * WIDTH + offset + columns[None, :], mask=keep, other=0)
    for part in tl.static_range(1, SPLIT):
        at = (far + part * M)[:, None] * WIDTH + offset + columns[None, :]
        total += tl.load(parts + at, mask=keep, other=0)
    return scaled(total, x_scale, scales, rows, offset + columns, M, WIDTH, X_SCALED, W_SCALED)


@triton.jit
def sum_splits(
    parts,
    x_scale,
    scales,
    bias,
    residual,
    out,
    out_scale,
    output_scale,
    M,
    N,
    X_SCALED: tl.constexpr,
    W_SCALED: tl.constexpr,
    SPLIT: tl.constexpr,
    GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    FORMAT: tl.constexpr,
    OUT_GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDEN: tl.constexpr,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * BLOCK
    y = _summed(
        parts, x_scale, scales, rows, first, 0, M, N, X_SCALED, W_SCALED, SPLIT, GATE, BLOCK
    )
    up = y
    if GATE != "":
        up = _summed(
            parts, x_scale, scales, rows, first, N, M, N, X_SCALED, W_SCALED, SPLIT, GATE, BLOCK
        )
    finish(
        y, up, rows, first, M, N, bias, residual, out, out_scale, output_scale,
        GATE, HAS_BIAS, HAS_RESIDUAL, FORMAT, OUT_GROUP, DTYPE, WIDEN, NATIVE,
    )  # fmt: skip
