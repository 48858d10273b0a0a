"""Tiles of keys and values out of the paged cache, made ready for tensor cores in registers.

The rows are those of ops/cache_format.py. Of the quantized formats only the small integers (or
e4m3 numbers) go through the products, as float16, which holds all of them exactly. A row's scale
and zero are applied to whole scores and probabilities instead, which are fewer:

    q . key                = scale * (q . integers) + zero * sum(q)
    sum_j p_j * value_j    = sum_j (p_j * scale_j) * integers_j + sum_j p_j * zero_j

A row is read as 32-bit words. On a device one word becomes four or eight float16 by a byte
permutation or two masks that set the bits of 1024 above an integer, and a subtraction of 1024:
half the instructions that conversions of single bytes take, which would cost more time than the
bytes themselves. Triton's interpreter runs no assembly; there a plain branch computes the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rounding import narrow, wide
from .tiles import dot

LOG2E = tl.constexpr(1.4426950408889634)

# What the scales of values are multiplied by before they meet probabilities, so that small ones
# stay within float16: the largest power of two with which the largest scale, 65504 / 448,
# 65504 * 2 / 255 or / 15, does not overflow.
_LIFT_FP8 = tl.constexpr(256.0)
_LIFT_INT8 = tl.constexpr(64.0)
_LIFT_INT4 = tl.constexpr(4.0)

# 0x6400 are the bits of 1024 in float16, whose last places count single units.
_INT8_WORD = tl.constexpr("""{ .reg .b32 a, b;
    prmt.b32 a, $4, 0x64646464, 0x4140;
    prmt.b32 b, $4, 0x64646464, 0x4342;
    sub.f16x2 a, a, $5;
    sub.f16x2 b, b, $5;
    mov.b32 {$0, $1}, a;
    mov.b32 {$2, $3}, b; }""")
# Integers 0 and 4 lie 16 bits apart, and so do 1 and 5, ...: those pairs share a register. The
# odd ones are 16 times too large, above 1024: they are divided, and 64 is taken away.
_INT4_WORD = tl.constexpr("""{ .reg .b32 a, b, c, d, s;
    lop3.b32 a, $8, 0x000f000f, 0x64006400, 0xea;
    lop3.b32 b, $8, 0x00f000f0, 0x64006400, 0xea;
    shr.u32 s, $8, 8;
    lop3.b32 c, s, 0x000f000f, 0x64006400, 0xea;
    lop3.b32 d, s, 0x00f000f0, 0x64006400, 0xea;
    sub.f16x2 a, a, $9;
    fma.rn.f16x2 b, b, $10, $11;
    sub.f16x2 c, c, $9;
    fma.rn.f16x2 d, d, $10, $11;
    mov.b32 {$0, $1}, a;
    mov.b32 {$2, $3}, b;
    mov.b32 {$4, $5}, c;
    mov.b32 {$6, $7}, d; }""")
_FP8_WORD = tl.constexpr("""{ .reg .b32 a, b;
    cvt.rn.f16x2.e4m3x2 a, $4;
    cvt.rn.f16x2.e4m3x2 b, $5;
    mov.b32 {$0, $1}, a;
    mov.b32 {$2, $3}, b; }""")
# Before capability 8.9. An e4m3 number's bits, one place below the top of a float16, say 2^-8 of
# its value: the exponents' biases are 7 and 15. Right for all but e4m3's NaN, which no row holds.
_FP8_WORD_BITS = tl.constexpr("""{ .reg .b32 w, a, b, s, t;
    mov.b32 w, {$4, $5};
    prmt.b32 a, w, 0, 0x1404;
    prmt.b32 b, w, 0, 0x3424;
    shr.u32 s, a, 1;
    shr.u32 t, b, 1;
    and.b32 s, s, 0x3f803f80;
    and.b32 t, t, 0x3f803f80;
    lop3.b32 a, a, 0x80008000, s, 0xea;
    lop3.b32 b, b, 0x80008000, t, 0xea;
    mul.f16x2 a, a, $6;
    mul.f16x2 b, b, $6;
    mov.b32 {$0, $1}, a;
    mov.b32 {$2, $3}, b; }""")


@triton.jit
def product(a, b, acc, WIDEN: tl.constexpr):
    """a [M, K] times b [K, N] onto acc, float32. float32 operands keep their precision."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="tf32x3")
    else:
        return dot(a, b, acc, WIDEN)


