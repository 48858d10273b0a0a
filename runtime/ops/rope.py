"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) applied to packed heads."""

from __future__ import annotations

import torch

from .library import operator


def _same(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@operator("rope(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor", _same)
def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x [T, H, D], cos and sin [T, D'] with D' <= D -> x with its first D' features rotated.

    interleaved: pairs are (0, 1), (2, 3), ... (GPT-J, Cohere); otherwise feature i pairs with
    i + D'/2 (GPT-NeoX, Llama). cos and sin already repeat each angle for both members of a pair.
    """
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if interleaved:
        swapped = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        first, second = turned[..., : width // 2], turned[..., width // 2 :]
        swapped = torch.cat((-second, first), -1)
    out = turned * cos[:, None, :] + swapped * sin[:, None, :]
    out = out.to(x.dtype)
    return torch.cat((out, rest), -1) if rest.shape[-1] else out
