"""A layer of routed experts with quantized weights.

The experts' matrices lie one below the other, so that a layer's weights are two matrices, gate_up
[E * 2I, K] and down [E * K, I], in the forms that linears have: `packing.py` for the integers,
`linear_fp8.py` for e4m3. An expert is a range of rows, in the blocked layouts a range of blocks.
Inputs stay as they are, whatever the format.
"""

from __future__ import annotations

import torch

from .experts import _same, routed
from .library import operator
from .linear_fp8 import dequantize_fp8, unblock_fp8
from .packing import dequantize, dequantize_int8, unblock, unblock_int8

# Bits a value of the formats with a zero point for each group.
_BITS = {"int4": 4, "int3": 3, "int2": 2}
EXPERT_FORMATS = (*_BITS, "int8", "fp8")
# Sixteen rows a block: an expert begins with a block of its own where its rows are a multiple.
BLOCK_ROWS = 16

_ARGUMENTS = (
    "Tensor x, Tensor index, Tensor weight, Tensor gate_up, Tensor gate_up_scales, "
    "Tensor? gate_up_zeros, Tensor down, Tensor down_scales, Tensor? down_zeros, str kind, "
    "str format, int experts, int block"
)


def dequantize_rows(
    q: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    format: str,
    k: int,
    block: int,
) -> torch.Tensor:
    """Canonical rows of any of EXPERT_FORMATS -> float32 [N, K]. Raises ValueError for others."""
    if format in _BITS and zeros is not None:
        return dequantize(q, scales, zeros, _BITS[format], k)
    if format == "int8":
        return dequantize_int8(q, scales)
    if format == "fp8":
        return dequantize_fp8(q, scales, block)
    raise ValueError(f"no experts of format {format!r}, known: {', '.join(EXPERT_FORMATS)}")


def _expert(matrix: torch.Tensor | None, e: int, experts: int) -> torch.Tensor | None:
    """Rows of expert e. Narrow, because float8 has no index."""
    if matrix is None:
        return None
    rows = matrix.shape[0] // experts
    return matrix.narrow(0, e * rows, rows)


@operator(f"experts_quantized({_ARGUMENTS}) -> Tensor", _same)
def experts_quantized(
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scales: torch.Tensor,
    gate_up_zeros: torch.Tensor | None,
    down: torch.Tensor,
    down_scales: torch.Tensor,
    down_zeros: torch.Tensor | None,
    kind: str,
    format: str,
    experts: int,
    block: int,
) -> torch.Tensor:
    """`experts` over canonical weights: x [T, K]; index and weight [T, top_k] -> [T, K].

    gate_up holds E * 2I rows and down E * K; scales and zeros as the format has them, experts = E.
    block: of fp8 scales for block x block weights of an expert, 0 elsewhere.
    """
    width = gate_up.shape[0] // (2 * experts)

    def part(
        q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, k: int, e: int
    ) -> torch.Tensor:
        rows, scale, zero = (_expert(matrix, e, experts) for matrix in (q, scales, zeros))
        assert rows is not None and scale is not None
        return dequantize_rows(rows, scale, zero, format, k, block).to(x.dtype)

    return routed(
        x,
        index,
        weight,
        kind,
        lambda e: part(gate_up, gate_up_scales, gate_up_zeros, x.shape[-1], e),
        lambda e: part(down, down_scales, down_zeros, width, e),
    )


@operator(f"experts_quantized_blocked({_ARGUMENTS}, int width) -> Tensor", _same)
def experts_quantized_blocked(
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scales: torch.Tensor,
    gate_up_zeros: torch.Tensor | None,
    down: torch.Tensor,
    down_scales: torch.Tensor,
    down_zeros: torch.Tensor | None,
    kind: str,
    format: str,
    experts: int,
    block: int,
    width: int,
) -> torch.Tensor:
    """`experts_quantized` over the blocked layouts of its weights. width: I."""
    k = x.shape[-1]

    def canonical(
        q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, n: int, k: int
    ) -> tuple[torch.Tensor | None, ...]:
        if zeros is not None:
            return unblock(q, scales, zeros, _BITS[format], n, k)
        if format == "int8":
            return (*unblock_int8(q, scales, n), None)
        return (*unblock_fp8(q, scales, n, block), None)

    first = canonical(gate_up, gate_up_scales, gate_up_zeros, experts * 2 * width, k)
    second = canonical(down, down_scales, down_zeros, experts * k, width)
    return experts_quantized(
        *(x, index, weight, *first, *second, kind, format, experts, block)  # type: ignore[arg-type]
    )
