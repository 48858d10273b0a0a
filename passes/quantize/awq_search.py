"""The two searches of AWQ (Lin et al. 2023, arXiv:2306.00978): channel scales, then clipping.

AWQ keeps no weight at 16 bits. It multiplies the columns of a weight that meet large activations
before rounding, so that their rounding error shrinks, and divides the input by the same factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .formats import CLIP_STEPS, fake_quantize, row_chunks
from .spec import Scheme

ALPHAS = tuple(i / 20 for i in range(20))
# A range is shrunk to no less than half.
MAX_CLIP = CLIP_STEPS // 2
_TINY = 1e-30


@dataclass(frozen=True)
class Scale:
    """The scale found for a group. factor float32 [P], a producer's channel each; alpha 0: ones."""

    alpha: float
    factor: torch.Tensor


def output_error(rows: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
    """||x d||^2 of every output: rows [R, K], difference [N, K] of the weights -> [N]."""
    return (rows @ difference.T).square().sum(0)


def channel_sizes(mean: torch.Tensor, columns: torch.Tensor, channels: int) -> torch.Tensor:
    """Mean |x| of each of a producer's channels, over the columns that read it; 0 for the others.

    mean [K], columns int64 [K] -> [channels]. With grouped heads several columns share a channel.
    """
    total = torch.zeros(channels).index_add_(0, columns, mean)
    count = torch.zeros(channels).index_add_(0, columns, torch.ones_like(mean))
    return total / count.clamp(min=1)


def weight_sizes(weights: Sequence[torch.Tensor], groups: int) -> torch.Tensor:
    """Mean |w| of each column relative to the largest of its group in each row: [N, K] -> [K]."""
    total = torch.zeros(weights[0].shape[1])
    for weight in weights:
        for w in row_chunks(weight):
            parts = w.abs().unflatten(1, (groups, -1))
            total += (parts / parts.amax(-1, keepdim=True).clamp(min=_TINY)).flatten(1).sum(0)
    return total / sum(weight.shape[0] for weight in weights)


def factor_for(
    sizes: torch.Tensor, alpha: float, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """sizes^alpha, divided by the geometric mean of its extremes; 1 for channels nothing reads.

    sizes [P] of the activations, and of the weights where they count, too: sizes^alpha /
    weights^(1 - alpha), as in the authors' code -> float32 [P]. A channel that is (nearly) never
    active counts as 1e-4 of the largest, or its factor would grow without bound.
    """
    read = sizes > 0
    if not read.any() or alpha == 0:
        return torch.ones_like(sizes)
    factor = sizes.clamp(min=float(sizes.max()) * 1e-4).pow(alpha)
    if weights is not None:
        factor = factor / weights.clamp(min=float(weights.max()) * 1e-4).pow(1 - alpha)
    used = factor[read]
    return torch.where(read, factor / (used.max() * used.min()).sqrt(), torch.ones_like(factor))


def search_scale(
    weights: Sequence[torch.Tensor],
    schemes: Sequence[Scheme],
    mean: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    channels: int,
) -> Scale:
    """The factor of the smallest output error, summed over the group's linears.

    weights: [N, K] each; mean [K]; rows [R, K]; columns int64 [K] into the producer's channels.
    The error is ||W x - Q(W s) (x / s)||^2 on `rows`; tried are all ALPHAS, with and without the
    weights' own sizes.
    """
    sizes = channel_sizes(mean, columns, channels)
    own = weight_sizes(weights, schemes[0].groups(weights[0].shape[1]))
    own = channel_sizes(own, columns, channels)
    best = Scale(0.0, torch.ones(channels))
    lowest = float("inf")
    for alpha in ALPHAS:
        for beside in (None, own) if alpha else (None,):
            factor = factor_for(sizes, alpha, beside)
            error = _group_error(weights, schemes, rows, factor[columns])
            if error < lowest:
                lowest = error
                best = Scale(alpha, factor)
    return best


def _group_error(
    weights: Sequence[torch.Tensor],
    schemes: Sequence[Scheme],
    rows: torch.Tensor,
    s: torch.Tensor,
) -> float:
    total = 0.0
    for weight, scheme in zip(weights, schemes, strict=True):
        for w in row_chunks(weight):
            lost = fake_quantize(w * s, scheme).div_(s).sub_(w)
            total += float(output_error(rows, lost).sum())
    return total


def search_clip(
    weight: torch.Tensor, scheme: Scheme, rows: torch.Tensor, gram: torch.Tensor | None
) -> torch.Tensor:
    """How far to shrink the range of each group of each row: uint8 [N, G], in CLIP_STEPS.

    weight float32 [N, K], rows [R, K] and gram [G, g, g] (sums of x x^T over all tokens, or None)
    after scaling. Each group is searched by its own share of the output error; a row whose whole
    error does not shrink by it is left unclipped.
    """
    groups = scheme.groups(weight.shape[1])
    x = rows.unflatten(1, (groups, -1)).transpose(0, 1).contiguous()  # [G, R, g]
    clip = _clip_rows(weight, scheme, x, gram)
    plain = output_error(rows, fake_quantize(weight, scheme).sub_(weight))
    clipped = output_error(rows, fake_quantize(weight, scheme, clip).sub_(weight))
    clip[clipped >= plain] = 0
    return clip


def _clip_rows(
    weight: torch.Tensor, scheme: Scheme, x: torch.Tensor, gram: torch.Tensor | None
) -> torch.Tensor:
    """The best step of each group. x [G, R, g] sampled tokens; gram [G, g, g] over all, if kept."""
    groups = x.shape[0]
    best = torch.zeros(weight.shape[0], groups, dtype=torch.uint8)
    lowest = torch.full((weight.shape[0], groups), float("inf"))
    for step in range(MAX_CLIP + 1):
        clip = torch.full_like(best, step)
        lost = fake_quantize(weight, scheme, clip).sub_(weight)
        difference = lost.unflatten(1, (groups, -1))
        d = difference.transpose(0, 1)  # [G, n, g]
        if gram is not None:
            error = ((d @ gram) * d).sum(-1).T
        else:
            error = (d @ x.transpose(1, 2)).square().sum(-1).T
        better = error < lowest
        lowest = torch.where(better, error, lowest)
        best[better] = step
    return best
