"""Root-mean-square norms with the residual sum before them, and gates of feed-forward layers, both
with int8 or e4m3 results for the quantized linear that follows.

All of them read and write each byte once: a row stays in registers from its sum to its quantized
form. Values are rounded to x's dtype where the unfused operators would have rounded them (after the
sum, and after the norm or gate), so fusing changes no bits of what follows. Rows of up to 16384
features are known to fit; longer ones are right, and may spill.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch.library import triton_op

from smelt.runtime.ops.gated_activation import ACTIVATIONS

from .launch import Variant
from .quantize import candidates as candidates
from .quantize import cost, launch_rows, row_variant, store_rows
from .roofline import Cost
from .rounding import NAMES, narrow, wide
from .tiles import activate


@triton.jit
def _add_rms_norm(
    x,
    residual,
    weight,
    total,
    out,
    scale,
    input_scale,
    M,
    K,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    FORMAT: tl.constexpr,
    STATIC: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDEN: tl.constexpr,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    keep = (rows < M)[:, None] & (columns < K)[None, :]
    at = rows.to(tl.int64)[:, None] * K + columns[None, :]
    y = wide(tl.load(x + at, mask=keep, other=0.0), WIDEN)
    if HAS_RESIDUAL:
        more = tl.load(residual + at, mask=keep, other=0.0)
        rounded = narrow(y + wide(more, WIDEN), DTYPE, WIDEN)
        tl.store(total + at, rounded, mask=keep)
        y = wide(rounded, WIDEN)
    mean = tl.sum(y * y, 1) / K
    y = y * tl.math.rsqrt(mean + EPS)[:, None]
    if HAS_WEIGHT:
        w = wide(tl.load(weight + columns, mask=columns < K, other=0.0), WIDEN)
        y = y * (w + OFFSET)[None, :]
    y = wide(narrow(y, DTYPE, WIDEN), WIDEN)
    store_rows(
        y, rows, 0, M, K, out, scale, input_scale,
        FORMAT, STATIC, GROUP, DTYPE, WIDEN, NATIVE,
    )  # fmt: skip


@triton.jit
def _gated_activation(
    gate,
    up,
    out,
    scale,
    input_scale,
    M,
    K,
    gate_stride,
    up_stride,
    KIND: tl.constexpr,
    FORMAT: tl.constexpr,
    STATIC: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDEN: tl.constexpr,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * BLOCK
    columns = first + tl.arange(0, BLOCK)
    keep = (rows < M)[:, None] & (columns < K)[None, :]
    far = rows.to(tl.int64)[:, None]
    g = tl.load(gate + far * gate_stride + columns[None, :], mask=keep, other=0.0)
    u = tl.load(up + far * up_stride + columns[None, :], mask=keep, other=0.0)
    y = activate(wide(g, WIDEN), KIND) * wide(u, WIDEN)
    y = wide(narrow(y, DTYPE, WIDEN), WIDEN)
    store_rows(
        y, rows, first, M, K, out, scale, input_scale,
        FORMAT, STATIC, GROUP, DTYPE, WIDEN, NATIVE,
    )  # fmt: skip


def _norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    form: str,
    input_scale: torch.Tensor | None = None,
    block: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum, norm in `form`, scale)."""
    x = x.contiguous()
    size = x.shape if residual is not None else (0,)
    total = torch.empty(size, dtype=x.dtype, device=x.device)
    out, scale = launch_rows(
        "add_rms_norm",
        _add_rms_norm,
        x.shape,
        x,
        form,
        input_scale,
        block,
        whole=True,
        x=x,
        residual=x if residual is None else residual.contiguous(),
        weight=x if weight is None else weight,
        total=total,
        EPS=eps,
        OFFSET=offset,
        HAS_RESIDUAL=residual is not None,
        HAS_WEIGHT=weight is not None,
        DTYPE=NAMES[x.dtype],
    )
    return total, out, scale


@triton_op("smelt::add_rms_norm_triton", mutates_args=())
def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and residual [..., K] -> (x + residual, its rms_norm), both in x's dtype.

    weight, eps and offset: as in ops/norm.py. Without a residual the sum is x, which an operator
    must not return: the first result is empty then.
    """
    total, out, _ = _norm(x, residual, weight, eps, offset, "same")
    return total, out


@triton_op("smelt::add_rms_norm_int8_triton", mutates_args=())
def add_rms_norm_int8(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    input_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`add_rms_norm` and then `quantize_int8` of the norm -> (sum, q, scale [..., 1])."""
    return _norm(x, residual, weight, eps, offset, "int8", input_scale)


