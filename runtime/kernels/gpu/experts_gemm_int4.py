"""The grouped products of experts_gemm.py over int4 weights, multiplied as 16-bit floats.

Weights are the first operand, [BLOCK_N outputs, 128 inputs] a step, and lie as the tensor cores
take it (int4_layout.py): each element of 16 bits becomes an element of four matrices [BLOCK_N, 32],
which meet four slices of x. A value q becomes a float, q above an offset (weight_tiles.py). Then
either

SUMS        sums are corrected: scale * (sum (offset + q) x - (offset + zero) sum x), in float32.
            The tensor cores add up x as they multiply, and a weight costs little more than one
            operation. For steps of few tokens, and groups that fill steps.
otherwise   weights are: (q - zero) * scale, rounded to the dtype of x as the reference rounds them.
            The cost does not grow with the tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .experts_gemm import tile_of
from .rounding import narrow, wide
from .tiles import activate, dot
from .weight_tiles import OFFSET_BF16, OFFSET_FP16, int4_levels

# Inputs of a step and of each of the four values of an element, and rows whose elements lie
# together; 64 rows make a block of the layout.
CHUNK: tl.constexpr = tl.constexpr(128)
PART: tl.constexpr = tl.constexpr(32)
ROWS: tl.constexpr = tl.constexpr(16)
BLOCK: tl.constexpr = tl.constexpr(64)


@triton.jit
def weights_of(level, zero, scale, DTYPE: tl.constexpr, WIDEN: tl.constexpr):
    """(q - zero) * scale, rounded to DTYPE; level and zero of `int4_levels`, scale bfloat16."""
    if WIDEN or DTYPE == "fp32":
        factor = wide(narrow(wide(scale, WIDEN), DTYPE, WIDEN), WIDEN)
        return narrow((level - zero) * factor, DTYPE, WIDEN)
    else:
        return (level - zero) * scale.to(tl.float32).to(level.dtype)


@triton.jit
def words_of(packed, first, last, K: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pointers [32 BLOCK_N] to the elements of rows `first`.. at the first CHUNK of inputs.

    Rows from `last` on, both multiples of 16, are those before it again. The next step lies
    BLOCK * PART on.
    """
    at = tl.arange(0, BLOCK_N * PART)
    rows = tl.minimum(first // ROWS + at // (ROWS * PART), last // ROWS - 1)
    block: tl.constexpr = (K + CHUNK - 1) // CHUNK * (BLOCK * PART)
    inside = rows % (BLOCK // ROWS) * (ROWS * PART) + at % (ROWS * PART)
    return packed + rows // (BLOCK // ROWS) * block + inside


@triton.jit
def operand(words, BLOCK_N: tl.constexpr):
    """[32 BLOCK_N] as they lie -> [BLOCK_N, 32]."""
    # [t, s, r, q, j, h, p] -> [t, h, r, s, j, q, p]
    words = words.reshape([BLOCK_N // ROWS, 2, 8, 4, 2, 2, 2])
    return words.permute([0, 5, 2, 1, 4, 3, 6]).reshape([BLOCK_N, PART])


@triton.jit
def factors_of(first, last, BLOCK_N: tl.constexpr):
    """Offsets [BLOCK_N / 2] of pairs of rows r and r + 8 of every 16, in a group's factors."""
    at = tl.arange(0, BLOCK_N // 2)
    rows = tl.minimum(first // ROWS + at // 8, last // ROWS - 1)
    return rows // (BLOCK // ROWS) * (BLOCK // 2) + at % 8 * 4 + rows % (BLOCK // ROWS)


@triton.jit
def load_factors(pointers, at, BLOCK_N: tl.constexpr):
    """The 16 bits of each row, int16 [BLOCK_N]."""
    pairs = tl.load(pointers.to(tl.pointer_type(tl.int32)) + at)
    pairs = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    return pairs.reshape([BLOCK_N // ROWS, 8, 2]).permute([0, 2, 1]).reshape([BLOCK_N])


@triton.jit
def load_part(pointers, used, k, K: tl.constexpr):
    """Inputs k .. k + 31, [32, M]; zeros beyond K and where `used` [M] is false."""
    mask = used[None, :]
    if K // CHUNK * CHUNK != K:
        mask = mask & (tl.arange(0, PART) + k < K)[:, None]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def sum_inputs(x0, x1, x2, x3, BLOCK_N: tl.constexpr, WIDEN: tl.constexpr):
    """[32, M] four times -> their sums over inputs, float32 [BLOCK_N, M], the same in every row."""
    ones = tl.full([BLOCK_N, PART], 1.0, x0.dtype)
    total = dot(ones, x0, tl.zeros([BLOCK_N, x0.shape[1]], tl.float32), WIDEN)
    total = dot(ones, x1, total, WIDEN)
    total = dot(ones, x2, total, WIDEN)
    return dot(ones, x3, total, WIDEN)


@triton.jit
def add_step(
    acc,
    words,
    scales,
    zeros,
    at,
    chunk,
    x0,
    x1,
    x2,
    x3,
    totals,
    PAIRS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDEN: tl.constexpr,
    SUMS: tl.constexpr,
):
    """acc [BLOCK_N, M] + weights x of a chunk. PAIRS: of rows, in a group's factors."""
    w0, w1, w2, w3 = int4_levels(operand(tl.load(words), BLOCK_N), DTYPE, WIDEN)
    group = chunk if GROUP < CHUNK else chunk * CHUNK // GROUP
    zero = load_factors(zeros, at + group * PAIRS, BLOCK_N)
    parts: tl.constexpr = 1 if GROUP >= CHUNK else CHUNK // GROUP
    at += group * (PAIRS * parts)
    s0 = load_factors(scales, at, BLOCK_N).to(tl.bfloat16, bitcast=True)
    if SUMS:
        part = dot(w0, x0, tl.zeros_like(acc), WIDEN)
        part = dot(w1, x1, part, WIDEN)
        part = dot(w2, x2, part, WIDEN)
        part = dot(w3, x3, part, WIDEN)
        offset = OFFSET_FP16 if DTYPE == "fp16" else OFFSET_BF16
        zero = (zero.to(tl.int32) & 15).to(tl.float32) + offset
        return acc + wide(s0, WIDEN)[:, None] * (part - zero[:, None] * totals)
    else:
        z0, z1, z2, z3 = int4_levels(zero[:, None], DTYPE, WIDEN)
        s1, s2, s3 = s0, s0, s0
        if GROUP < CHUNK:
            s2 = load_factors(scales, at + parts // 2 * PAIRS, BLOCK_N)
            s2 = s2.to(tl.bfloat16, bitcast=True)
            s3 = s2
        else:
            z1, z2, z3 = z0, z0, z0
        if GROUP == PART:
            s1 = load_factors(scales, at + PAIRS, BLOCK_N).to(tl.bfloat16, bitcast=True)
            s3 = load_factors(scales, at + 3 * PAIRS, BLOCK_N).to(tl.bfloat16, bitcast=True)
        acc = dot(weights_of(w0, z0, s0[:, None], DTYPE, WIDEN), x0, acc, WIDEN)
        acc = dot(weights_of(w1, z1, s1[:, None], DTYPE, WIDEN), x1, acc, WIDEN)
        acc = dot(weights_of(w2, z2, s2[:, None], DTYPE, WIDEN), x2, acc, WIDEN)
        return dot(weights_of(w3, z3, s3[:, None], DTYPE, WIDEN), x3, acc, WIDEN)


@triton.jit
def gate_up_int4(
    x,
    gate_up,
    scales,
    zeros,
    order,
    blocks,
    hidden,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    GROUP: tl.constexpr,
    TOP_K: tl.constexpr,
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUMS: tl.constexpr,
):
    """hidden [choices in order, I] = act(x gate^T) * (x up^T); x [T, K].

    PAIRS: half the rows of whole blocks.
    """
    m, n = tile_of((WIDTH + BLOCK_N - 1) // BLOCK_N, GROUP_M)
    places = tl.load(blocks + m * 3 + 2)
    if places == 0:
        return
    expert = tl.load(blocks + m * 3).to(tl.int64)
    place = tl.load(blocks + m * 3 + 1) + tl.arange(0, BLOCK_M)
    used = tl.arange(0, BLOCK_M) < places
    token = tl.load(order + place, mask=used, other=0).to(tl.int64) // TOP_K
    inputs = x + token[None, :] * K + tl.arange(0, PART)[:, None]
    middle = expert * (2 * WIDTH) + WIDTH
    first = middle - WIDTH + n * BLOCK_N
    gates = words_of(gate_up, first, middle, K, BLOCK_N)
    ups = words_of(gate_up, first + WIDTH, middle + WIDTH, K, BLOCK_N)
    gate_at = factors_of(first, middle, BLOCK_N)
    up_at = factors_of(first + WIDTH, middle + WIDTH, BLOCK_N)
    gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for chunk in range(0, (K + CHUNK - 1) // CHUNK):
        x0 = load_part(inputs, used, chunk * CHUNK, K)
        x1 = load_part(inputs + PART, used, chunk * CHUNK + PART, K)
        x2 = load_part(inputs + 2 * PART, used, chunk * CHUNK + 2 * PART, K)
        x3 = load_part(inputs + 3 * PART, used, chunk * CHUNK + 3 * PART, K)
        totals = sum_inputs(x0, x1, x2, x3, BLOCK_N, WIDEN) if SUMS else 0.0
        gate = add_step(
            gate, gates, scales, zeros, gate_at, chunk, x0, x1, x2, x3, totals,
            PAIRS, GROUP, BLOCK_N, DTYPE, WIDEN, SUMS,
        )  # fmt: skip
        up = add_step(
            up, ups, scales, zeros, up_at, chunk, x0, x1, x2, x3, totals,
            PAIRS, GROUP, BLOCK_N, DTYPE, WIDEN, SUMS,
        )  # fmt: skip
        inputs += CHUNK
        gates += BLOCK * PART
        ups += BLOCK * PART
    n = n * BLOCK_N + tl.arange(0, BLOCK_N)
    out = hidden + place.to(tl.int64)[None, :] * WIDTH + n[:, None]
    value = narrow(activate(gate, KIND) * up, DTYPE, WIDEN)
    tl.store(out, value, mask=used[None, :] & (n < WIDTH)[:, None])


@triton.jit
def down_int4(
    hidden,
    down,
    scales,
    zeros,
    weight,
    order,
    blocks,
    parts,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUMS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """parts [T * top_k, SPLIT, K] = weight * (hidden down^T) by number of choice, of each of SPLIT
    parts of the inputs: float32 where there are several. PAIRS: half the rows of whole blocks."""
    m, n = tile_of((K + BLOCK_N - 1) // BLOCK_N, GROUP_M)
    places = tl.load(blocks + m * 3 + 2)
    if places == 0:
        return
    expert = tl.load(blocks + m * 3).to(tl.int64)
    place = tl.load(blocks + m * 3 + 1) + tl.arange(0, BLOCK_M)
    used = tl.arange(0, BLOCK_M) < places
    share: tl.constexpr = ((WIDTH + CHUNK - 1) // CHUNK + SPLIT - 1) // SPLIT
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, (WIDTH + CHUNK - 1) // CHUNK)
    inputs = hidden + place.to(tl.int64)[None, :] * WIDTH + tl.arange(0, PART)[:, None]
    inputs += begin * CHUNK
    first = expert * K + n * BLOCK_N
    matrix = words_of(down, first, expert * K + K, WIDTH, BLOCK_N) + begin * (BLOCK * PART)
    at = factors_of(first, expert * K + K, BLOCK_N)
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for chunk in range(begin, end):
        x0 = load_part(inputs, used, chunk * CHUNK, WIDTH)
        x1 = load_part(inputs + PART, used, chunk * CHUNK + PART, WIDTH)
        x2 = load_part(inputs + 2 * PART, used, chunk * CHUNK + 2 * PART, WIDTH)
        x3 = load_part(inputs + 3 * PART, used, chunk * CHUNK + 3 * PART, WIDTH)
        totals = sum_inputs(x0, x1, x2, x3, BLOCK_N, WIDEN) if SUMS else 0.0
        sums = add_step(
            sums, matrix, scales, zeros, at, chunk, x0, x1, x2, x3, totals,
            PAIRS, GROUP, BLOCK_N, DTYPE, WIDEN, SUMS,
        )  # fmt: skip
        inputs += CHUNK
        matrix += BLOCK * PART
    choice = tl.load(order + place, mask=used, other=0).to(tl.int64)
    factor = wide(tl.load(weight + choice, mask=used, other=0.0), WIDEN)
    value = narrow(sums * factor[None, :], DTYPE if SPLIT == 1 else "fp32", WIDEN)
    n = n * BLOCK_N + tl.arange(0, BLOCK_N)
    out = parts + (choice * SPLIT + tl.program_id(1))[None, :] * K + n[:, None]
    tl.store(out, value, mask=used[None, :] & (n < K)[:, None])
