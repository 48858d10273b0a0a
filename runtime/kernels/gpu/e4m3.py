"""e4m3 (float8_e4m3fn, see ops/linear_fp8.py) to and from wider floats, as codes in uint8.

Capability 8.9 and later have instructions for both ways (NATIVE). Before that, and in triton's
interpreter, which rounds half up and does not clamp, the bits are computed.
"""

from __future__ import annotations

import triton
import triton.language as tl

NATIVE_FROM = 89


# Four codes to two registers of two 16-bit floats each: 14 instructions, where one code at a time
# takes 10 and no A100 reads its memory at full speed. Each code is put into the upper byte of its
# half; shifted to where the wide format's exponent ends it is a fixed power of two too small,
# subnormals included, which a product corrects. The code of NaN becomes 480 so far; `limit` takes
# that, and nothing else, to infinity, and 0 times infinity is NaN.
_WIDEN = """
{
    .reg .b32 half<2>, size<2>, far<2>, factor, limit, none, zero;
    mov.b32 factor, %(factor)s;
    mov.b32 limit, %(limit)s;
    mov.b32 none, 0x80008000;
    mov.b32 zero, 0;
    prmt.b32 half0, $2, zero, 0x1404;
    prmt.b32 half1, $2, zero, 0x3424;
    shr.b32 size0, half0, %(shift)s;
    shr.b32 size1, half1, %(shift)s;
    and.b32 size0, size0, %(mask)s;
    and.b32 size1, size1, %(mask)s;
    lop3.b32 size0, half0, 0x80008000, size0, 0xEA;
    lop3.b32 size1, half1, 0x80008000, size1, 0xEA;
    fma.rn.%(type)s size0, size0, factor, none;
    fma.rn.%(type)s size1, size1, factor, none;
    fma.rn.%(type)s far0, size0, limit, none;
    fma.rn.%(type)s far1, size1, limit, none;
    fma.rn.%(type)s $0, far0, zero, size0;
    fma.rn.%(type)s $1, far1, zero, size1;
}
"""
# factor: 2^120 and 2^8. limit: 1.125 * 2^119 and 1.125 * 2^7; 448 times that is still finite.
BF16 = {"type": "bf16x2", "shift": "4", "mask": "0x07F007F0"}
BF16 |= {"factor": "0x7B807B80", "limit": "0x7B107B10"}
FP16 = {"type": "f16x2", "shift": "1", "mask": "0x3F803F80"}
FP16 |= {"factor": "0x5C005C00", "limit": "0x58805880"}
TO_BF16 = tl.constexpr(_WIDEN % BF16)
TO_FP16 = tl.constexpr(_WIDEN % FP16)


@triton.jit
def to_e4m3(x, NATIVE: tl.constexpr):
    """float32 -> codes uint8: nearest value, ties to even, clamped to -448..448; NaN stays NaN."""
    clamped = tl.minimum(tl.maximum(x, -448.0), 448.0)
    if NATIVE:
        return tl.where(x != x, x, clamped).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = clamped.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        # 23 mantissa bits become 3, the exponent's bias 127 becomes 7.
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2^-6 values are multiples of 2^-9, the spacing of float32 from 2^14 on.
        small = (tl.abs(clamped) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(size < 0x3C800000, small, normal)
        return tl.where(x != x, 0x7F, code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def from_e4m3(codes, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """Codes uint8, or float8e4nv where NATIVE -> their exact values in DTYPE: "bf16", "fp16" or
    "fp32"."""
    if NATIVE:
        value = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        if DTYPE == "fp32":
            return value
        elif DTYPE == "fp16":
            return value.to(tl.float16)
        else:
            return value.to(tl.bfloat16)
    elif DTYPE == "bf16":
        return tl.inline_asm_elementwise(TO_BF16, "=r,=r,r", [codes], tl.bfloat16, True, 4)
    elif DTYPE == "fp16":
        return tl.inline_asm_elementwise(TO_FP16, "=r,=r,r", [codes], tl.float16, True, 4)
    else:
        bits = codes.to(tl.uint32)
        # As the top of a float32 the value is 2^120 too small, subnormals included.
        value = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
        top = value.to(tl.uint32, bitcast=True) | ((bits & 0x80) << 24)
        return tl.where((bits & 0x7F) == 0x7F, 0x7FC00000, top).to(tl.float32, bitcast=True)
