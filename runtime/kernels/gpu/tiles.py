"""Pieces that several kernels are made of."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, WIDEN: tl.constexpr):
    """a [M, K] times b [K, N] onto acc, float32, whose products are exact. WIDEN: see launch.py."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def activate(x, KIND: tl.constexpr):
    """The activations of ops/gated_activation.py, on float32."""
    if KIND == "silu":
        return x * tl.sigmoid(x)
    if KIND == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    # tanh(u) = 2 sigmoid(2u) - 1
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x * tl.sigmoid(2.0 * u)
