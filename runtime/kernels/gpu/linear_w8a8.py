"""Linear layers of int8 activations times int8 weights on integer tensor cores.

The reference is ops/linear_w8a8.py, its canonical weights are read as they are: qweight int8 [N, K]
with one scale an output row. Sums are int32 and exact, and what follows is the reference's order of
float32 operations: with at most a bias, results are the reference's bits. A gate or residual is
added before the one rounding, where separate operators would round twice.

Steps of few tokens read every weight byte once and are bound by that: 16-byte copies of three tiles
are under way while one is multiplied, and K is split where the layer has few outputs. Steps of many
are bound by the tensor cores, and on Hopper by the L2 cache that feeds them: tiles of 128 x 256 are
the largest whose sums fit in the registers. (triton 3.9 waits for every int8 wgmma before it issues
the next copies; those already issued keep arriving.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.library import triton_op

from .launch import FEW_ROWS, SOME_ROWS, Variant
from .linear_launch import (
    Finish,
    Linear,
    launch_linear,
    linear_candidates,
    linear_variant,
    sum_variant,
)
from .roofline import Cost
from .tuning import Config

TABLE = "linear_w8a8"


def _linear(
    q: torch.Tensor,
    x_scale: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    after: Finish,
    rows: int,
) -> torch.Tensor:
    width, k = qweight.shape
    linear = Linear("int8", rows, width // 2 if after.gate else width, k)
    return launch_linear(TABLE, linear, after, q, x_scale, qweight, scales)[0]


@triton_op("smelt::linear_w8a8_triton", mutates_args=())
def linear_w8a8(
    q: torch.Tensor,
    x_scale: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: str,
    dtype: str,
    rows: int,
) -> torch.Tensor:
    """q int8 [..., K] with x_scale float32 [..., 1] times qweight -> [..., N] in dtype.

    gate: "" or an activation; then the weight has 2I rows and the result is act(first half) *
    second half, [..., I]. residual [..., N] is added in float32. dtype: "bf16", "fp16" or "fp32".
    rows: what a step's tokens are bounded by, 0 for no bound.
    """
    return _linear(q, x_scale, qweight, scales, Finish(gate, bias, residual, dtype), rows)


@triton_op("smelt::linear_w8a8_requantized_triton", mutates_args=())
def linear_w8a8_requantized(
    q: torch.Tensor,
    x_scale: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: str,
    output_scale: torch.Tensor,
    dtype: str,
    rows: int,
) -> torch.Tensor:
    """`linear_w8a8`, rounded to dtype, quantized for the next linear -> int8 [..., N].

    output_scale: float32 [1], the next linear's static scale. One scale a token would need the
    maximum of a whole row of the output, of which a tile holds a part: there is no such form.

    int8 has no NaN. A row that x_scale makes NaN becomes zeros, and the next linear's x_scale must
    carry it: output_scale + 0 * x_scale.
    """
    after = Finish(gate, bias, residual, dtype, "int8", output_scale)
    return _linear(q, x_scale, qweight, scales, after, rows)


def cost(rows: int, n: int, k: int, gated: bool = False, itemsize: int = 2) -> Cost:
    """Of one launch for `rows` tokens, n outputs (a gate's weight has twice as many rows)."""
    width = 2 * n if gated else n
    moved = rows * (k + 4) + width * (k + 4) + rows * n * itemsize
    return Cost(moved, 2 * rows * width * k, "int8")


def candidates(shape: str, capability: int) -> list[Config]:
    """What `smelt tune` times for a shape class of tuned/linear_w8a8.json."""
    return linear_candidates("int8", shape, capability)


def variants(capability: int) -> Iterator[Variant]:
    """What `make kernels` compiles."""
    plain, gated = Finish("", None, None, "bf16"), Finish("silu", None, None, "bf16")
    static = Finish("silu", None, None, "bf16", "int8", torch.ones(1))
    for label, rows, n, k, after in (
        ("plain", FEW_ROWS, 4096, 4096, plain),
        ("plain", FEW_ROWS, 1024, 4096, plain),
        ("gated", FEW_ROWS, 14336, 4096, gated),
        ("plain", SOME_ROWS, 4096, 4096, plain),
        ("gated", SOME_ROWS, 14336, 4096, gated),
        ("plain", 0, 4096, 14336, plain),
        ("gated", 0, 14336, 4096, gated),
        ("gated-int8", 0, 14336, 4096, static),
    ):
        linear = Linear("int8", rows, n, k)
        yield linear_variant(TABLE, label, linear, after, capability, residual=not after.gate)
    yield sum_variant("int8", plain, capability)
