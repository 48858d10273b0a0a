"""The kernels of linear_int4.py, for steps of few tokens and of many.

A chunk of 128 features is four matrices [outputs, 32], whose elements are the values in bits 0..3,
4..7, 8..11 and 12..15 of the same 16-bit elements (int4_layout.py, weight_tiles.py).

Few tokens: the time is that of reading the weights once, and a weight must cost about two
instructions. Levels, which are OFFSET + q, are multiplied as they are, and a group's scale and zero
point follow in float32:

    y += scale (sum over the group of level x - (OFFSET + zero) sum over the group of x)

with the sums of x from the same tensor cores, as products with ones. The difference is taken at
least every 128 features, so it loses about seven bits of float32, whatever the mean of x. Every
warp has features of its own (SLICES of a step along K, a batch of products) and no warp unpacks
what another one does; their sums meet at the end. Up to eight rows of x take products of half the
size.

Many tokens: weights are rounded to the dtype of x, (q - zero) scale, as the reference rounds them,
and multiplied in tiles [BLOCK_N, BLOCK_M].

GROUP: features that share a scale, 0 for all of them. PARTS: groups in a chunk. TAIL: what K leaves
of a step, see weight_launch.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rounding import wide
from .weight_epilogue import deliver, steps_of, tile_of
from .weight_tiles import beside, int4_levels, load_where, minus, product, tall, times


@triton.jit
def _operand(words, BATCH: tl.constexpr, BLOCK_N: tl.constexpr):
    """Elements of packed [BATCH, 32 BLOCK_N] as they lie -> [BATCH, BLOCK_N, 32]."""
    words = tl.reshape(words, (BATCH, BLOCK_N // 16, 2, 8, 4, 2, 2, 2))
    words = tl.permute(words, (0, 1, 6, 3, 2, 5, 4, 7))
    return tl.reshape(words, (BATCH, BLOCK_N, 32))


@triton.jit
def _sum_of(x, total, WIDEN: tl.constexpr):
    """x [S, 32, BLOCK_M] summed over features onto total [S, 16, BLOCK_M], sixteen times."""
    return product(tl.full((x.shape[0], 16, 32), 1.0, x.dtype), x, total, WIDEN)


@triton.jit
def _close(acc, part, x_sum, zero, scale, WIDEN: tl.constexpr):
    """acc [S, R, BLOCK_M] plus the sums `part` over the levels of a group."""
    S: tl.constexpr = acc.shape[0]
    R: tl.constexpr = acc.shape[1]
    M: tl.constexpr = acc.shape[2]
    x_sum = tl.broadcast_to(tl.reshape(x_sum, (S, 1, 16, M)), (S, R // 16, 16, M))
    part -= beside(wide(zero, WIDEN), M) * tl.reshape(x_sum, (S, R, M))
    return acc + part * beside(scale, M)


@triton.jit
def _add_chunk(
    acc, words, factors, x, x_sums,
    PARTS: tl.constexpr, OPERAND: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """acc [S, R, BLOCK_M] plus a chunk of every slice. factors: zero points and four scales."""
    a = int4_levels(_operand(words, acc.shape[0], acc.shape[1]), OPERAND, WIDEN)
    zeros = int4_levels(factors[0], OPERAND, WIDEN)
    part = tl.zeros_like(acc)
    for i in tl.static_range(4):
        part = product(a[i], x[i], part, WIDEN)
        if (i + 1) % (4 // PARTS) == 0:
            acc = _close(acc, part, x_sums[i], zeros[i], factors[1 + i], WIDEN)
            part = tl.zeros_like(acc)
    return acc


@triton.jit
def _group_of(chunk, GROUP: tl.constexpr, PARTS: tl.constexpr):
    """Where the factors of a chunk begin, among zero points."""
    if GROUP == 0:
        return chunk * 0
    elif PARTS == 1:
        return chunk * 128 // GROUP
    else:
        return chunk


@triton.jit
def _factors(
    scales, zeros, chunk, plane, own,
    GROUP: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """(zero points, scales of 32 features, of the next 32, ...) of a thread's rows and chunk."""
    group = _group_of(chunk, GROUP, PARTS) * plane
    zero = tl.load(zeros + (group[:, None] + own))
    at = scales + (group * PARTS)[:, None] + own
    first = wide(tl.load(at), WIDEN)
    if PARTS == 1:
        return zero, first, first, first, first
    elif PARTS == 2:
        second = wide(tl.load(at + plane), WIDEN)
        return zero, first, first, second, second
    else:
        second = wide(tl.load(at + plane), WIDEN)
        third = wide(tl.load(at + 2 * plane), WIDEN)
        return zero, first, second, third, wide(tl.load(at + 3 * plane), WIDEN)


