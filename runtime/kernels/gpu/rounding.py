"""Conversions between float32 and 16-bit floats that are right in triton's interpreter as well.

The interpreter (triton 3.9) rounds float32 to bfloat16 half up and drops the carry into the
exponent (1.9999 becomes 1), and misreads bfloat16 subnormals. There the bits are moved by integer
arithmetic; on a device these are the plain conversions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# The dtypes of activations, as constants of kernels.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@triton.jit
def wide(x, WIDEN: tl.constexpr):
    """bfloat16, float16 or float32 -> float32. WIDEN: see launch.py."""
    if WIDEN and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x, DTYPE: tl.constexpr, WIDEN: tl.constexpr):
    """float32 -> DTYPE, "bf16", "fp16" or "fp32", to the nearest value, ties to even."""
    if DTYPE == "fp32":
        return x
    elif DTYPE == "fp16":
        return x.to(tl.float16)
    elif WIDEN:
        bits = x.to(tl.uint32, bitcast=True)
        # 64 bits: the interpreter checks the sum for overflow.
        rounded = (bits.to(tl.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x != x, 0x7FC0, rounded).to(tl.uint16)
        return rounded.to(tl.bfloat16, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def nearest(x):
    """The nearest whole number, ties to even, of float32 within -2^22..2^22."""
    # Above 2^23 the spacing of float32 is 1: the addition rounds.
    return (x + 12582912.0) - 12582912.0
