"""Activations to int8 or e4m3, and the pieces that norms, gates and linears do it with.

int8      q = round(x / scale) clamped to -127..127, as `quantize_rows` in ops/linear_w8a8.py;
e4m3      q = x / scale rounded to e4m3, as `round_activations` in ops/linear_fp8.py;

with scale = max|x| / 127 (or 448) of the row, of every `block` features of it, or one static scale.
Every operation is the reference's, in float32 with IEEE division, so the bits are the same. (torch
divides a CUDA tensor by a Python number through the number's reciprocal: there the reference itself
may differ in the last bit.) A row, or a block, that holds NaN or infinity has scale NaN.

One program quantizes a row at once, since its scale depends on all of it; with blocks it takes a
part of the row. Short rows are taken several at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch.library import triton_op

from .e4m3 import NATIVE_FROM, to_e4m3
from .launch import WIDEN, Size, Variant, cdiv, launch
from .roofline import Cost
from .rounding import narrow, nearest, wide
from .tuning import Config, capability, choose

# Size classes of the tables, in features a program takes of a row.
SHORT, MIDDLE = 512, 4096
# The least it takes, so that each thread of a warp has some, and what it takes at most where
# several programs may share a row.
LEAST, PART = 128, 2048


@triton.jit
def row_scale(y, input_scale, LIMIT: tl.constexpr, STATIC: tl.constexpr):
    """y float32 [R, C] -> scale [R]: input_scale[0], or max|row| / LIMIT; NaN where y is not
    finite."""
    size = tl.abs(y)
    # A comparison with NaN is false, so NaN becomes infinity here.
    largest = tl.max(tl.where(size < float("inf"), size, float("inf")), 1)
    if STATIC:
        scale = tl.load(input_scale) + tl.zeros_like(largest)
    else:
        scale = tl.math.div_rn(largest, LIMIT)
        scale = tl.where(scale == 0.0, 1.0, scale)
    return tl.where(largest < float("inf"), scale, float("nan"))


@triton.jit
def to_int8(y, scale):
    """y float32 over scale, both [R, C] -> whole numbers -127..127; 0 for NaN."""
    q = tl.math.div_rn(y, scale)
    q = tl.where(q == q, tl.minimum(tl.maximum(q, -127.0), 127.0), 0.0)
    return nearest(q).to(tl.int8)


@triton.jit
def store_rows(
    y,
    rows,
    first,
    M,
    K,
    out,
    scale,
    input_scale,
    FORMAT: tl.constexpr,
    STATIC: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDEN: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """y float32 [R, C], features first.. of `rows`, zero beyond K -> out [M, K].

    FORMAT "same": rounded to DTYPE. "int8", "e4m3": quantized, with scales [M] of whole rows, or
    [M, ceil(K/GROUP)].
    """
    R: tl.constexpr = y.shape[0]
    C: tl.constexpr = y.shape[1]
    columns = first + tl.arange(0, C)
    keep = (rows < M)[:, None] & (columns < K)[None, :]
    at = rows.to(tl.int64)[:, None] * K + columns[None, :]
    if FORMAT == "same":
        tl.store(out + at, narrow(y, DTYPE, WIDEN), mask=keep)
    elif FORMAT == "int8":
        s = row_scale(y, input_scale, 127.0, STATIC)
        tl.store(out + at, to_int8(y, s[:, None]), mask=keep)
        tl.store(scale + rows, s, mask=rows < M)
    elif GROUP == 0:
        s = row_scale(y, input_scale, 448.0, STATIC)
        tl.store(out + at, to_e4m3(tl.math.div_rn(y, s[:, None]), NATIVE), mask=keep)
        tl.store(scale + rows, s, mask=rows < M)
    else:
        parts = tl.reshape(y, (R * C // GROUP, GROUP))
        s = row_scale(parts, input_scale, 448.0, STATIC)
        codes = to_e4m3(tl.math.div_rn(parts, s[:, None]), NATIVE)
        tl.store(out + at, tl.reshape(codes, (R, C)), mask=keep)
        groups = first // GROUP + tl.arange(0, C // GROUP)
        G = (K + GROUP - 1) // GROUP
        tl.store(
            scale + rows[:, None] * G + groups[None, :],
            tl.reshape(s, (R, C // GROUP)),
            mask=(rows < M)[:, None] & (groups < G)[None, :],
        )


@triton.jit
def _quantize(
    x,
    out,
    scale,
    input_scale,
    M,
    K,
    FORMAT: tl.constexpr,
    STATIC: tl.constexpr,
    GROUP: tl.constexpr,
    WIDEN: tl.constexpr,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * BLOCK
    columns = first + tl.arange(0, BLOCK)
    keep = (rows < M)[:, None] & (columns < K)[None, :]
    y = tl.load(x + rows.to(tl.int64)[:, None] * K + columns[None, :], mask=keep, other=0.0)
    store_rows(
        wide(y, WIDEN), rows, first, M, K, out, scale, input_scale,
        FORMAT, STATIC, GROUP, "fp32", WIDEN, NATIVE,
    )  # fmt: skip


def row_config(kernel: str, k: int, group: int, whole: bool, found: int) -> Config:
    """The configuration for rows of k features on capability `found`.

    group: of how many features a program must take a multiple; whole: whether it must take a whole
    row.
    """
    block = max(triton.next_power_of_2(k), group, LEAST if found else 1)
    if not whole:
        block = min(block, max(PART if found else 32, group))
    config = choose(kernel, [str(block), _length(block)], found)
    constants = {**config.constants, "BLOCK": block}
    return Config(constants, config.num_warps, config.num_stages)


def _length(block: int) -> str:
    return "short" if block <= SHORT else "middle" if block <= MIDDLE else "long"


def launch_rows(
    name: str,
    kernel: Any,
    shape: Sequence[Size],
    like: torch.Tensor,
    form: str,
    input_scale: torch.Tensor | None = None,
    block: int = 0,
    whole: bool = False,
    **arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a kernel that ends in `store_rows` over activations of `shape` [..., K].

    form: "same", "int8" or "e4m3"; block: features a scale, 0 for whole rows (and with a static
    scale); whole: a program must see whole rows for reasons of its own.
    Returns (out in like's dtype, int8 or float8_e4m3fn, scale float32 [..., G]).
    """
    if block and (block < 16 or block & (block - 1)):
        raise ValueError(f"block is {block}: the GPU kernels take 0 and powers of two from 16 on")
    k = int(shape[-1])
    group = 0 if input_scale is not None else block
    found = capability(like.device)
    config = row_config(name, k, group, whole or (form != "same" and not group), found)
    # The codes of e4m3 are written as bytes, which every capability can store.
    kind = {"same": like.dtype, "int8": torch.int8, "e4m3": torch.uint8}[form]
    out = torch.empty(tuple(shape), dtype=kind, device=like.device)
    scale = torch.empty(
        (*shape[:-1], cdiv(k, group) if group else 1), dtype=torch.float32, device=like.device
    )
    m = math.prod(shape[:-1])
    launch(
        kernel,
        (cdiv(m, config.constants["ROWS"]), cdiv(k, config.constants["BLOCK"])),
        out=out,
        scale=scale,
        input_scale=like if input_scale is None else input_scale,
        M=m,
        K=k,
        FORMAT=form,
        STATIC=input_scale is not None,
        GROUP=group,
        WIDEN=WIDEN,
        NATIVE=found >= NATIVE_FROM,
        config=config,
        **arguments,
    )
    return out.view(torch.float8_e4m3fn) if form == "e4m3" else out, scale


