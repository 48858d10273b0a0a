"""Linear layers with quantized weights (`packing.py` has their forms), and the dense one.

linear_int4, linear_int3 and linear_int2 have one signature, and so have their blocked variants.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from .library import operator
from .packing import dequantize, dequantize_int8, unblock, unblock_int8

# Bits of the formats with a zero point for each group.
GROUPED_BITS = (4, 3, 2)

GroupedLinear = Callable[..., torch.Tensor]


def _rows(x: torch.Tensor, qweight: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


def _n_rows(x: torch.Tensor, *args: object) -> torch.Tensor:
    n = args[-1]
    assert isinstance(n, int | torch.SymInt)
    return x.new_empty(*x.shape[:-1], n)


def _grouped(bits: int) -> tuple[GroupedLinear, GroupedLinear]:
    """Define smelt::linear_int<bits> and its blocked variant; returns the references."""

    def linear_grouped(
        x: torch.Tensor,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """x [..., K] times canonical weights -> [..., N] in x's dtype."""
        weight = dequantize(qweight, scales, zeros, bits, x.shape[-1])
        return F.linear(x, weight.to(x.dtype), bias)

    def linear_blocked(
        x: torch.Tensor,
        packed: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        bias: torch.Tensor | None,
        n: int,
    ) -> torch.Tensor:
        """x [..., K] times weights in the blocked layout -> [..., N] in x's dtype."""
        return linear_grouped(x, *unblock(packed, scales, zeros, bits, n, x.shape[-1]), bias)

    name = f"linear_int{bits}"
    operator(
        f"{name}(Tensor x, Tensor qweight, Tensor scales, Tensor zeros, Tensor? bias) -> Tensor",
        _rows,
    )(linear_grouped)
    operator(
        f"{name}_blocked(Tensor x, Tensor packed, Tensor scales, Tensor zeros, Tensor? bias, "
        "int n) -> Tensor",
        _n_rows,
    )(linear_blocked)
    return linear_grouped, linear_blocked


linear_int4, linear_int4_blocked = _grouped(4)
linear_int3, linear_int3_blocked = _grouped(3)
linear_int2, linear_int2_blocked = _grouped(2)


@operator(
    "linear_int8(Tensor x, Tensor qweight, Tensor scales, Tensor? bias) -> Tensor",
    _rows,
)
def linear_int8(
    x: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [..., K] times canonical int8 weights -> [..., N] in x's dtype."""
    return F.linear(x, dequantize_int8(qweight, scales).to(x.dtype), bias)


@operator(
    "linear_int8_blocked(Tensor x, Tensor packed, Tensor scales, Tensor? bias, int n) -> Tensor",
    _n_rows,
)
def linear_int8_blocked(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
) -> torch.Tensor:
    """x [..., K] times int8 weights in the blocked layout -> [..., N] in x's dtype."""
    return linear_int8(x, *unblock_int8(packed, scales, n), bias)


@operator("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _rows)
def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] times weight [N, K] -> [..., N]: what aten.linear does, named so that a kernel
    made for few rows can stand in for it (torch's own bfloat16 product repacks the weight)."""
    return F.linear(x, weight, bias)
