"""The factors of SmoothQuant (Xiao et al. 2022, arXiv:2211.10438) and the search for alpha.

Activation outliers move into weights: x / s and W * s with s_j = max|x_j|^alpha / max|w_j|^(1 -
alpha) for every input channel j. The larger alpha, the more is moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from smelt.runtime.ops.linear_w8a8 import usable_scale

from .awq_search import Scale, factor_for
from .formats import row_chunks
from .w8a8 import product

# 0 is tried first and moves nothing.
ALPHAS = (0.0, *(i / 20 for i in range(4, 20)))


def largest_of_channels(values: torch.Tensor, columns: torch.Tensor, channels: int) -> torch.Tensor:
    """The largest of values [K] >= 0 over the columns that read each channel: [channels].

    columns int64 [K]. With grouped heads several columns share a channel; unread ones get 0.
    """
    return torch.zeros(channels).scatter_reduce_(0, columns, values, "amax")


def weight_largest(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """max|w_j| of every column over all rows of all `weights` [N, K] -> float32 [K]."""
    chunks = (w for weight in weights for w in row_chunks(weight))
    return torch.stack([w.abs().amax(0) for w in chunks]).amax(0)


def smooth_factor(activations: torch.Tensor, weights: torch.Tensor, alpha: float) -> torch.Tensor:
    """activations^alpha / weights^(1 - alpha), both float32 [P] of largest values -> float32 [P].

    Times a constant, which cancels between x / s and W * s. All ones for alpha 0, where the
    formula would make the *weights'* columns even: smoothing means moving from the activations.
    """
    return factor_for(activations, alpha, weights)


def input_scale(largest: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """The static scale of an input with max|x_j| = largest [K], divided by factor: float32 [1]."""
    divided = largest if factor is None else largest / factor
    return usable_scale(divided.amax().reshape(1), 127.0)


@dataclass(frozen=True)
class Inputs:
    """What is known of a group's input: largest [K] over all tokens, rows float32 [R, K] of some.

    static: whether it gets one scale for all tokens.
    """

    largest: torch.Tensor
    rows: torch.Tensor
    static: bool

    def scale(self, factor: torch.Tensor | None) -> torch.Tensor | None:
        """The static input scale with `factor` [K] divided out, None for dynamic."""
        return input_scale(self.largest, factor) if self.static else None


def output_error(
    weights: Sequence[torch.Tensor], inputs: Inputs, factor: torch.Tensor | None
) -> list[float]:
    """||y' - y||^2 / ||y||^2 of each linear on the sampled rows, both sides quantized."""
    errors = []
    for weight in weights:
        lost = size = 0.0
        for w in row_chunks(weight):
            exact = inputs.rows @ w.T
            found = product(w, factor, inputs.scale(factor))(inputs.rows, None)
            size += float(exact.square().sum())
            lost += float(found.sub_(exact).square().sum())
        errors.append(lost / max(size, 1e-30))
    return errors


def search_alpha(
    weights: Sequence[torch.Tensor],
    inputs: Inputs,
    columns: torch.Tensor,
    channels: int,
    alphas: Sequence[float] = ALPHAS,
) -> Scale:
    """The factor, of those of `alphas`, with the smallest output error summed over the linears.

    weights: [N, K] each, over one input; columns int64 [K] into the producer's channels.
    """
    activations = largest_of_channels(inputs.largest, columns, channels)
    own = largest_of_channels(weight_largest(weights), columns, channels)
    tried = [Scale(alpha, smooth_factor(activations, own, alpha)) for alpha in alphas]
    errors = torch.zeros(len(tried), dtype=torch.float64)
    for w in (w for weight in weights for w in row_chunks(weight)):
        exact = inputs.rows @ w.T
        for i, scale in enumerate(tried):
            s = scale.factor[columns]
            found = product(w, s, inputs.scale(s))(inputs.rows, None)
            errors[i] += found.sub_(exact).square().sum()
    return tried[int(errors.argmin())]