@triton_op("smelt::add_rms_norm_fp8_triton", mutates_args=())
def add_rms_norm_fp8(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    input_scale: torch.Tensor | None,
    block: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`add_rms_norm` and then `quantize_fp8` of the norm -> (sum, q, scale)."""
    return _norm(x, residual, weight, eps, offset, "e4m3", input_scale, block)


def _gate(
    gate: torch.Tensor,
    up: torch.Tensor,
    kind: str,
    form: str,
    input_scale: torch.Tensor | None = None,
    block: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(act(gate) * up in `form`, scale)."""
    if kind not in ACTIVATIONS:
        raise ValueError(f"unknown activation {kind!r}, known: {', '.join(ACTIVATIONS)}")
    flat = [_row_view(t) for t in (gate, up)]
    return launch_rows(
        "gated_activation",
        _gated_activation,
        gate.shape,
        gate,
        form,
        input_scale,
        block,
        gate=flat[0],
        up=flat[1],
        gate_stride=flat[0].stride(0),
        up_stride=flat[1].stride(0),
        KIND=kind,
        DTYPE=NAMES[gate.dtype],
    )


def _row_view(t: torch.Tensor) -> torch.Tensor:
    """[..., I] -> [rows, I] with neighbouring features, copied only where strides demand it."""
    return (t if t.stride(-1) == 1 else t.contiguous()).reshape(-1, t.shape[-1])


@triton_op("smelt::gated_activation_triton", mutates_args=())
def gated_activation(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """gate and up [..., I], which may be halves of one tensor -> act(gate) * up, same dtype.

    Computed in float32 and rounded once, where `gated_activation` of ops rounds act(gate) as well.
    """
    return _gate(gate, up, kind, "same")[0]


@triton_op("smelt::gated_activation_int8_triton", mutates_args=())
def gated_activation_int8(
    gate: torch.Tensor, up: torch.Tensor, kind: str, input_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gated_activation` and then `quantize_int8` -> (q [..., I], scale [..., 1])."""
    return _gate(gate, up, kind, "int8", input_scale)


@triton_op("smelt::gated_activation_fp8_triton", mutates_args=())
def gated_activation_fp8(
    gate: torch.Tensor, up: torch.Tensor, kind: str, input_scale: torch.Tensor | None, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gated_activation` and then `quantize_fp8` -> (q [..., I], scale)."""
    return _gate(gate, up, kind, "e4m3", input_scale, block)


def norm_cost(
    rows: int, k: int, form: str, block: int = 0, residual: bool = True, itemsize: int = 2
) -> Cost:
    """Of one launch of `_add_rms_norm`; form: "same", "int8" or "e4m3"."""
    total = Cost((rows * k if residual else 0) * itemsize + k * itemsize)
    return total + cost(rows, k, 2 if residual else 1, form, block, itemsize)


def gate_cost(rows: int, k: int, form: str, block: int = 0, itemsize: int = 2) -> Cost:
    """Of one launch of `_gated_activation`."""
    return cost(rows, k, 2, form, block, itemsize)


def norm_variants(capability: int) -> Iterator[Variant]:
    """Of `_add_rms_norm`."""
    inputs = dict.fromkeys(("x", "residual", "weight", "total"), "*bf16")
    constants = {
        "EPS": 1e-5,
        "OFFSET": 0.0,
        "HAS_RESIDUAL": True,
        "HAS_WEIGHT": True,
        "DTYPE": "bf16",
    }
    for k, form, group in (
        (128, "same", 0),
        (2048, "same", 0),
        (4096, "same", 0),
        (16384, "same", 0),
        (4096, "int8", 0),
        (16384, "int8", 0),
        (4096, "e4m3", 128),
        (16384, "e4m3", 0),
    ):
        yield row_variant(
            "add_rms_norm", _add_rms_norm, k, form, group, capability, inputs, constants, True
        )


def gate_variants(capability: int) -> Iterator[Variant]:
    """Of `_gated_activation`."""
    inputs = {"gate": "*bf16", "up": "*bf16", "gate_stride": "i32", "up_stride": "i32"}
    for k, form, group in (
        (512, "same", 0),
        (4096, "int8", 0),
        *((14336, form, 0) for form in ("same", "int8", "e4m3")),
        (14336, "e4m3", 128),
    ):
        yield row_variant(
            "gated_activation",
            _gated_activation,
            k,
            form,
            group,
            capability,
            inputs,
            {"KIND": "silu", "DTYPE": "bf16"},
        )


def variants(capability: int) -> Iterator[Variant]:
    """What `make kernels` compiles."""
    yield from norm_variants(capability)
    yield from gate_variants(capability)
