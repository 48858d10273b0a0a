"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): rounding a layer so that its errors cancel.

Columns are rounded one after the other; what rounding one of them got wrong is taken back in those
still to come, by the inverse of H = sum x x^T over all calibration tokens. The grid (scale and zero
point of each group) is fixed beforehand on the original weights, so that columns may be taken in
the order of their activations, the most active first, and still lie in groups of neighbours: no
index of groups is needed at run time. Compressed-tensors calls this ordering "weight".
"""

from __future__ import annotations

import torch

from smelt.runtime.errors import SmeltError

from .formats import Quantized, grid

# Columns whose errors are taken back in one product.
BLOCK = 128
# Added to H's diagonal, as a share of its mean; ten times as much when H is still singular.
DAMPING = 0.01
_MOST_DAMPING = 1.0


def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    groups: int,
    bits: int,
    layer: str,
    clip: torch.Tensor | None = None,
    damping: float = DAMPING,
) -> Quantized:
    """Round weight [N, K] by the layer's inputs: hessian float32 [K, K] is the sum of x x^T.

    groups: scales a row. clip: uint8 [N, groups]. A feature that calibration never saw active is
    rounded to nearest. Raises SmeltError naming the layer when H cannot be inverted.
    """
    scales, zeros = grid(weight, groups, bits, clip)
    size = weight.shape[1] // groups
    wide = scales.float().repeat_interleave(size, 1)
    offset = zeros.repeat_interleave(size, 1)

    order = hessian.diagonal().argsort(descending=True, stable=True)
    inverse = _inverse_factor(hessian[order][:, order], layer, damping)
    w = weight.float()[:, order]
    wide, offset = wide[:, order], offset[:, order]
    q = torch.empty_like(w)
    for start in range(0, w.shape[1], BLOCK):
        stop = min(start + BLOCK, w.shape[1])
        errors = torch.empty_like(w[:, start:stop])
        for i in range(start, stop):
            value = (torch.round(w[:, i] / wide[:, i]) + offset[:, i]).clamp(0, 2**bits - 1)
            q[:, i] = value
            lost = (w[:, i] - (value - offset[:, i]) * wide[:, i]) / inverse[i, i]
            w[:, i + 1 : stop] -= lost[:, None] * inverse[i, i + 1 : stop]
            errors[:, i - start] = lost
        w[:, stop:] -= errors @ inverse[start:stop, stop:]
    result = torch.empty_like(q, dtype=torch.uint8)
    result[:, order] = q.to(torch.uint8)
    return Quantized(result, scales, zeros.to(torch.uint8))


def _inverse_factor(hessian: torch.Tensor, layer: str, damping: float) -> torch.Tensor:
    """Upper U with U^T U = (H + damping)^-1; features that were never active count for themselves.

    In float64: H of correlated activations is nearly singular.
    """
    h = hessian.double()
    silent = h.diagonal() <= 0
    h[silent, silent] = 1.0
    mean = h.diagonal()[~silent].mean() if (~silent).any() else h.new_ones(())
    while damping <= _MOST_DAMPING:
        damped = h + torch.eye(len(h), dtype=h.dtype) * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and torch.isfinite(inverse).all():
                return inverse.float()
        damping *= 10
    raise SmeltError(
        f"{layer}: the activations seen in calibration give no usable Hessian; "
        "more calibration text (--calib-samples) or awq may help"
    )


def error_of(difference: torch.Tensor, hessian: torch.Tensor) -> float:
    """sum ||d x||^2 over all calibration tokens: difference [N, K] of the weights."""
    return float(((difference @ hessian) * difference).sum())
