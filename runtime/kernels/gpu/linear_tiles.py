"""The loops over K of the quantized linears.

KIND "int8"     int8 times int8, summed in int32;
KIND "e4m3"     e4m3 times e4m3, on tensor cores where NATIVE, else widened in registers;
KIND "weight"   16-bit activations times e4m3 weights widened in registers.

BLOCK: features along K that share a scale of the weight, and with X_GROUPS of the activations too;
a sum over at most that many is multiplied by the scales before it is added to the others. 0: the
scales come after the whole sum.

Hopper's tensor cores add fp8 products with about 14 bits (DeepSeek-V3, arXiv:2412.19437, 3.3.2), so
with PROMOTE a sum over BLOCK_K features, 128 there, is added to float32 registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .e4m3 import from_e4m3
from .linear_epilogue import deliver
from .rounding import wide


@triton.jit
def tile_of(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row tile, column tile) of this program: GROUP_M row tiles share weights in the L2 cache."""
    tile = tl.program_id(0)
    down = tl.cdiv(M, BLOCK_M)
    across = tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * across)
    first = group * GROUP_M
    height = tl.minimum(down - first, GROUP_M)
    inside = tile - group * GROUP_M * across
    return first + inside % height, inside // height


@triton.jit
def steps_of(K, TILE_K: tl.constexpr, SPLIT: tl.constexpr):
    """(first, one past the last) tile along K of this program."""
    steps = tl.cdiv(K, TILE_K)
    share = tl.cdiv(steps, SPLIT)
    first = tl.program_id(1) * share
    return first, tl.minimum(first + share, steps)


@triton.jit
def load_where(at, inside, ALL: tl.constexpr):
    """A tile, zero where not `inside`; ALL: nothing is outside."""
    if ALL:
        return tl.load(at)
    else:
        return tl.load(at, mask=inside, other=0.0)


@triton.jit
def operand(x, OPERAND: tl.constexpr, NATIVE: tl.constexpr):
    """e4m3, as codes or where NATIVE as itself, or a wider float -> OPERAND."""
    if x.dtype == tl.uint8 or x.dtype == tl.float8e4nv:
        return from_e4m3(x, OPERAND, NATIVE)
    elif OPERAND == "fp32":
        return wide(x, True)
    else:
        return x


