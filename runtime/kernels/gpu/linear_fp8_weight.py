"""Linear layers of 16-bit activations times e4m3 weights, which are widened in registers.

The reference is ops/linear_fp8.py with activations "none"; its canonical weights are read as they
are. Every e4m3 value is a bfloat16 and a float16 value, so widening rounds nothing, and products
run at the rate of 16-bit floats: what is saved is half the bytes of a weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.library import triton_op

from .launch import FEW_ROWS, SOME_ROWS, Variant, cdiv
from .linear_fp8 import check_block
from .linear_launch import (
    Finish,
    Linear,
    launch_linear,
    linear_candidates,
    linear_variant,
    sum_variant,
)
from .roofline import Cost
from .rounding import NAMES
from .tuning import Config

TABLE = "linear_fp8_weight"


@triton_op("smelt::linear_fp8_weight_triton", mutates_args=())
def linear_fp8_weight(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: str,
    block: int,
    rows: int,
) -> torch.Tensor:
    """x [..., K] of bfloat16, float16 or float32 times qweight float8_e4m3fn -> [..., N].

    scales and block: as for linear_fp8_triton. gate, residual and rows: as for linear_w8a8_triton.
    float32 is multiplied without tensor cores.
    """
    check_block(block)
    width, k = qweight.shape
    linear = Linear("weight", rows, width // 2 if gate else width, k, block)
    after = Finish(gate, bias, residual, NAMES[x.dtype])
    return launch_linear(TABLE, linear, after, x, None, qweight, scales)[0]


def cost(rows: int, n: int, k: int, block: int = 0, gated: bool = False, itemsize: int = 2) -> Cost:
    """Of one launch for `rows` tokens, n outputs (a gate's weight has twice as many rows)."""
    width = 2 * n if gated else n
    scales = cdiv(width, block) * cdiv(k, block) if block else width
    moved = width * k + 4 * scales + rows * (k + n) * itemsize
    return Cost(moved, 2 * rows * width * k)


def candidates(shape: str, capability: int) -> list[Config]:
    """What `smelt tune` times for a shape class of tuned/linear_fp8_weight.json."""
    return linear_candidates("weight", shape, capability)


def variants(capability: int) -> Iterator[Variant]:
    """What `make kernels` compiles."""
    plain, gated = Finish("", None, None, "bf16"), Finish("silu", None, None, "bf16")
    half = Finish("", None, None, "fp16")
    for label, rows, n, k, block, after in (
        ("rows", FEW_ROWS, 4096, 4096, 0, plain),
        ("rows-fp16", FEW_ROWS, 4096, 4096, 0, half),
        ("rows-gated", FEW_ROWS, 14336, 4096, 0, gated),
        ("block128", FEW_ROWS, 4096, 4096, 128, plain),
        ("block128", SOME_ROWS, 4096, 4096, 128, plain),
        ("rows-gated", SOME_ROWS, 14336, 4096, 0, gated),
        ("rows", 0, 4096, 14336, 0, plain),
        ("rows-fp16", 0, 4096, 14336, 0, half),
        ("rows-gated", 0, 14336, 4096, 0, gated),
        ("block128", 0, 4096, 14336, 128, plain),
        ("block128-gated", 0, 14336, 4096, 128, gated),
    ):
        linear = Linear("weight", rows, n, k, block)
        yield linear_variant(TABLE, label, linear, after, capability, residual=not after.gate)
    yield sum_variant("weight", plain, capability)
