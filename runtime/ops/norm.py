"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

import torch

from .library import operator


def _same(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x)


@operator("rms_norm(Tensor x, Tensor? weight, float eps, float offset) -> Tensor", _same)
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float
) -> torch.Tensor:
    """x [..., K] -> x / rms(x) * (offset + weight), in x's dtype; computed in float32.

    offset is 1 where a checkpoint stores the weight minus one (Gemma). weight: [K] or None.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        scale = weight.float() + offset if offset else weight.float()
        normed = normed * scale
    return normed.to(x.dtype)