@triton.jit
def _few(
    x, packed, scales, zeros, row, first, M, N, K,
    GROUP: tl.constexpr, PARTS: tl.constexpr, GATED: tl.constexpr, OPERAND: tl.constexpr,
    WIDEN: tl.constexpr, TAIL: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Sums of BLOCK_M rows of x from `row` on and of outputs first.. -> [BLOCK_N, BLOCK_M], and
    those of the other half of the weight with a gate."""
    begin, end = steps_of(K, SLICES * 128, SPLIT)
    chunks = tl.cdiv(K, 128)
    last = tl.maximum(end - 1, begin)
    plane = tl.cdiv(N * 2 if GATED else N, 64) * 64
    slices = tl.arange(0, SLICES)
    k = slices[:, None, None] * 128 + tl.arange(0, 32)[None, None, :]
    rows = row + tl.arange(0, BLOCK_M)[None, :, None]
    x_at = rows * K + k
    w_at = slices[:, None] * 2048 + tl.arange(0, BLOCK_N * 32)[None, :]
    w_base = packed + (first // 64).to(tl.int64) * chunks * 2048 + first % 64 * 32
    u_base = w_base + tl.cast(N // 64, tl.int64) * chunks * 2048
    # Four threads side by side have the same rows of a product's first operand.
    threads = tl.arange(0, SLICES * 32)
    mine = tl.multiple_of(first // 64 * 64 + first % 64 // 8, BLOCK_N // 8)
    own = mine + (threads % 32 // 4 * 8)[:, None] + tl.arange(0, BLOCK_N // 8)[None, :]
    acc = tl.zeros((SLICES, BLOCK_N, BLOCK_M), tl.float32)
    up = acc
    none = tl.zeros((SLICES, 16, BLOCK_M), tl.float32)
    # Factors are loaded a step ahead: they go to registers, and no copy to shared memory hides how
    # long that takes.
    chunk = tl.minimum(begin * SLICES + threads // 32, chunks - 1)
    f = _factors(scales, zeros, chunk, plane, own, GROUP, PARTS, WIDEN)
    u = f
    if GATED:
        u = _factors(scales, zeros, chunk, plane, own + N, GROUP, PARTS, WIDEN)
    for step in range(begin, end):
        start = step * SLICES
        inside = start + slices < chunks
        words = load_where(w_base + start * 2048 + w_at, inside[:, None], TAIL == 0)
        here = x + start * 128 + x_at
        valid = rows < M
        if TAIL == 1:
            valid = valid & inside[:, None, None]
        if TAIL < 2:
            x0 = tl.load(here, mask=valid, other=0.0)
            x1 = tl.load(here + 32, mask=valid, other=0.0)
            x2 = tl.load(here + 64, mask=valid, other=0.0)
            x3 = tl.load(here + 96, mask=valid, other=0.0)
        else:
            f0 = start * 128 + k
            x0 = tl.load(here, mask=valid & (f0 < K), other=0.0)
            x1 = tl.load(here + 32, mask=valid & (f0 + 32 < K), other=0.0)
            x2 = tl.load(here + 64, mask=valid & (f0 + 64 < K), other=0.0)
            x3 = tl.load(here + 96, mask=valid & (f0 + 96 < K), other=0.0)
        x0 = tl.permute(x0, (0, 2, 1))
        x1 = tl.permute(x1, (0, 2, 1))
        x2 = tl.permute(x2, (0, 2, 1))
        x3 = tl.permute(x3, (0, 2, 1))
        s0 = _sum_of(x0, none, WIDEN)
        s1 = _sum_of(x1, none if PARTS == 4 else s0, WIDEN)
        s2 = _sum_of(x2, s1 if PARTS == 1 else none, WIDEN)
        s3 = _sum_of(x3, none if PARTS == 4 else s2, WIDEN)
        chunk = tl.minimum(step + 1, last) * SLICES + threads // 32
        if TAIL > 0:
            chunk = tl.minimum(chunk, chunks - 1)
        ahead = _factors(scales, zeros, chunk, plane, own, GROUP, PARTS, WIDEN)
        xs = (x0, x1, x2, x3)
        sums = (s0, s1, s2, s3)
        acc = _add_chunk(acc, words, f, xs, sums, PARTS, OPERAND, WIDEN)
        f = ahead
        if GATED:
            words = load_where(u_base + start * 2048 + w_at, inside[:, None], TAIL == 0)
            ahead = _factors(scales, zeros, chunk, plane, own + N, GROUP, PARTS, WIDEN)
            up = _add_chunk(up, words, u, xs, sums, PARTS, OPERAND, WIDEN)
            u = ahead
    acc = tl.sum(acc, 0)
    return acc, tl.sum(up, 0) if GATED else acc


@triton.jit
def linear_int4_few(
    x, packed, scales, zeros, bias, residual, out, M, N, K,
    GROUP: tl.constexpr, PARTS: tl.constexpr, OPERAND: tl.constexpr, GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, DTYPE: tl.constexpr, WIDEN: tl.constexpr,
    TAIL: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SLICES: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    row, first = tile_of(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    if M <= 8 and BLOCK_M == 16:
        y, up = _few(
            x, packed, scales, zeros, row, first, M, N, K,
            GROUP, PARTS, GATE != "", OPERAND, WIDEN, TAIL, SPLIT, 8, BLOCK_N, SLICES,
        )  # fmt: skip
        y = tall(y)
        up = tall(up)
    else:
        y, up = _few(
            x, packed, scales, zeros, row, first, M, N, K,
            GROUP, PARTS, GATE != "", OPERAND, WIDEN, TAIL, SPLIT, BLOCK_M, BLOCK_N, SLICES,
        )  # fmt: skip
        y = tl.trans(y)
        up = tl.trans(up)
    rows, columns = row + tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_N)
    deliver(
        y, up, rows, columns, M, N, bias, residual, out,
        SPLIT, GATE, HAS_BIAS, HAS_RESIDUAL, DTYPE, WIDEN,
    )  # fmt: skip


@triton.jit
def _by_row(factors):
    """Factors [R] as they lie -> [R, 1], in the order of rows."""
    R: tl.constexpr = factors.shape[0]
    factors = tl.permute(tl.reshape(factors, (R // 64, 8, 4, 2)), (0, 2, 3, 1))
    return tl.reshape(factors, (R,))[:, None]


@triton.jit
def _add_tile(
    acc, at, scales, zeros, chunk, plane, own, x,
    GROUP: tl.constexpr, PARTS: tl.constexpr, OPERAND: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_N, BLOCK_M] plus a chunk of the weights at `at`; x: its four parts."""
    R: tl.constexpr = acc.shape[0]
    words = tl.reshape(_operand(tl.load(at), R // 64, 64), (R, 32))
    a = int4_levels(words, OPERAND, WIDEN)
    group = _group_of(chunk, GROUP, PARTS) * plane
    z = int4_levels(tl.load(zeros + (group + own)), OPERAND, WIDEN)
    s = tl.load(scales + (group * PARTS + own))
    for i in tl.static_range(4):
        if PARTS > 1 and i > 0 and i % (4 // PARTS) == 0:
            s = tl.load(scales + (group * PARTS + i * PARTS // 4 * plane + own))
        w = times(minus(a[i], _by_row(z[i]), OPERAND, WIDEN), _by_row(s), OPERAND, WIDEN)
        acc = product(w, x[i], acc, WIDEN)
    return acc


@triton.jit
def linear_int4_many(
    x, packed, scales, zeros, bias, residual, out, M, N, K,
    GROUP: tl.constexpr, PARTS: tl.constexpr, OPERAND: tl.constexpr, GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, DTYPE: tl.constexpr, WIDEN: tl.constexpr,
    TAIL: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    row, first = tile_of(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    begin, end = steps_of(K, 128, SPLIT)
    rows = row + tl.arange(0, BLOCK_M)
    chunks = tl.cdiv(K, 128)
    blocks = tl.cdiv(N * 2 if GATE != "" else N, 64)
    plane = blocks * 64
    # Rows beyond M and N read the last one, and are not stored.
    k = tl.arange(0, 32)[None, :]
    x_at = tl.minimum(rows, M - 1).to(tl.int64)[:, None] * K + k
    local = tl.minimum(tl.arange(0, BLOCK_N // 64), blocks - 1 - first // 64)[:, None]
    w_at = local * (chunks * 2048) + tl.arange(0, 2048)[None, :]
    own = first + tl.reshape(local * 64 + tl.arange(0, 64)[None, :], (BLOCK_N,))
    w_base = packed + (first // 64).to(tl.int64) * chunks * 2048
    u_base = w_base + tl.cast(N // 64, tl.int64) * chunks * 2048
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = acc
    for chunk in range(begin, end):
        here = x + chunk * 128 + x_at
        f0 = chunk * 128 + k
        x0 = tl.trans(load_where(here, f0 < K, TAIL < 2))
        x1 = tl.trans(load_where(here + 32, f0 + 32 < K, TAIL < 2))
        x2 = tl.trans(load_where(here + 64, f0 + 64 < K, TAIL < 2))
        x3 = tl.trans(load_where(here + 96, f0 + 96 < K, TAIL < 2))
        xs = (x0, x1, x2, x3)
        acc = _add_tile(
            acc, w_base + chunk * 2048 + w_at, scales, zeros, chunk, plane, own, xs,
            GROUP, PARTS, OPERAND, WIDEN,
        )  # fmt: skip
        if GATE != "":
            up = _add_tile(
                up, u_base + chunk * 2048 + w_at, scales, zeros, chunk, plane, own + N, xs,
                GROUP, PARTS, OPERAND, WIDEN,
            )  # fmt: skip
    y = tl.trans(acc)
    up = tl.trans(up) if GATE != "" else y
    columns = first + tl.arange(0, BLOCK_N)
    deliver(
        y, up, rows, columns, M, N, bias, residual, out,
        SPLIT, GATE, HAS_BIAS, HAS_RESIDUAL, DTYPE, WIDEN,
    )  # fmt: skip
