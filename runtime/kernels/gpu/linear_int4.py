"""Linear layers with int4 weights in groups and 16-bit floating-point inputs.

The reference is linear_int4 in ops/linear.py; the weights lie as int4_layout.py has them, and the
kernels are in linear_int4_kernels.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.library import triton_op

from .int4_layout import CHUNK, ROWS
from .launch import FEW_ROWS, SOME_ROWS, Variant, cdiv
from .linear_int4_kernels import linear_int4_few, linear_int4_many
from .roofline import Cost
from .tuning import Config, capability
from .weight_launch import (
    Layer,
    add_variant,
    check,
    gated_apart,
    launch_layer,
    layer_variant,
    name_of,
    programs,
)

TABLE = "linear_int4"
KERNELS = {"few": linear_int4_few, "many": linear_int4_many}


def _layer(rows: int, n: int, k: int, group: int, gate: str, operand: str, dtype: str) -> Layer:
    """group: features that share a scale, 0 for all of them."""
    constants = {"GROUP": group, "PARTS": max(1, CHUNK // group) if group else 1}
    return Layer(TABLE, KERNELS, rows, n, k, gate, operand, dtype, constants)


@triton_op("smelt::linear_int4_triton", mutates_args=())
def linear_int4(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: str,
    n: int,
    rows: int,
) -> torch.Tensor:
    """x [..., K] times weights in the layout of int4_layout.py, with n rows -> [..., n].

    bias [n] and residual [..., n], of any float dtype, are added before the one rounding: the fused
    form of y + residual. gate: "" or an activation; then the result is act(first half) * second
    half, [..., n/2]. rows: what a step's tokens are bounded by, 0 for no bound. Raises ValueError
    for a residual beside a gate, an unknown activation or a dtype without a kernel.
    """
    check(gate, residual)
    k, groups = x.shape[-1], scales.shape[0]
    parts = groups // zeros.shape[0]
    group = CHUNK // parts if parts > 1 else k // groups if groups > 1 else 0
    operand, weights = name_of(x), {"packed": packed, "scales": scales, "zeros": zeros}
    found = capability(x.device)
    if gate and n % (2 * ROWS):
        # The second half does not begin where a block of rows does.
        layer = _layer(rows, n, k, group, "", operand, "fp32")
        return gated_apart(launch_layer(layer, found, x, weights, bias, None), gate, x.dtype)
    layer = _layer(rows, n // 2 if gate else n, k, group, gate, operand, operand)
    return launch_layer(layer, found, x, weights, bias, residual)


def cost(rows: int, n: int, k: int, group: int, gated: bool = False, itemsize: int = 2) -> Cost:
    """Of one launch for `rows` tokens and n outputs (a gate's weight has twice as many rows).

    group: features that share a scale, k for all of them. itemsize: bytes of a value of x.
    """
    width = 2 * n if gated else n
    factors = 2 * (k // group) + 2 * (cdiv(k, CHUNK) if group < CHUNK else k // group)
    moved = width * (k // 2 + factors) + rows * (k + n) * itemsize
    return Cost(moved, 2 * rows * width * k)


def candidates(shape: str, capability: int) -> list[Config]:
    """What `smelt tune` times for steps of "few", "some" or "many" tokens."""
    step = shape.split("/")[0]
    ctas, large = programs(capability), capability in (80, 90, 100)
    if step == "few":
        tiles = [(32, 4, 3), (32, 8, 3), (64, 4, 3), (64, 2, 4), (32, 2, 4)]
        if large:
            tiles += [(32, 4, 4), (32, 8, 4), (64, 8, 3), (64, 4, 4)]
        return [
            Config(
                {"BLOCK_M": 16, "BLOCK_N": n, "SLICES": slices, "GROUP_M": 1, "CTAS": ctas},
                slices,
                stages,
            )
            for n, slices, stages in tiles
        ]
    shapes = [(64, 64, 4, 3), (64, 128, 4, 3), (64, 128, 8, 3)]
    if step == "some":
        shapes += [(32, 64, 4, 3), (32, 128, 4, 3)]
        if large:
            shapes += [(64, 64, 4, 4), (64, 64, 4, 6), (64, 128, 4, 5)]
    elif capability == 90:
        shapes += [(128, 64, 4, 2), (128, 128, 4, 2), (128, 128, 8, 3), (256, 128, 8, 3)]
    else:
        shapes += [(64, 64, 4, 2), (64, 128, 4, 2)]
        if capability != 100:  # of that tile Triton 3.6 makes an empty kernel there
            shapes += [(128, 64, 4, 2)]
    return [
        Config(
            {"BLOCK_M": m, "BLOCK_N": n, "GROUP_M": 8, "CTAS": ctas if step == "some" else 0},
            warps,
            stages,
        )
        for m, n, warps, stages in shapes
    ]


def variants(capability: int) -> Iterator[Variant]:
    """What `make kernels` compiles."""
    weights = {"packed": "*i16", "scales": "*bf16", "zeros": "*i16"}
    for rows, n, k, group, gate, operand in (
        (FEW_ROWS, 4096, 4096, 128, "", "bf16"),
        (FEW_ROWS, 6144, 4096, 128, "", "bf16"),
        (FEW_ROWS, 6144, 4096, 32, "", "bf16"),
        (FEW_ROWS, 2560, 9728, 64, "", "fp16"),
        (FEW_ROWS, 14336, 4096, 128, "silu", "bf16"),
        (SOME_ROWS, 4096, 4096, 128, "", "bf16"),
        (SOME_ROWS, 14336, 4096, 128, "silu", "bf16"),
        (0, 4096, 14336, 128, "", "bf16"),
        (0, 4096, 14336, 32, "", "fp16"),
        (0, 14336, 4096, 128, "silu", "bf16"),
        *((rows, 4096, 4096, 128, "", "fp32") for rows in (FEW_ROWS, SOME_ROWS, 0)),
    ):
        layer = _layer(rows, n, k, group, gate, operand, operand)
        label = f"{operand}-g{group}{'-gated' if gate else ''}"
        yield layer_variant(layer, label, capability, weights, True, not gate)
    yield add_variant(TABLE, capability)
