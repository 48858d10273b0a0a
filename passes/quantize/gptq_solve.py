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
    """What a layer's rows share: order int64 [K], the columns by activation; inverse float32
    [K, K], the upper factor of the inverse Hessian in that order; added float32 [K], the damping,
    in the columns' own order."""

    order: torch.Tensor
    inverse: torch.Tensor
    added: torch.Tensor


def prepare(hessian: torch.Tensor, layer: str, damping: float = DAMPING) -> Prepared:
    """hessian float32 [K, K]: the sum of x x^T over a layer's inputs.

    A feature that calibration never saw active is rounded to nearest. Raises SmeltError naming the
    layer when H cannot be inverted.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    while damping <= _MOST_DAMPING:
        added = _damping(hessian.diagonal(), damping)
        inverse = _inverse_factor(_damped(hessian, order, added))
        if inverse is not None:
            return Prepared(order, inverse, added)
        damping *= 10
    raise SmeltError(
        f"{layer}: the activations seen in calibration give no usable Hessian; "
        "more calibration text (--calib-samples) or awq may help"
    )


def _damping(diagonal: torch.Tensor, share: float) -> torch.Tensor:
    """What is added to H's diagonal; features that were never active count for themselves."""
    silent = diagonal <= 0
    mean = diagonal[~silent].mean() if (~silent).any() else diagonal.new_ones(())
    return silent.float() + share * mean


def _damped(hessian: torch.Tensor, order: torch.Tensor, added: torch.Tensor) -> list[torch.Tensor]:
    """[H + damping, float64 [K, K]] in the order of the columns. In a list, which its reader
    empties: K may be large."""
    h = hessian[order[:, None], order].double()
    h.diagonal().add_(added[order])
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
    order, inverse, _ = prepared
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


def nearest(missing: torch.Tensor, prepared: Prepared, tokens: int) -> torch.Tensor:
    """The change of a weight that makes up best for outputs gone missing.

    missing float32 [N, K]: sum of d x^T, what each output lacks times the input. By least squares
    with the damping, (sum d x^T) H^-1. That fits K numbers an output to `tokens` tokens, and part
    of what it finds is chance, the more the fewer tokens; so only tokens / (tokens + K) is taken.
    """
    order, inverse, _ = prepared
    found = torch.empty_like(missing)
    found[:, order] = missing[:, order] @ inverse.T @ inverse
    return found.mul_(tokens / (tokens + len(order)))


def errors_of(
    difference: torch.Tensor, hessian: torch.Tensor, added: torch.Tensor | None = None
) -> torch.Tensor:
    """sum (d x)^2 of each output over all calibration tokens: difference [N, K] -> float64 [N].

    added [K]: a damping of the Hessian that counts, too."""
    slope = difference @ hessian
    if added is not None:
        slope += difference * added
    return slope.mul_(difference).sum(1, dtype=torch.float64)