@triton_op("smelt::quantize_int8_triton", mutates_args=())
def quantize_int8(
    x: torch.Tensor, input_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] -> (int8 [..., K], scale float32 [..., 1]).

    input_scale: float32 [1], or None for a scale of every row.
    """
    x = x.contiguous()
    return launch_rows("quantize", _quantize, x.shape, x, "int8", input_scale, x=x)


@triton_op("smelt::quantize_fp8_triton", mutates_args=())
def quantize_fp8(
    x: torch.Tensor, input_scale: torch.Tensor | None, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] -> (float8_e4m3fn [..., K], scale float32 [..., 1] or [..., ceil(K/block)]).

    input_scale: float32 [1] for the whole tensor, block or not; None for a scale of every row, or
    of every `block` features where block is not 0.
    """
    x = x.contiguous()
    return launch_rows("quantize", _quantize, x.shape, x, "e4m3", input_scale, block, x=x)


def cost(rows: int, k: int, reads: int, form: str, block: int = 0, itemsize: int = 2) -> Cost:
    """Of one launch that writes [rows, k]; reads: tensors of that shape it reads."""
    written = itemsize if form == "same" else 1
    scales = 0 if form == "same" else 4 * rows * (cdiv(k, block) if block else 1)
    return Cost(rows * k * (reads * itemsize + written) + scales)


def candidates(shape: str, capability: int) -> list[Config]:
    """What `smelt tune` times for rows of a class: features, or "short", "middle" or "long"."""
    length = _length(int(shape)) if shape.isdecimal() else shape
    if length == "short":
        return [Config({"ROWS": r}, w, 1) for r in (4, 8, 16) for w in (2, 4)]
    rows = (1, 2) if length == "middle" else (1,)
    return [Config({"ROWS": r}, w, 1) for r in rows for w in (4, 8, 16)]


def row_variant(
    name: str,
    kernel: Any,
    k: int,
    form: str,
    group: int,
    found: int,
    inputs: Mapping[str, str],
    constants: Mapping[str, Any],
    whole: bool = False,
) -> Variant:
    """A kernel that ends in `store_rows`, over rows of k features, as `launch_rows` compiles it."""
    native = found >= NATIVE_FROM
    stored = {"same": "*bf16", "int8": "*i8", "e4m3": "*u8"}[form]
    signature = {
        **inputs,
        "out": stored,
        "scale": "*fp32",
        "input_scale": "*bf16",
        "M": "i32",
        "K": "i32",
    }
    return Variant(
        f"{name}/{form}{f'-{group}' if group else ''}/{k}",
        kernel,
        signature,
        {
            "FORMAT": form,
            "STATIC": False,
            "GROUP": group,
            "WIDEN": False,
            "NATIVE": native,
            **constants,
        },
        row_config(name, k, group, whole or (form != "same" and not group), found),
        frozenset(signature) - {"M"},
    )


def variants(capability: int) -> Iterator[Variant]:
    """What `make kernels` compiles."""
    for k, form, group in (
        (512, "int8", 0),
        (4096, "int8", 0),
        (14336, "int8", 0),
        (4096, "e4m3", 0),
        (14336, "e4m3", 0),
        (4096, "e4m3", 128),
        (14336, "e4m3", 128),
    ):
        yield row_variant("quantize", _quantize, k, form, group, capability, {"x": "*bf16"}, {})
