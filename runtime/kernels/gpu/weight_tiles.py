"""Pieces of the linears with int4 or int8 weights and 16-bit floating-point inputs.

Weights are the first operand of every product and x the second, y^T = W x^T: so dequantized weights
go to the tensor cores from registers, and the sixteen or fewer rows of x that a step of few tokens
has are the short side of the product.

int4: an element of 16 bits holds four values (int4_layout.py). q is put into the bits of a float
that stand for q above a power of two, the OFFSET: (q | 0x4300) is 128 + q in bfloat16, (16q |
0x5400) is 64 + q in float16 (Kim et al. 2022, arXiv:2211.10017). Two elements share a register, so
a shift and a lop3 make two weights. Zero points lie in words of the same form.

int8: a byte b of two's complement is put into the bits of 128 + (b & 127) and of 128 or 256 after
its sign, whose difference is b; float16 has room for all of b + 128 above 1024.

The operations are written in PTX where the compiler's own are twice as many. It would also copy
constants into registers before each use: they are or-ed with %ctaid.z, which is 0 in these grids
but not known to be. Triton's interpreter and float32 take plain arithmetic; what results is the
same to the last bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rounding import narrow, wide

OFFSET_BF16: tl.constexpr = tl.constexpr(128.0)
OFFSET_FP16: tl.constexpr = tl.constexpr(64.0)

_LEVELS = """{{
.reg .b32 mask, a, b, c, d;
mov.u32 mask, %ctaid.z;
or.b32 mask, mask, {mask};
{shifts}
lop3.b32 $0, a, mask, {base}, 0xea;
lop3.b32 $1, b, mask, {base}, 0xea;
lop3.b32 $2, c, mask, {base}, 0xea;
lop3.b32 $3, d, mask, {base}, 0xea;
}}"""
LEVELS_BF16: tl.constexpr = tl.constexpr(
    _LEVELS.format(
        mask="0x000f000f",
        base="0x43004300",
        shifts="mov.b32 a, $4; shr.u32 b, $4, 4; shr.u32 c, $4, 8; shr.u32 d, $4, 12;",
    )
)
LEVELS_FP16: tl.constexpr = tl.constexpr(
    _LEVELS.format(
        mask="0x00f000f0",
        base="0x54005400",
        shifts="shl.b32 a, $4, 4; mov.b32 b, $4; shr.u32 c, $4, 4; shr.u32 d, $4, 8;",
    )
)
# One factor of -1, or a sum with -0: exact, and an instruction that every capability has.
_MINUS = """{{
.reg .b32 minus;
mov.b32 minus, {minus};
fma.rn.{type} $0, $2, minus, $1;
}}"""
_TIMES = """{{
.reg .b32 zero;
mov.b32 zero, 0x80008000;
fma.rn.{type} $0, $1, $2, zero;
}}"""
MINUS_BF16: tl.constexpr = tl.constexpr(_MINUS.format(type="bf16x2", minus="0xbf80bf80"))
MINUS_FP16: tl.constexpr = tl.constexpr(_MINUS.format(type="f16x2", minus="0xbc00bc00"))
TIMES_BF16: tl.constexpr = tl.constexpr(_TIMES.format(type="bf16x2"))
TIMES_FP16: tl.constexpr = tl.constexpr(_TIMES.format(type="f16x2"))
# {bytes} picks two bytes and puts the base above each.
_SIGNED = """
prmt.b32 a, {source}, base, {bytes};
and.b32 b, a, 0xff80ff80;
and.b32 a, a, 0xff7fff7f;
fma.rn.bf16x2 {target}, b, minus, a;"""
_START = """{
.reg .b32 base, minus, a, b;
mov.u32 base, %ctaid.z;
or.b32 base, base, 0x43434343;
mov.b32 minus, 0xbf80bf80;"""
INT8_BF16: tl.constexpr = tl.constexpr(
    _START
    + _SIGNED.format(source="$2", target="$0", bytes="0x4140")
    + _SIGNED.format(source="$2", target="$1", bytes="0x4342")
    + "\n}"
)
PAIR_BF16: tl.constexpr = tl.constexpr(
    _START + _SIGNED.format(source="$1", target="$0", bytes="0x4140") + "\n}"
)
_UNSIGNED = """
prmt.b32 {target}, a, base, {bytes};
add.rn.f16x2 {target}, {target}, minus;"""
_START_FP16 = """{{
.reg .b32 base, minus, a;
mov.u32 base, %ctaid.z;
or.b32 base, base, 0x64646464;
mov.b32 minus, 0xe480e480;
xor.b32 a, {source}, 0x80808080;"""
INT8_FP16: tl.constexpr = tl.constexpr(
    _START_FP16.format(source="$2")
    + _UNSIGNED.format(target="$0", bytes="0x4140")
    + _UNSIGNED.format(target="$1", bytes="0x4342")
    + "\n}"
)
PAIR_FP16: tl.constexpr = tl.constexpr(
    _START_FP16.format(source="$1") + _UNSIGNED.format(target="$0", bytes="0x4140") + "\n}"
)


@triton.jit
def product(a, b, acc, WIDEN: tl.constexpr):
    """a [..., M, K] times b [..., K, N] onto acc, float32; float32 operands keep their digits."""
    return tl.dot(
        wide(a, WIDEN) if WIDEN else a,
        wide(b, WIDEN) if WIDEN else b,
        acc,
        input_precision="ieee",
        out_dtype=tl.float32,
    )


@triton.jit
def load_where(at, inside, ALL: tl.constexpr):
    """What lies at `at`, 0 where not `inside`; ALL: nothing is outside."""
    if ALL:
        return tl.load(at)
    else:
        return tl.load(at, mask=inside, other=0)


@triton.jit
def int4_levels(words, OPERAND: tl.constexpr, WIDEN: tl.constexpr):
    """words int16 -> four tensors of OFFSET + q, q the values in bits 0..3, 4..7, 8..11, 12..15.

    They are in OPERAND, "bf16", "fp16" or "fp32"; in float32 where WIDEN.
    """
    if WIDEN or OPERAND == "fp32":
        bits = words.to(tl.int32)
        offset = OFFSET_FP16 if OPERAND == "fp16" else OFFSET_BF16
        return (
            (bits & 15).to(tl.float32) + offset,
            (bits >> 4 & 15).to(tl.float32) + offset,
            (bits >> 8 & 15).to(tl.float32) + offset,
            (bits >> 12 & 15).to(tl.float32) + offset,
        )
    elif OPERAND == "bf16":
        return tl.inline_asm_elementwise(
            LEVELS_BF16,
            "=&r,=&r,=&r,=&r,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        return tl.inline_asm_elementwise(
            LEVELS_FP16,
            "=&r,=&r,=&r,=&r,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def minus(a, b, OPERAND: tl.constexpr, WIDEN: tl.constexpr):
    """a - b of `int4_levels`, which is exact; they broadcast."""
    if WIDEN or OPERAND == "fp32":
        return a - b
    elif OPERAND == "bf16":
        return tl.inline_asm_elementwise(
            MINUS_BF16, "=r,r,r", [a, b], tl.bfloat16, is_pure=True, pack=2
        )
    else:
        return tl.inline_asm_elementwise(
            MINUS_FP16, "=r,r,r", [a, b], tl.float16, is_pure=True, pack=2
        )


@triton.jit
def times(a, scales, OPERAND: tl.constexpr, WIDEN: tl.constexpr):
    """a [N, K] in OPERAND, float32 where WIDEN, times scales bfloat16 [N, 1] -> OPERAND.

    The scales become OPERAND first, which is exact; as float16 for 2^-17 up to 65280.
    """
    if WIDEN or OPERAND == "fp32":
        factor = wide(narrow(wide(scales, WIDEN), OPERAND, WIDEN), WIDEN)
        return narrow(a * factor, OPERAND, WIDEN)
    elif OPERAND == "bf16":
        return tl.inline_asm_elementwise(
            TIMES_BF16, "=r,r,r", [a, scales], tl.bfloat16, is_pure=True, pack=2
        )
    else:
        factor = scales.to(tl.float32).to(tl.float16)
        return tl.inline_asm_elementwise(
            TIMES_FP16, "=r,r,r", [a, factor], tl.float16, is_pure=True, pack=2
        )


@triton.jit
def int8_weights(q, OPERAND: tl.constexpr, WIDEN: tl.constexpr):
    """q int8 -> the same values in OPERAND, float32 where WIDEN."""
    if WIDEN or OPERAND == "fp32":
        return q.to(tl.float32)
    elif OPERAND == "bf16":
        return tl.inline_asm_elementwise(
            INT8_BF16, "=&r,=&r,r", [q], tl.bfloat16, is_pure=True, pack=4
        )
    else:
        return tl.inline_asm_elementwise(
            INT8_FP16, "=&r,=&r,r", [q], tl.float16, is_pure=True, pack=4
        )


@triton.jit
def int8_pairs(q, OPERAND: tl.constexpr, WIDEN: tl.constexpr):
    """q int16 [N, K/2], two int8 an element -> [N, K] in OPERAND, float32 where WIDEN.

    Where threads hold two neighbours of a row, as for Hopper's and Blackwell's tensor cores, bytes
    would be loaded, packed and unpacked one by one.
    """
    bits = q.to(tl.int32)
    if WIDEN or OPERAND == "fp32":
        low = (bits << 24 >> 24).to(tl.float32)
        high = (bits << 16 >> 24).to(tl.float32)
    elif OPERAND == "bf16":
        both = tl.inline_asm_elementwise(PAIR_BF16, "=&r,r", [bits], tl.int32, is_pure=True, pack=1)
        low = both.to(tl.int16).to(tl.bfloat16, bitcast=True)
        high = (both >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        both = tl.inline_asm_elementwise(PAIR_FP16, "=&r,r", [bits], tl.int32, is_pure=True, pack=1)
        low = both.to(tl.int16).to(tl.float16, bitcast=True)
        high = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.reshape(tl.join(low, high), (q.shape[0], q.shape[1] * 2))


@triton.jit
def beside(factors, BLOCK_M: tl.constexpr):
    """Factors [32 S, R / 8] as a batch's threads load them -> [S, R, BLOCK_M], where a product has
    its sums: thread 4r + q has the factors of rows 16t + 8h + r at 2t + h, and none moves."""
    S: tl.constexpr = factors.shape[0] // 32
    PAIRS: tl.constexpr = factors.shape[1] // 2
    f = tl.permute(tl.reshape(factors, (S, 8, 4, PAIRS, 2)), (0, 3, 4, 1, 2))
    f = tl.reshape(f, (S, PAIRS, 2, 8, 1, 4, 1))
    f = tl.broadcast_to(f, (S, PAIRS, 2, 8, BLOCK_M // 8, 4, 2))
    return tl.reshape(f, (S, PAIRS * 16, BLOCK_M))


@triton.jit
def tall(sums):
    """sums [N, 8], of a product with eight rows of x -> [16, N], rows 8.. are of no account."""
    both = tl.permute(tl.join(sums, sums), (2, 1, 0))
    return tl.reshape(both, (16, sums.shape[0]))
