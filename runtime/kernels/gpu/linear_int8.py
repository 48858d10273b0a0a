"""Linear layers with int8 weights and 16-bit floating-point inputs.

The reference is linear_int8 in ops/linear.py; its canonical weights are read as they are. Values
become floats in registers, exactly (weight_tiles.py).

Few tokens: the time is that of reading the weights once. Every warp has features of its own (SLICES
of a step along K, a batch of products), so no warp converts what another one does; their sums meet
at the end. Scales multiply float32 sums: those of a group, or the whole sum where a row has one
scale. Up to eight rows of x take products of half the size.

Many tokens: tiles [BLOCK_N, BLOCK_M]; the scales of groups multiply the weights, which are rounded
to the dtype of x as the reference rounds them. PAIRED: where the tensor cores want two neighbours
of a row in a thread, bytes are loaded by twos.

GROUP: features that share a scale, 0 for all of them. TAIL: what K leaves of a step, see
weight_launch.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch.library import triton_op

from .launch import FEW_ROWS, SOME_ROWS, Variant, regime
from .roofline import Cost
from .rounding import wide
from .tuning import Config, capability
from .weight_epilogue import deliver, steps_of, tile_of
from .weight_launch import (
    Layer,
    add_variant,
    check,
    launch_layer,
    layer_variant,
    name_of,
    programs,
)
from .weight_tiles import beside, int8_pairs, int8_weights, load_where, product, tall, times

TABLE = "linear_int8"
LEAST_GROUP = 32


@triton.jit
def _add_slices(
    acc, q, scale, x,
    GROUP: tl.constexpr, OPERAND: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """acc [S, R, BLOCK_M] plus q int8 [S, R, BLOCK_K] times x [S, BLOCK_K, BLOCK_M]."""
    w = int8_weights(q, OPERAND, WIDEN)
    if GROUP == 0:
        return product(w, x, acc, WIDEN)
    else:
        part = product(w, x, tl.zeros_like(acc), WIDEN)
        return acc + part * beside(scale, acc.shape[2])


@triton.jit
def _few(
    x, qweight, scales, row, first, M, N, K,
    GROUP: tl.constexpr, GATED: tl.constexpr, OPERAND: tl.constexpr, WIDEN: tl.constexpr,
    TAIL: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Sums of BLOCK_M rows of x from `row` on and of outputs first.. -> [BLOCK_N, BLOCK_M], and
    those of the other half of the weight with a gate."""
    begin, end = steps_of(K, SLICES * BLOCK_K, SPLIT)
    last = tl.maximum(end - 1, begin)
    slices = tl.arange(0, SLICES)
    k = slices[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    rows = row + tl.arange(0, BLOCK_M)[None, :, None]
    x_at = rows * K + k
    # Outputs beyond N read the last one, and are not stored.
    n = tl.minimum(first + tl.arange(0, BLOCK_N), N - 1) - first
    w_at = n[None, :, None] * K + k
    w_base = qweight + first.to(tl.int64) * K
    u_base = w_base + tl.cast(N, tl.int64) * K
    groups = K // GROUP if GROUP else 1
    threads = tl.arange(0, SLICES * 32)
    j = tl.arange(0, BLOCK_N // 8)
    own = (threads % 32 // 4)[:, None] + (j // 2 * 16 + j % 2 * 8)[None, :]
    own = tl.minimum(first + own, N - 1) * groups
    acc = tl.zeros((SLICES, BLOCK_N, BLOCK_M), tl.float32)
    up = acc
    # Scales are loaded a step ahead: they go to registers, and no copy to shared memory hides how
    # long that takes.
    s = 1.0
    u = 1.0
    if GROUP:
        group = (begin * SLICES + threads // 32) * BLOCK_K // GROUP
        s_at = scales + own + tl.minimum(group, groups - 1)[:, None]
        s = wide(tl.load(s_at), WIDEN)
        u = s
        if GATED:
            u = wide(tl.load(s_at + N * groups), WIDEN)
    for step in range(begin, end):
        start = step * (SLICES * BLOCK_K)
        inside = start + (slices[:, None, None] * BLOCK_K if TAIL < 2 else k) < K
        valid = rows < M
        a = tl.load(x + start + x_at, mask=valid if TAIL == 0 else valid & inside, other=0.0)
        a = tl.permute(a, (0, 2, 1))
        q = load_where(w_base + start + w_at, inside, TAIL == 0)
        if GROUP:
            group = (tl.minimum(step + 1, last) * SLICES + threads // 32) * BLOCK_K // GROUP
            s_at = scales + own + tl.minimum(group, groups - 1)[:, None]
            ahead = wide(tl.load(s_at), WIDEN)
        acc = _add_slices(acc, q, s, a, GROUP, OPERAND, WIDEN)
        if GROUP:
            s = ahead
        if GATED:
            q = load_where(u_base + start + w_at, inside, TAIL == 0)
            if GROUP:
                ahead = wide(tl.load(s_at + N * groups), WIDEN)
            up = _add_slices(up, q, u, a, GROUP, OPERAND, WIDEN)
            if GROUP:
                u = ahead
    acc = tl.sum(acc, 0)
    return acc, tl.sum(up, 0) if GATED else acc


@triton.jit
def linear_int8_few(
    x, qweight, scales, bias, residual, out, M, N, K,
    GROUP: tl.constexpr, OPERAND: tl.constexpr, GATE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, DTYPE: tl.constexpr, WIDEN: tl.constexpr, TAIL: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    row, first = tile_of(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    if M <= 8 and BLOCK_M == 16:
        y, up = _few(
            x, qweight, scales, row, first, M, N, K,
            GROUP, GATE != "", OPERAND, WIDEN, TAIL, SPLIT, 8, BLOCK_N, BLOCK_K, SLICES,
        )  # fmt: skip
        y = tall(y)
        up = tall(up)
    else:
        y, up = _few(
            x, qweight, scales, row, first, M, N, K,
            GROUP, GATE != "", OPERAND, WIDEN, TAIL, SPLIT, BLOCK_M, BLOCK_N, BLOCK_K, SLICES,
        )  # fmt: skip
        y = tl.trans(y)
        up = tl.trans(up)
    rows, columns = row + tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_N)
    if GROUP == 0:
        y, up = _by_output(y, up, scales, columns, N, GATE != "", WIDEN)
    deliver(
        y, up, rows, columns, M, N, bias, residual, out,
        SPLIT, GATE, HAS_BIAS, HAS_RESIDUAL, DTYPE, WIDEN,
    )  # fmt: skip


@triton.jit
def _by_output(y, up, scales, columns, N, GATED: tl.constexpr, WIDEN: tl.constexpr):
    """y and up [R, C] times the scales of their outputs."""
    at = scales + tl.minimum(columns, N - 1)
    y *= wide(tl.load(at), WIDEN)[None, :]
    if GATED:
        up *= wide(tl.load(at + N), WIDEN)[None, :]
    return y, up


@triton.jit
def _add_tile(
    acc, qweight, scales, n, start, x, K,
    GROUP: tl.constexpr, OPERAND: tl.constexpr, WIDEN: tl.constexpr, PAIRED: tl.constexpr,
    ALL: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_N, BLOCK_M] plus features start.. of the weight's rows n times x."""
    n = n.to(tl.int64)
    if PAIRED:
        pairs = start // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
        at = qweight.to(tl.pointer_type(tl.int16)) + (n * (K // 2))[:, None] + pairs
        w = int8_pairs(load_where(at, pairs < K // 2, ALL), OPERAND, WIDEN)
    else:
        k = start + tl.arange(0, BLOCK_K)[None, :]
        at = qweight + (n * K)[:, None] + k
        w = int8_weights(load_where(at, k < K, ALL), OPERAND, WIDEN)
    if GROUP:
        s = tl.load(scales + n * (K // GROUP) + start // GROUP)
        w = times(w, s[:, None], OPERAND, WIDEN)
    return product(w, x, acc, WIDEN)


@triton.jit
def linear_int8_many(
    x, qweight, scales, bias, residual, out, M, N, K,
    GROUP: tl.constexpr, OPERAND: tl.constexpr, GATE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, DTYPE: tl.constexpr, WIDEN: tl.constexpr, TAIL: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PAIRED: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    row, first = tile_of(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    begin, end = steps_of(K, BLOCK_K, SPLIT)
    rows, columns = row + tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_N)
    # Rows beyond M and outputs beyond N read the last one, and are not stored.
    n = tl.minimum(columns, N - 1)
    k = tl.arange(0, BLOCK_K)[None, :]
    x_at = tl.minimum(rows, M - 1).to(tl.int64)[:, None] * K + k
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = acc
    for step in range(begin, end):
        start = step * BLOCK_K
        a = tl.trans(load_where(x + start + x_at, start + k < K, TAIL == 0))
        acc = _add_tile(
            acc, qweight, scales, n, start, a, K,
            GROUP, OPERAND, WIDEN, PAIRED, TAIL == 0, BLOCK_K,
        )  # fmt: skip
        if GATE != "":
            up = _add_tile(
                up, qweight, scales, N + n, start, a, K,
                GROUP, OPERAND, WIDEN, PAIRED, TAIL == 0, BLOCK_K,
            )  # fmt: skip
    y = tl.trans(acc)
    up = tl.trans(up) if GATE != "" else y
    if GROUP == 0:
        y, up = _by_output(y, up, scales, columns, N, GATE != "", WIDEN)
    deliver(
        y, up, rows, columns, M, N, bias, residual, out,
        SPLIT, GATE, HAS_BIAS, HAS_RESIDUAL, DTYPE, WIDEN,
    )  # fmt: skip


KERNELS = {"few": linear_int8_few, "many": linear_int8_many}


def _layer(rows: int, n: int, k: int, group: int, gate: str, operand: str) -> Layer:
    """group: features that share a scale, 0 for all of them."""
    constants: dict[str, int | bool] = {"GROUP": group}
    if k % 2 and regime(rows) != "few":
        constants["PAIRED"] = False
    # The largest power of two that divides a group: a slice lies inside one.
    return Layer(TABLE, KERNELS, rows, n, k, gate, operand, operand, constants, group & -group)


@triton_op("smelt::linear_int8_triton", mutates_args=())
def linear_int8(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: str,
    rows: int,
) -> torch.Tensor:
    """x [..., K] times canonical int8 weights (ops/packing.py) with N rows -> [..., N].

    bias [N] and residual [..., N], of any float dtype, are added before the one rounding: the fused
    form of y + residual. gate: "" or an activation; then the result is act(first half) * second
    half, [..., N/2]. rows: what a step's tokens are bounded by, 0 for no bound. Raises ValueError
    for a residual beside a gate, an unknown activation, or a dtype or group size without a kernel.
    """
    check(gate, residual)
    (n, k), groups = qweight.shape, scales.shape[1]
    group = k // groups if groups > 1 else 0
    if group % LEAST_GROUP or group * groups != (k if group else 0):
        raise ValueError(
            f"{groups} groups over {k} features: the kernels have groups of a multiple of "
            f"{LEAST_GROUP}, or one a row"
        )
    layer = _layer(rows, n // 2 if gate else n, k, group, gate, name_of(x))
    weights = {"qweight": qweight, "scales": scales}
    return launch_layer(layer, capability(x.device), x, weights, bias, residual)


def cost(rows: int, n: int, k: int, group: int, gated: bool = False, itemsize: int = 2) -> Cost:
    """Of one launch for `rows` tokens and n outputs (a gate's weight has twice as many rows).

    group: features that share a scale, k for all of them. itemsize: bytes of a value of x.
    """
    width = 2 * n if gated else n
    moved = width * (k + 2 * (k // group)) + rows * (k + n) * itemsize
    return Cost(moved, 2 * rows * width * k)


def candidates(shape: str, capability: int) -> list[Config]:
    """What `smelt tune` times for steps of "few", "some" or "many" tokens."""
    step = shape.split("/")[0]
    ctas, large = programs(capability), capability in (80, 90, 100)
    if step == "few":
        tiles = [(32, 64, 4, 3), (32, 64, 4, 4), (32, 128, 4, 3), (32, 64, 8, 3), (64, 64, 4, 3)]
        if large:
            tiles += [(32, 128, 4, 4), (32, 128, 8, 3), (64, 128, 4, 3)]
        return [
            Config(
                {
                    "BLOCK_M": 16,
                    "BLOCK_N": n,
                    "BLOCK_K": k,
                    "SLICES": slices,
                    "GROUP_M": 1,
                    "CTAS": ctas,
                },
                slices,
                stages,
            )
            for n, k, slices, stages in tiles
        ]
    paired = capability in (90, 100)
    shapes = [(64, 64, 64, 4, 3), (64, 128, 64, 4, 3), (64, 128, 64, 8, 3)]
    if step == "some":
        shapes += [(32, 64, 64, 4, 3), (32, 128, 64, 4, 3)]
        if large:
            shapes += [(64, 64, 128, 4, 3), (64, 64, 128, 4, 5), (64, 128, 128, 4, 3)]
    elif paired:
        shapes += [(128, 128, 64, 4, 3), (128, 128, 64, 8, 3), (256, 128, 64, 8, 3)]
    else:
        shapes += [(128, 64, 64, 4, 3), (128, 128, 64, 8, 3)]
    return [
        Config(
            {
                "BLOCK_M": m,
                "BLOCK_N": n,
                "BLOCK_K": k,
                "PAIRED": paired,
                "GROUP_M": 8,
                "CTAS": ctas if step == "some" else 0,
            },
            warps,
            stages,
        )
        for m, n, k, warps, stages in shapes
    ]


def variants(capability: int) -> Iterator[Variant]:
    """What `make kernels` compiles."""
    weights = {"qweight": "*i8", "scales": "*bf16"}
    for rows, n, k, group, gate, operand in (
        (FEW_ROWS, 4096, 4096, 0, "", "bf16"),
        (FEW_ROWS, 6144, 4096, 0, "", "fp16"),
        (FEW_ROWS, 1024, 4096, 0, "", "bf16"),
        (FEW_ROWS, 6144, 4096, 128, "", "bf16"),
        (FEW_ROWS, 14336, 4096, 0, "silu", "bf16"),
        (SOME_ROWS, 4096, 4096, 0, "", "bf16"),
        (SOME_ROWS, 14336, 4096, 0, "silu", "bf16"),
        (0, 4096, 14336, 0, "", "bf16"),
        (0, 4096, 14336, 32, "", "fp16"),
        (0, 14336, 4096, 0, "silu", "bf16"),
        *((rows, 4096, 4096, 0, "", "fp32") for rows in (FEW_ROWS, SOME_ROWS, 0)),
    ):
        layer = _layer(rows, n, k, group, gate, operand)
        label = f"{operand}-g{group}{'-gated' if gate else ''}"
        yield layer_variant(layer, label, capability, weights, True, not gate)
    yield add_variant(TABLE, capability)
