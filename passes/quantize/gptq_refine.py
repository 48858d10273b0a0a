"""Refining a rounded layer: the scales, zero points and whole numbers of one group after the other.

GPTQ looks at every column once, on a grid that was fixed before. Afterwards the error of the layer
is a quadratic function of each thing that is stored, with all others left as they are. So going
through them, each is set to what is best now: a group's scale (least squares), its zero point (one
step up or down), each of its whole numbers (coordinate descent; Behdin et al. 2023, QuantEase,
arXiv:2309.01885). The error never rises; it ends where no single change would help.
"""

from __future__ import annotations

import torch

from .formats import Quantized
from .gptq_solve import Prepared

# Times that all groups are gone through.
SWEEPS = 2


def refine(
    found: Quantized,
    target: torch.Tensor,
    hessian: torch.Tensor,
    prepared: Prepared,
    bits: int,
    sweeps: int = SWEEPS,
) -> Quantized:
    """Bring `found` nearer to target float32 [N, K], any rows of a layer, as `hessian` float32
    [K, K] and the damping of `prepared` measure it."""
    assert found.zeros is not None
    q, scales, zeros = found.q.float(), found.scales.float(), found.zeros.float()
    lost = found.dequantize() - target
    slope = lost @ hessian
    slope += lost * prepared.added
    del lost
    size = target.shape[1] // scales.shape[1]
    for _ in range(sweeps):
        for g in range(scales.shape[1]):
            at = slice(g * size, (g + 1) * size)
            inner = hessian[at, at] + prepared.added[at].diag()
            group = _Group(q[:, at], scales[:, g], zeros[:, g], slope[:, at].clone(), inner, bits)
            changed = group.refine()
            slope.addmm_(changed, hessian[at])
            slope[:, at] += changed * prepared.added[at]
    return Quantized(q.to(torch.uint8), scales.to(torch.bfloat16), zeros.to(torch.uint8))


class _Group:
    """One group of every row. q [N, g], scale and zero [N]: changed in place; slope [N, g]: half
    the derivative of the error by the group's weights; inner [g, g]: its part of the Hessian."""

    def __init__(
        self,
        q: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        slope: torch.Tensor,
        inner: torch.Tensor,
        bits: int,
    ) -> None:
        self.q, self.scale, self.zero = q, scale, zero
        self.slope, self.inner, self.top = slope, inner, 2**bits - 1

    def weights(self) -> torch.Tensor:
        return (self.q - self.zero[:, None]) * self.scale[:, None]

    def refine(self) -> torch.Tensor:
        """How the group's weights changed, [N, g]."""
        before = self.weights()
        self._scale()
        for step in (-1.0, 1.0):
            self._zero(step)
        for j in range(self.q.shape[1]):
            self._column(j)
        return self.weights() - before

    def _scale(self) -> None:
        """The scale of the least error, rounded to bfloat16, in rows that gain by it."""
        steps = self.q - self.zero[:, None]
        reach = steps @ self.inner
        rise, bend = (self.slope * steps).sum(1), (reach * steps).sum(1)
        wanted = (self.scale - rise / bend.clamp(min=1e-30)).to(torch.bfloat16).float()
        change = wanted - self.scale
        better = (wanted > 0) & (change * (2 * rise + change * bend) < 0)
        change = torch.where(better, change, 0.0)
        # Not the sum, which float32 may round to another value than bfloat16 has.
        self.scale.copy_(torch.where(better, wanted, self.scale))
        self.slope += reach * change[:, None]

    def _zero(self, step: float) -> None:
        """The zero point moved by `step`, in rows that gain by it."""
        reach = self.inner.sum(0)
        change = -step * self.scale
        moved = self.zero + step
        better = change * (2 * self.slope.sum(1) + change * reach.sum()) < 0
        better &= (moved >= 0) & (moved <= self.top)
        self.zero.copy_(torch.where(better, moved, self.zero))
        self.slope += torch.where(better, change, 0.0)[:, None] * reach

    def _column(self, j: int) -> None:
        """The whole numbers of column j, all else as it is."""
        old = self.q[:, j].clone()
        best = old - self.slope[:, j] / (self.inner[j, j] * self.scale)
        self.q[:, j] = best.round_().clamp_(0, self.top)
        change = (self.q[:, j] - old) * self.scale
        self.slope += change[:, None] * self.inner[j]