@triton.jit
def feature_of(column, FORMAT: tl.constexpr):
    """Which feature stands in a column of a dequantized tile."""
    if FORMAT == "int4":
        return column // 8 * 8 + column % 8 // 2 + column % 2 * 4
    else:
        return column


@triton.jit
def in_order(x, AXIS: tl.constexpr, FORMAT: tl.constexpr):
    """A matrix whose columns, or rows where AXIS is 0, are those of `feature_of`, by features."""
    if FORMAT != "int4":
        return x
    elif AXIS == 0:
        y = tl.reshape(x, [x.shape[0] // 8, 4, 2, x.shape[1]])
        return tl.reshape(tl.permute(y, (0, 2, 1, 3)), x.shape)
    else:
        y = tl.reshape(x, [x.shape[0], x.shape[1] // 8, 4, 2])
        return tl.reshape(tl.permute(y, (0, 1, 3, 2)), x.shape)


@triton.jit
def prepare_queries(x, AXIS: tl.constexpr, WIDEN: tl.constexpr):
    """Queries, features along AXIS, for products with quantized keys: as float16 below 2, by a
    power of two for each query; the sums of those; the powers, which scores are multiplied by."""
    x = wide(x, WIDEN)
    exponent = tl.max(tl.abs(x), AXIS).to(tl.int32, bitcast=True) >> 23
    # Not so small that a product with it is 0: masked scores are -inf.
    exponent = tl.minimum(tl.maximum(exponent, 64), 253)
    factor = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    half = (x * tl.expand_dims(inverse, AXIS)).to(tl.float16)
    return half, tl.sum(half.to(tl.float32), AXIS), factor


@triton.jit
def unit_of(SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """What `capped` scores are multiplied by to become exponents of 2."""
    if SOFTCAP > 0:
        return LOG2E
    else:
        return SCALE * LOG2E


@triton.jit
def capped(products, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """q . key -> what softmax takes where scores are soft-capped, and q . key where not."""
    if SOFTCAP > 0:
        grown = tl.exp2(products * (2.0 * LOG2E * SCALE / SOFTCAP))
        return (1.0 - 2.0 / (1.0 + grown)) * SOFTCAP
    else:
        return products


@triton.jit
def power(x, ASSEMBLY: tl.constexpr):
    """2^x for x of at most 0. On a device results below 2^-126 are zeros: to make those right takes
    triton's own exp2 three more instructions for every score."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def tile_blocks(table, start, high, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """The cache blocks of keys start .. start + BLOCK_N: int32 [pages], a page being what a tile
    and a block have in common. `start` begins a page; pages from `high` on have no block."""
    PAGE: tl.constexpr = min(BLOCK_N, BLOCK_SIZE)
    first = start + tl.arange(0, BLOCK_N // PAGE) * PAGE
    return tl.load(table + first // BLOCK_SIZE, mask=first < high, other=0)


@triton.jit
def tile_rows(blocks, start, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr, SLOT: tl.constexpr):
    """Where those keys' rows of the first kv head begin in a cache of SLOT elements a slot: int64
    [pages, keys of a page].

    One address a page, and distances the compiler knows: an address for each key by itself takes a
    third of the decode kernel's instructions.
    """
    PAGE: tl.constexpr = min(BLOCK_N, BLOCK_SIZE)
    begin = blocks.to(tl.int64) * (2 * BLOCK_SIZE * SLOT) + start % BLOCK_SIZE * SLOT
    return begin[:, None] + (tl.arange(0, PAGE).to(tl.int64) * SLOT)[None, :]


@triton.jit
def tile_keys(start, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Those keys, in the shape of their rows."""
    PAGE: tl.constexpr = min(BLOCK_N, BLOCK_SIZE)
    first = start + tl.arange(0, BLOCK_N // PAGE) * PAGE
    return first[:, None] + tl.arange(0, PAGE)[None, :]


@triton.jit
def readable(keys, low, high, WINDOW: tl.constexpr):
    """Which keys a program may read: blocks that lie before its window may be another's by now."""
    if WINDOW > 0:
        return (keys >= low) & (keys < high)
    else:
        return keys < high


@triton.jit
def load_words(
    cache,
    rows,
    start,
    low,
    high,
    WINDOW: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Values of the quantized `tile_rows` of keys from `start` on: [pages, keys of a page, words].

    Keys that are not `readable` give any numbers, but finite ones. uint32, and a tensor without
    meaning; for fp8, whose rows begin at even addresses only, the lower and upper halves of the
    words as two uint16 tensors.
    """
    BYTES: tl.constexpr = SIZE // 2 if FORMAT == "int4" else SIZE
    WORDS: tl.constexpr = BLOCK_D // 8 if FORMAT == "int4" else BLOCK_D // 4
    PAGE: tl.constexpr = rows.shape[1]
    first = start + tl.arange(0, rows.shape[0]) * PAGE
    if FORMAT == "fp8":
        keys = first[:, None] + tl.arange(0, PAGE)[None, :]
        mask = readable(keys, low, high, WINDOW)[:, :, None]
    else:
        # Integers are finite whatever their bits, so a page is loaded as a whole.
        mask = (first < high)[:, None, None]
    word = tl.arange(0, WORDS)[None, None, :] * 4
    if 4 * WORDS != BYTES:
        mask = mask & (word < BYTES)
    at = cache + rows[:, :, None] + word
    if FORMAT == "fp8":
        half = at.to(tl.pointer_type(tl.uint16))
        return tl.load(half, mask=mask, other=0), tl.load(half + 1, mask=mask, other=0)
    else:
        words = tl.load(at.to(tl.pointer_type(tl.uint32)), mask=mask, other=0)
        return words, tl.zeros([1], tl.uint16)


@triton.jit
def _e4m3(code):
    """What `_FP8_WORD_BITS` does, of one number: uint16 -> float16."""
    bits = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
    return bits.to(tl.uint16).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def _numbers(words, upper, FORMAT: tl.constexpr, NATIVE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """float16 [pages, keys of a page, words, 2, 2], for int4 one 2 more."""
    if FORMAT == "int4":
        if ASSEMBLY:
            n0, n4, n1, n5, n2, n6, n3, n7 = tl.inline_asm_elementwise(
                _INT4_WORD,
                "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r",
                [words, 0x64006400, 0x2C002C00, 0xD400D400],
                (tl.float16,) * 8,
                is_pure=True,
                pack=1,
            )
        else:
            n0 = (words & 15).to(tl.float16)
            n1 = (words >> 4 & 15).to(tl.float16)
            n2 = (words >> 8 & 15).to(tl.float16)
            n3 = (words >> 12 & 15).to(tl.float16)
            n4 = (words >> 16 & 15).to(tl.float16)
            n5 = (words >> 20 & 15).to(tl.float16)
            n6 = (words >> 24 & 15).to(tl.float16)
            n7 = (words >> 28).to(tl.float16)
        low = tl.join(tl.join(n0, n2), tl.join(n1, n3))
        high = tl.join(tl.join(n4, n6), tl.join(n5, n7))
        return tl.join(low, high)
    else:
        if FORMAT == "fp8":
            if ASSEMBLY and NATIVE:
                n0, n1, n2, n3 = tl.inline_asm_elementwise(
                    _FP8_WORD, "=h,=h,=h,=h,h,h", [words, upper], (tl.float16,) * 4, True, 1
                )
            elif ASSEMBLY:
                n0, n1, n2, n3 = tl.inline_asm_elementwise(
                    _FP8_WORD_BITS,
                    "=h,=h,=h,=h,h,h,r",
                    [words, upper, 0x5C005C00],
                    (tl.float16,) * 4,
                    is_pure=True,
                    pack=1,
                )
            else:
                n0 = _e4m3(words & 255)
                n1 = _e4m3(words >> 8)
                n2 = _e4m3(upper & 255)
                n3 = _e4m3(upper >> 8)
        elif ASSEMBLY:
            n0, n1, n2, n3 = tl.inline_asm_elementwise(
                _INT8_WORD, "=h,=h,=h,=h,r,r", [words, 0x64006400], (tl.float16,) * 4, True, 1
            )
        else:
            n0 = (words & 255).to(tl.float16)
            n1 = (words >> 8 & 255).to(tl.float16)
            n2 = (words >> 16 & 255).to(tl.float16)
            n3 = (words >> 24).to(tl.float16)
        return tl.join(tl.join(n0, n2), tl.join(n1, n3))


@triton.jit
def dequantize(words, upper, FORMAT: tl.constexpr, NATIVE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """What `load_words` gave -> float16 [keys, columns]: integers, or e4m3 values, exactly.

    NATIVE: the device converts e4m3. Which feature a column holds says `feature_of`.
    """
    KEYS: tl.constexpr = words.shape[0] * words.shape[1]
    COLUMNS: tl.constexpr = words.shape[2] * (8 if FORMAT == "int4" else 4)
    return tl.reshape(_numbers(words, upper, FORMAT, NATIVE, ASSEMBLY), [KEYS, COLUMNS])


@triton.jit
def dequantize_rows(
    words,
    upper,
    parameters,
    COMPUTE: tl.constexpr,
    FORMAT: tl.constexpr,
    NATIVE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The rows themselves, rounded to COMPUTE: [keys, columns]. parameters: `load_parameters` of
    `tile_rows`.

    Where many queries meet a key this is less work than scaling their scores.
    """
    KEYS: tl.constexpr = words.shape[0] * words.shape[1]
    COLUMNS: tl.constexpr = words.shape[2] * (8 if FORMAT == "int4" else 4)
    numbers = _numbers(words, upper, FORMAT, NATIVE, ASSEMBLY).to(tl.float32)
    scale = scale_of(parameters)[:, :, None, None, None]
    zero = zero_of(parameters, FORMAT)[:, :, None, None, None]
    if FORMAT == "int4":
        scale = scale[:, :, :, :, :, None]
        zero = zero[:, :, :, :, :, None]
    rows = numbers * scale + zero
    if COMPUTE == "fp16":
        # A scale that was rounded up may lead beyond the largest number.
        rows = tl.minimum(rows, 65504.0, propagate_nan=tl.PropagateNan.ALL)
        rows = tl.maximum(rows, -65504.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.reshape(narrow(rows, COMPUTE, WIDEN), [KEYS, COLUMNS])


@triton.jit
def load_parameters(cache, rows, mask, SIZE: tl.constexpr, FORMAT: tl.constexpr):
    """Of rows of any shape: uint32 of scale and zero, or for fp8 uint16 of a scale. mask: which are
    `readable`; the others get zeros."""
    BYTES: tl.constexpr = SIZE // 2 if FORMAT == "int4" else SIZE
    at = cache + rows + BYTES
    if FORMAT == "fp8":
        return tl.load(at.to(tl.pointer_type(tl.uint16)), mask=mask, other=0)
    else:
        return tl.load(at.to(tl.pointer_type(tl.uint32)), mask=mask, other=0)


@triton.jit
def scale_of(parameters):
    """What `load_parameters` gave -> float32."""
    return (parameters & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def zero_of(parameters, FORMAT: tl.constexpr):
    """What `load_parameters` gave -> float32; e4m3 has no zero."""
    if FORMAT == "fp8":
        return tl.zeros(parameters.shape, tl.float32)
    else:
        return (parameters >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def lift(FORMAT: tl.constexpr):
    """What the scales of values are multiplied by on their way into the product."""
    if FORMAT == "fp8":
        return _LIFT_FP8
    elif FORMAT == "int8":
        return _LIFT_INT8
    else:
        return _LIFT_INT4
