"""Linear layers of e4m3 activations times e4m3 weights.

The reference is ops/linear_fp8.py, its canonical weights are read as they are. Capability 8.9 and
later multiply e4m3 on tensor cores; before that both operands are widened to bfloat16 in registers,
which is exact, and multiplied as such. See linear_tiles.py for the loops and Hopper's precision.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.library import triton_op

from .launch import FEW_ROWS, SOME_ROWS, Variant, cdiv
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

TABLE = "linear_fp8"


def check_block(block: int) -> None:
    """Raises ValueError for blocks of weight scales that tiles cannot be cut into."""
    if block % 32:
        raise ValueError(f"block is {block}: the GPU kernels take 0 and multiples of 32")


def _linear(
    q: torch.Tensor,
    x_scale: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    after: Finish,
    block: int,
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_block(block)
    width, k = qweight.shape
    linear = Linear("e4m3", rows, width // 2 if after.gate else width, k, block)
    return launch_linear(TABLE, linear, after, q, x_scale, qweight, scales)


@triton_op("smelt::linear_fp8_triton", mutates_args=())
def linear_fp8(
    q: torch.Tensor,
    x_scale: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: str,
    block: int,
    dtype: str,
    rows: int,
) -> torch.Tensor:
    """q float8_e4m3fn [..., K] times qweight float8_e4m3fn [N, K] -> [..., N] in dtype.

    block 0: scales float32 [N, 1], x_scale float32 [..., 1]. block B: scales [ceil(N/B),
    ceil(K/B)], x_scale [..., ceil(K/B)], or [..., 1] for a token or a static scale. gate, residual,
    dtype and rows: as for linear_w8a8_triton.
    """
    after = Finish(gate, bias, residual, dtype)
    return _linear(q, x_scale, qweight, scales, after, block, rows)[0]


@triton_op("smelt::linear_fp8_requantized_triton", mutates_args=())
def linear_fp8_requantized(
    q: torch.Tensor,
    x_scale: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: str,
    output_scale: torch.Tensor | None,
    output_block: int,
    block: int,
    dtype: str,
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear_fp8`, rounded to dtype, quantized for the next linear -> (e4m3 [..., N], scale).

    output_scale: float32 [1], the next linear's static scale, which is then returned as [..., 1].
    None: every output_block features of a token, a power of two from 16 to 256, get a scale of
    their own, [..., ceil(N/output_block)], inside one tile. One scale a token would need the
    maximum of a whole row of the output, of which a tile holds a part: there is no such form.

    NaN and infinity become e4m3's NaN, and the scale of their block NaN.
    """
    after = Finish(gate, bias, residual, dtype, "e4m3", output_scale, output_block)
    out, out_scale = _linear(q, x_scale, qweight, scales, after, block, rows)
    if output_scale is not None:
        out_scale = output_scale.expand(*q.shape[:-1], 1).clone()
    return out, out_scale


def cost(rows: int, n: int, k: int, block: int = 0, gated: bool = False, itemsize: int = 2) -> Cost:
    """Of one launch for `rows` tokens, n outputs (a gate's weight has twice as many rows)."""
    width = 2 * n if gated else n
    groups = cdiv(k, block) if block else 1
    scales = rows * groups + (cdiv(width, block) * groups if block else width)
    moved = rows * k + width * k + 4 * scales + rows * n * itemsize
    return Cost(moved, 2 * rows * width * k, "fp8")


def candidates(shape: str, capability: int) -> list[Config]:
    """What `smelt tune` times for a shape class of tuned/linear_fp8.json."""
    return linear_candidates("e4m3", shape, capability)


def variants(capability: int) -> Iterator[Variant]:
    """What `make kernels` compiles."""
    plain, gated = Finish("", None, None, "bf16"), Finish("silu", None, None, "bf16")
    static = Finish("silu", None, None, "bf16", "e4m3", torch.ones(1))
    blocks = Finish("silu", None, None, "bf16", "e4m3", None, 128)
    for label, rows, n, k, block, after in (
        ("rows", FEW_ROWS, 4096, 4096, 0, plain),
        ("rows-gated", FEW_ROWS, 14336, 4096, 0, gated),
        ("block128", FEW_ROWS, 4096, 4096, 128, plain),
        ("rows", SOME_ROWS, 4096, 4096, 0, plain),
        ("rows-gated", SOME_ROWS, 14336, 4096, 0, gated),
        ("block128", SOME_ROWS, 4096, 4096, 128, plain),
        ("rows", 0, 4096, 14336, 0, plain),
        ("rows-gated", 0, 14336, 4096, 0, gated),
        ("rows-gated-e4m3", 0, 14336, 4096, 0, static),
        ("block128", 0, 4096, 14336, 128, plain),
        ("block128-gated", 0, 14336, 4096, 128, gated),
        ("block128-gated-e4m3", 0, 14336, 4096, 128, blocks),
    ):
        linear = Linear("e4m3", rows, n, k, block)
        yield linear_variant(TABLE, label, linear, after, capability, residual=not after.gate)
    yield sum_variant("e4m3", plain, capability)
