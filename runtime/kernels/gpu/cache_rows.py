"""How a kernel writes rows of features into the formats of the paged cache (ops/cache_format.py).

Bytes equal those of `quantize_rows` on the CPU: quotients are correctly rounded, where torch on
CUDA multiplies by the reciprocal of a Python number and Triton's own division is approximate.
"""

from __future__ import annotations

import triton
import triton.language as tl

from smelt.runtime.ops.cache_format import LARGEST

from .e4m3 import to_e4m3
from .rounding import narrow

_LARGEST = tl.constexpr(LARGEST)
_NAN = tl.constexpr(0x7E00)  # of float16, as torch writes it


@triton.jit
def _store_half(at, value, mask):
    """Two bytes of float16 bits, int32 [ROWS], to pointers that may be odd."""
    tl.store(at, (value & 255).to(tl.uint8), mask=mask)
    tl.store(at + 1, (value >> 8).to(tl.uint8), mask=mask)


@triton.jit
def _bits(x, fits):
    """float16 [ROWS] -> its bits, int32; NaN where a row does not fit."""
    return tl.where(fits, x.to(tl.uint16, bitcast=True).to(tl.int32), _NAN)


@triton.jit
def write_rows(
    x,
    at,
    live,
    D: tl.constexpr,
    FORMAT: tl.constexpr,
    CACHE_DTYPE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NATIVE: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Rows x, float32 [ROWS, BLOCK_D], to the cache's rows at pointers `at` [ROWS]: the formulas of
    cache_format.py."""
    feature = tl.arange(0, BLOCK_D)
    real = (feature < D)[None, :]
    if FORMAT == "auto":
        value = narrow(x, CACHE_DTYPE, WIDEN)
        tl.store(at[:, None] + feature[None, :], value, mask=live[:, None] & real)
    else:
        fine = tl.abs(x) <= _LARGEST  # False for NaN
        fits = tl.min(tl.where(real, fine, True).to(tl.int32), 1) > 0
        x = tl.where(fine, x, 0.0)
        # Adding 0 makes 0 of -0, as in the reference.
        low = tl.min(tl.where(real, x, float("inf")), 1) + 0.0
        high = tl.max(tl.where(real, x, float("-inf")), 1) + 0.0
        if FORMAT == "fp8":
            scale = tl.div_rn(tl.maximum(0.0 - low, high), 448.0).to(tl.float16)
        else:
            zero = low.to(tl.float16)
            x -= zero.to(tl.float32)[:, None]
            TOP: tl.constexpr = 255.0 if FORMAT == "int8" else 15.0
            span = tl.maximum(high - zero.to(tl.float32), 0.0)
            scale = tl.div_rn(span, TOP).to(tl.float16)
        step = scale.to(tl.float32)
        usable = fits & (step > 0)
        y = tl.div_rn(x, tl.where(usable, step, 1.0)[:, None])
        y = tl.where(usable[:, None] & real, y, 0.0)
        BYTES: tl.constexpr = (D + 1) // 2 if FORMAT == "int4" else D
        if FORMAT == "fp8":
            tl.store(at[:, None] + feature[None, :], to_e4m3(y, NATIVE), mask=live[:, None] & real)
        else:
            # From 2^23 on the spacing of float32 is 1: the sum is rounded, halves to even.
            y = tl.minimum(tl.maximum(y, 0.0), TOP) + 8388608.0
            q = y.to(tl.int32, bitcast=True) & 255
            if FORMAT == "int4":
                even, odd = tl.split(tl.reshape(q, [x.shape[0], BLOCK_D // 2, 2]))
                place = tl.arange(0, BLOCK_D // 2)
                mask = live[:, None] & (place < BYTES)[None, :]
                tl.store(at[:, None] + place[None, :], (even | (odd << 4)).to(tl.uint8), mask=mask)
            else:
                tl.store(at[:, None] + feature[None, :], q.to(tl.uint8), mask=live[:, None] & real)
            _store_half(at + BYTES + 2, _bits(zero, fits), live)
        _store_half(at + BYTES, _bits(scale, fits), live)