@triton.jit
def add_product(
    total,
    x,
    w,
    scale,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    OPERAND: tl.constexpr,
    PROMOTE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """total [.., M, N] plus x [.., M, K] times w [.., K, N], with BLOCK times scale.

    OPERAND: what operands are widened to, "bf16", "fp16" or "fp32". PROMOTE: of e4m3, add in
    float32.
    """
    if KIND == "int8":
        return tl.dot(x, w, total, out_dtype=tl.int32)
    else:
        if KIND == "e4m3" and NATIVE and (PROMOTE or BLOCK):
            # Not folded into the running sum, which would keep that in the tensor core's precision.
            part = tl.dot(x, w, out_dtype=tl.float32, max_num_imprecise_acc=x.shape[-1])
        elif KIND == "e4m3" and NATIVE:
            part = tl.dot(x, w, out_dtype=tl.float32)
        else:
            x = operand(x, OPERAND, NATIVE)
            w = operand(w, OPERAND, NATIVE)
            part = tl.dot(x, w, out_dtype=tl.float32, input_precision="ieee")
        return total + part * scale if BLOCK else total + part


@triton.jit
def block_scales(scales, first, rows, at, G, BLOCK: tl.constexpr, UNIFORM: tl.constexpr):
    """Scales of the weight's `rows` from `first` on, at feature `at` of K: [R], or [1] for all."""
    if BLOCK == 0:
        return tl.full((1,), 1.0, tl.float32)
    elif UNIFORM:
        return tl.load(scales + first // BLOCK * G + at // BLOCK + tl.arange(0, 1))
    else:
        return tl.load(scales + rows // BLOCK * G + at // BLOCK)


@triton.jit
def linear_few(
    x,
    x_scale,
    qweight,
    scales,
    bias,
    residual,
    out,
    out_scale,
    output_scale,
    M,
    N,
    K,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    X_GROUPS: tl.constexpr,
    OPERAND: tl.constexpr,
    PROMOTE: tl.constexpr,
    X_SCALED: tl.constexpr,
    W_SCALED: tl.constexpr,
    GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    FORMAT: tl.constexpr,
    OUT_GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDEN: tl.constexpr,
    NATIVE: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Few rows: a tile along K is PARTS pieces of BLOCK_K, one for each warp, as a batch of
    products whose sums are added at the end. No warp reads what another one does."""
    row_tile = tl.program_id(0) % tl.cdiv(M, BLOCK_M)
    column_tile = tl.program_id(0) // tl.cdiv(M, BLOCK_M)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    first = column_tile * BLOCK_N
    # Columns beyond N read the last one, and are not stored.
    w_rows = tl.minimum(first + tl.arange(0, BLOCK_N), N - 1)
    TILE_K: tl.constexpr = PARTS * BLOCK_K
    pieces = tl.arange(0, PARTS)[:, None] * BLOCK_K
    k = pieces + tl.arange(0, BLOCK_K)[None, :]
    begin, end = steps_of(K, TILE_K, SPLIT)
    x_base = x + row_tile.to(tl.int64) * BLOCK_M * K + begin * TILE_K
    w_base = qweight + first.to(tl.int64) * K + begin * TILE_K
    u_base = w_base + tl.cast(N, tl.int64) * K
    x_at = tl.arange(0, BLOCK_M)[None, :, None] * K + k[:, None, :]
    w_at = (w_rows - first)[None, None, :] * K + k[:, :, None]
    valid = (rows < M)[None, :, None]
    G = tl.cdiv(K, BLOCK) if BLOCK else 1
    total = tl.zeros((PARTS, BLOCK_M, BLOCK_N), tl.int32 if KIND == "int8" else tl.float32)
    up_total = total
    for step in range(begin, end):
        inside = k < K - step * TILE_K
        a = load_where(x_base + x_at, valid if EVEN_K else valid & inside[:, None, :], False)
        w = load_where(w_base + w_at, inside[:, :, None], EVEN_K)
        factor = 1.0
        scale = 1.0
        if BLOCK:
            # [PARTS, 1]; pieces beyond K are zero, whatever their scale.
            at = tl.minimum((step * TILE_K + pieces) // BLOCK, G - 1)
            if X_GROUPS:
                at_x = rows[None, :] * G + at
                factor = tl.load(x_scale + at_x, mask=(rows < M)[None, :], other=0.0)[:, :, None]
            scale = factor * tl.load(scales + w_rows[None, :] // BLOCK * G + at)[:, None, :]
        total = add_product(total, a, w, scale, KIND, BLOCK, OPERAND, PROMOTE, NATIVE)
        if GATE != "":
            w = load_where(u_base + w_at, inside[:, :, None], EVEN_K)
            if BLOCK:
                u_rows = (N + w_rows)[None, :]
                scale = factor * tl.load(scales + u_rows // BLOCK * G + at)[:, None, :]
            up_total = add_product(up_total, a, w, scale, KIND, BLOCK, OPERAND, PROMOTE, NATIVE)
            u_base += TILE_K
        x_base += TILE_K
        w_base += TILE_K
    total = tl.sum(total, 0)
    up_total = tl.sum(up_total, 0) if GATE != "" else total
    deliver(
        total, up_total, rows, first, M, N,
        x_scale, scales, bias, residual, out, out_scale, output_scale, X_SCALED, W_SCALED,
        SPLIT, GATE, HAS_BIAS, HAS_RESIDUAL, FORMAT, OUT_GROUP, DTYPE, WIDEN, NATIVE,
    )  # fmt: skip


@triton.jit
def linear_tiles(
    x,
    x_scale,
    qweight,
    scales,
    bias,
    residual,
    out,
    out_scale,
    output_scale,
    M,
    N,
    K,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    X_GROUPS: tl.constexpr,
    OPERAND: tl.constexpr,
    PROMOTE: tl.constexpr,
    X_SCALED: tl.constexpr,
    W_SCALED: tl.constexpr,
    GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    FORMAT: tl.constexpr,
    OUT_GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDEN: tl.constexpr,
    NATIVE: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    UNIFORM: tl.constexpr,
):
    """Any number of rows: tiles [BLOCK_M, BLOCK_N], both operands in shared memory.

    UNIFORM: a tile's columns lie in one block of weight scales.
    """
    row_tile, column_tile = tile_of(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    first = column_tile * BLOCK_N
    # Columns beyond N read the last one, and are not stored.
    w_rows = tl.minimum(first + tl.arange(0, BLOCK_N), N - 1)
    k = tl.arange(0, BLOCK_K)
    begin, end = steps_of(K, BLOCK_K, SPLIT)
    # 32-bit offsets inside a tile, and scalars that move along K, take the fewest registers.
    x_base = x + row_tile.to(tl.int64) * BLOCK_M * K + begin * BLOCK_K
    w_base = qweight + first.to(tl.int64) * K + begin * BLOCK_K
    u_base = w_base + tl.cast(N, tl.int64) * K
    x_at = tl.arange(0, BLOCK_M)[:, None] * K + k[None, :]
    w_at = (w_rows - first)[None, :] * K + k[:, None]
    valid = (rows < M)[:, None]
    G = tl.cdiv(K, BLOCK) if BLOCK else 1
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if KIND == "int8" else tl.float32)
    up_total = total
    for step in range(begin, end):
        inside = k < K - step * BLOCK_K
        a = load_where(x_base + x_at, valid if EVEN_K else valid & inside[None, :], False)
        w = load_where(w_base + w_at, inside[:, None], EVEN_K)
        at = step * BLOCK_K
        factor = 1.0
        if X_GROUPS:
            at_x = rows * G + at // BLOCK
            factor = tl.load(x_scale + at_x, mask=rows < M, other=0.0)[:, None]
        scale = block_scales(scales, first, w_rows, at, G, BLOCK, UNIFORM)[None, :] * factor
        total = add_product(total, a, w, scale, KIND, BLOCK, OPERAND, PROMOTE, NATIVE)
        if GATE != "":
            w = load_where(u_base + w_at, inside[:, None], EVEN_K)
            scale = block_scales(scales, N + first, N + w_rows, at, G, BLOCK, UNIFORM)
            scale = scale[None, :] * factor
            up_total = add_product(up_total, a, w, scale, KIND, BLOCK, OPERAND, PROMOTE, NATIVE)
            u_base += BLOCK_K
        x_base += BLOCK_K
        w_base += BLOCK_K
    deliver(
        total, up_total, rows, first, M, N,
        x_scale, scales, bias, residual, out, out_scale, output_scale, X_SCALED, W_SCALED,
        SPLIT, GATE, HAS_BIAS, HAS_RESIDUAL, FORMAT, OUT_GROUP, DTYPE, WIDEN, NATIVE,
    )  # fmt: skip


@triton.jit
def linear_transposed(
    x,
    x_scale,
    qweight,
    scales,
    bias,
    residual,
    out,
    out_scale,
    output_scale,
    M,
    N,
    K,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    X_GROUPS: tl.constexpr,
    OPERAND: tl.constexpr,
    PROMOTE: tl.constexpr,
    X_SCALED: tl.constexpr,
    W_SCALED: tl.constexpr,
    GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    FORMAT: tl.constexpr,
    OUT_GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDEN: tl.constexpr,
    NATIVE: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    UNIFORM: tl.constexpr,
):
    """Any number of rows for KIND "weight": weights, widened in registers, times activations.

    Hopper's tensor cores take the left operand from registers and the right one from shared memory
    alone: this way round widened weights need not go back there.
    """
    row_tile, column_tile = tile_of(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    first = column_tile * BLOCK_N
    w_rows = tl.minimum(first + tl.arange(0, BLOCK_N), N - 1)
    k = tl.arange(0, BLOCK_K)
    begin, end = steps_of(K, BLOCK_K, SPLIT)
    x_base = x + row_tile.to(tl.int64) * BLOCK_M * K + begin * BLOCK_K
    w_base = qweight + first.to(tl.int64) * K + begin * BLOCK_K
    u_base = w_base + tl.cast(N, tl.int64) * K
    x_at = tl.arange(0, BLOCK_M)[None, :] * K + k[:, None]
    w_at = (w_rows - first)[:, None] * K + k[None, :]
    valid = (rows < M)[None, :]
    G = tl.cdiv(K, BLOCK) if BLOCK else 1
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up_total = total
    for step in range(begin, end):
        inside = k < K - step * BLOCK_K
        a = load_where(x_base + x_at, valid if EVEN_K else valid & inside[:, None], False)
        w = load_where(w_base + w_at, inside[None, :], EVEN_K)
        at = step * BLOCK_K
        scale = block_scales(scales, first, w_rows, at, G, BLOCK, UNIFORM)[:, None]
        total = add_product(total, w, a, scale, KIND, BLOCK, OPERAND, PROMOTE, NATIVE)
        if GATE != "":
            w = load_where(u_base + w_at, inside[None, :], EVEN_K)
            scale = block_scales(scales, N + first, N + w_rows, at, G, BLOCK, UNIFORM)[:, None]
            up_total = add_product(up_total, w, a, scale, KIND, BLOCK, OPERAND, PROMOTE, NATIVE)
            u_base += BLOCK_K
        x_base += BLOCK_K
        w_base += BLOCK_K
    total = tl.trans(total)
    up_total = tl.trans(up_total) if GATE != "" else total
    deliver(
        total, up_total, rows, first, M, N,
        x_scale, scales, bias, residual, out, out_scale, output_scale, X_SCALED, W_SCALED,
        SPLIT, GATE, HAS_BIAS, HAS_RESIDUAL, FORMAT, OUT_GROUP, DTYPE, WIDEN, NATIVE,
    )  # fmt: skip
