"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): rounding a layer so that its errors cancel.

Columns are rounded one after the other; what rounding one of them got wrong is taken back in those
still to come, by the inverse of H = sum x x^T over all calibration tokens. The grid (scale and zero
point of each group) is fixed beforehand on the original weights, so that columns may be taken in
the order of their activations, the most active first, and still lie in groups of neighbours: no
index of groups is needed at run time. Compressed-tensors calls this ordering "weight".
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from smelt.runtime.errors import SmeltError

from .formats import Quantized, grid

# Columns whose errors are taken back in one product.
BLOCK = 128
# Added to H's diagonal, as a share of its mean; ten times as much when H is still singular.
DAMPING = 0.01
_MOST_DAMPING = 1.0


class Prepared(NamedTuple):
    """What a layer's rows share: order int64 [K], the columns by activation, and inverse float32
    [K, K], the upper factor of the inverse Hessian in that order."""

    order: torch.Tensor
    inverse: torch.Tensor


def prepare(hessian: torch.Tensor, layer: str, damping: float = DAMPING) -> Prepared:
    """hessian float32 [K, K]: the sum of x x^T over a layer's inputs.

    A feature that calibration never saw active is rounded to nearest. Raises SmeltError naming the
    layer when H cannot be inverted.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    while damping <= _MOST_DAMPING:
        inverse = _inverse_factor(_damped(hessian, order, damping))
        if inverse is not None:
            return Prepared(order, inverse)
        damping *= 10
    raise SmeltError(
        f"{layer}: the activations seen in calibration give no usable Hessian; "
        "more calibration text (--calib-samples) or awq may help"
    )


def _damped(hessian: torch.Tensor, order: torch.Tensor, damping: float) -> list[torch.Tensor]:
    """[H + damping, float64 [K, K]] in the order of the columns; features that were never active
    count for themselves. In a list, which its reader empties: K may be large."""
    h = hessian[order[:, None], order].double()
    diagonal = h.diagonal()
    silent = diagonal <= 0
    mean = diagonal[~silent].mean() if (~silent).any() else h.new_ones(())
    diagonal[silent] = 1.0
    diagonal += damping * mean
    return [h]


def _inverse_factor(h: list[torch.Tensor]) -> torch.Tensor | None:
    """Upper U with U^T U = H^-1, float32; None where there is none.

    In float64: H of correlated activations is nearly singular.
    """
    lower, failed = torch.linalg.cholesky_ex(h.pop())
    if failed:
        return None
    inverse = torch.cholesky_inverse(lower)
    del lower
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return None if failed or not torch.isfinite(upper).all() else upper.float()


def solve(
    weight: torch.Tensor,
    prepared: Prepared,
    groups: int,
    bits: int,
    clip: torch.Tensor | None = None,
) -> Quantized:
    """Round weight [N, K], any rows of a layer. groups: scales a row; clip: uint8 [N, groups]."""
    scales, zeros = grid(weight, groups, bits, clip)
    order, inverse = prepared
    group = order // (weight.shape[1] // groups)
    w = weight.float()[:, order]
    wide, offset = scales.float(), zeros
    q = torch.empty_like(w, dtype=torch.uint8)
    for start in range(0, w.shape[1], BLOCK):
        stop = min(start + BLOCK, w.shape[1])
        errors = torch.empty_like(w[:, start:stop])
        for i in range(start, stop):
            scale, zero = wide[:, group[i]], offset[:, group[i]]
            value = (torch.round(w[:, i] / scale) + zero).clamp(0, 2**bits - 1)
            q[:, i] = value
            lost = (w[:, i] - (value - zero) * scale) / inverse[i, i]
            w[:, i + 1 : stop] -= lost[:, None] * inverse[i, i + 1 : stop]
            errors[:, i - start] = lost
        w[:, stop:] -= errors @ inverse[start:stop, stop:]
    result = torch.empty_like(q)
    result[:, order] = q
    return Quantized(result, scales, zeros.to(torch.uint8))


def errors_of(difference: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """sum (d x)^2 of each output over all calibration tokens: difference [N, K] -> float64 [N]."""
    return ((difference @ hessian) * difference).sum(1, dtype=torch.float64)
