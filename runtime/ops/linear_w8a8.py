"""Linear layers of int8 weights times int8 activations: integer products, one scale an output row.

qweight int8 [N, K] with values -127..127; scales float32 [N]; weight = qweight * scale. The input
is quantized inside the operator, symmetrically and to -127..127 like the weight:

dynamic   scale = max|row| / 127 for every token;
static    one scale for the whole tensor, found by calibration; larger values are clamped.

The sum over K runs over integers and is exact, so every implementation gives the same bits:
y = float(sum) * (x_scale * scales) + bias, in float32, rounded once to x's dtype. A row of x that
holds NaN or infinity gives NaN.

The blocked layout serves instructions that multiply four neighbouring bytes: packed int8
[ceil(N/16), ceil(K/4), 16, 4], entry [n, k, i, j] is q[16n + i, 4k + j]; zero beyond N and K.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .library import operator

LANES = 16
# 127 * 127 * MAX_K stays below 2^31.
MAX_K = 1 << 17


def usable_scale(largest: torch.Tensor, limit: float) -> torch.Tensor:
    """largest / limit, and 1 where all values are zero (or too small for a scale), in float32."""
    scale = largest.float() / limit
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def quantize_rows(
    x: torch.Tensor, input_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] -> (whole numbers -127..127 in float32 [..., K], scale float32 [..., 1]).

    input_scale float32 [1] is used for every row, None takes each row's own.
    """
    wide = x.float()
    if input_scale is None:
        scale = usable_scale(wide.abs().amax(-1, keepdim=True), 127.0)
    else:
        scale = input_scale.expand(*wide.shape[:-1], 1)
    scale = torch.where(torch.isfinite(wide).all(-1, keepdim=True), scale, float("nan"))
    return torch.round(wide / scale).clamp(-127, 127), scale


def block_w8a8(qweight: torch.Tensor) -> torch.Tensor:
    """int8 [N, K] -> the blocked layout."""
    n, k = qweight.shape
    padded = F.pad(qweight, (0, -k % 4, 0, -n % LANES))
    return padded.unflatten(0, (-1, LANES)).unflatten(2, (-1, 4)).transpose(1, 2).contiguous()


def unblock_w8a8(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """The inverse of `block_w8a8`."""
    return packed.transpose(1, 2).flatten(2, 3).flatten(0, 1)[:n, :k].contiguous()


def _rows(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], scales.shape[0])


@operator(
    "linear_w8a8(Tensor x, Tensor qweight, Tensor scales, Tensor? input_scale, Tensor? bias) "
    "-> Tensor",
    _rows,
)
def linear_w8a8(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x [..., K] of any floating dtype, quantized, times int8 weights -> [..., N] in x's dtype.

    input_scale: float32 [1] for static activations, None for one scale a token.
    """
    q, scale = quantize_rows(x, input_scale)
    # Sums of products of whole numbers are exact in float64.
    total = F.linear(q.double(), qweight.double()).float()
    y = total * (scale * scales)
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


@operator(
    "linear_w8a8_blocked(Tensor x, Tensor packed, Tensor scales, Tensor? input_scale, "
    "Tensor? bias) -> Tensor",
    _rows,
)
def linear_w8a8_blocked(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`linear_w8a8` over the blocked layout."""
    qweight = unblock_w8a8(packed, scales.shape[0], x.shape[-1])
    return linear_w8a8(x, qweight, scales, input_scale, bias)
