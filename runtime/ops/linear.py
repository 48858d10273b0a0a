"""Linear layers with quantized weights: the canonical packed forms and the CPU kernels' layout.

Canonical forms are what quantization writes and what other layouts can be turned back into:

int4   qweight uint8 [N, ceil(K/2)], feature k in the low nibble of byte k/2 where k is even;
       scales bfloat16 [N, K/g], zeros uint8 [N, K/g]; weight = (q - zero) * scale, q in 0..15.
int8   qweight int8 [N, K]; scales bfloat16 [N, K/g]; weight = q * scale, q in -127..127.

g is the group size along K, or K itself for one scale a row.

The blocked layout serves matrix-vector kernels: sixteen output rows side by side, so that one
vector register holds sixteen partial sums and no sum crosses lanes.

int4   packed int32 [NB, ceil(K/8), 16], nibble j (bits 4j..4j+3) of word [n, k, i] is
       q[16n + i, 8k + j]; scales bfloat16 and zeros uint8 [NB, K/g, 16].
int8   packed int8 [NB, K, 16]; scales bfloat16 [NB, K/g, 16].

NB = ceil(N/16); rows and features beyond N and K are zero.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .library import operator

LANES = 16


def unpack_int4(qweight: torch.Tensor, k: int) -> torch.Tensor:
    """uint8 [N, ceil(K/2)] -> uint8 [N, K], one value a byte."""
    both = torch.stack((qweight & 15, qweight >> 4), -1).flatten(1)
    return both[:, :k].contiguous()


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K] with values 0..15 -> uint8 [N, ceil(K/2)]."""
    if values.shape[1] % 2:
        values = F.pad(values, (0, 1))
    return values[:, ::2] | (values[:, 1::2] << 4)


def dequantize_int4(
    qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, k: int
) -> torch.Tensor:
    """Canonical int4 -> float32 [N, K]."""
    q = unpack_int4(qweight, k).float().unflatten(1, (scales.shape[1], -1))
    return ((q - zeros.float()[..., None]) * scales.float()[..., None]).flatten(1)


def dequantize_int8(qweight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Canonical int8 -> float32 [N, K]."""
    q = qweight.float().unflatten(1, (scales.shape[1], -1))
    return (q * scales.float()[..., None]).flatten(1)


def _block_rows(x: torch.Tensor) -> torch.Tensor:
    """[N, C] -> [NB, C, 16], zero beyond N."""
    padded = F.pad(x, (0, 0, 0, -x.shape[0] % LANES))
    return padded.unflatten(0, (-1, LANES)).transpose(1, 2).contiguous()


def _unblock_rows(x: torch.Tensor, n: int) -> torch.Tensor:
    return x.transpose(1, 2).flatten(0, 1)[:n].contiguous()


def block_int4(
    qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Canonical int4 -> (packed, scales, zeros) in the blocked layout."""
    values = F.pad(unpack_int4(qweight, k), (0, -k % 8))
    nibbles = _block_rows(values).unflatten(1, (-1, 8)).to(torch.int32)
    packed = torch.zeros_like(nibbles[:, :, 0])
    for j in range(8):
        packed |= nibbles[:, :, j] << (4 * j)
    return packed, _block_rows(scales), _block_rows(zeros)


def unblock_int4(
    packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, n: int, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse of `block_int4`."""
    nibbles = torch.stack([(packed >> (4 * j)) & 15 for j in range(8)], 2).flatten(1, 2)
    values = _unblock_rows(nibbles.to(torch.uint8), n)[:, :k]
    return pack_int4(values), _unblock_rows(scales, n), _unblock_rows(zeros, n)


def block_int8(qweight: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Canonical int8 -> (packed, scales) in the blocked layout."""
    return _block_rows(qweight), _block_rows(scales)


def unblock_int8(
    packed: torch.Tensor, scales: torch.Tensor, n: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `block_int8`."""
    return _unblock_rows(packed, n), _unblock_rows(scales, n)


def _rows(x: torch.Tensor, qweight: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


@operator(
    "linear_int4(Tensor x, Tensor qweight, Tensor scales, Tensor zeros, Tensor? bias) -> Tensor",
    _rows,
)
def linear_int4(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x [..., K] times canonical int4 weights -> [..., N] in x's dtype."""
    weight = dequantize_int4(qweight, scales, zeros, x.shape[-1])
    return F.linear(x, weight.to(x.dtype), bias)


@operator(
    "linear_int8(Tensor x, Tensor qweight, Tensor scales, Tensor? bias) -> Tensor",
    _rows,
)
def linear_int8(
    x: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [..., K] times canonical int8 weights -> [..., N] in x's dtype."""
    return F.linear(x, dequantize_int8(qweight, scales).to(x.dtype), bias)


def _n_rows(x: torch.Tensor, *args: object) -> torch.Tensor:
    n = args[-1]
    assert isinstance(n, int | torch.SymInt)
    return x.new_empty(*x.shape[:-1], n)


@operator(
    "linear_int4_blocked(Tensor x, Tensor packed, Tensor scales, Tensor zeros, Tensor? bias, "
    "int n) -> Tensor",
    _n_rows,
)
def linear_int4_blocked(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
) -> torch.Tensor:
    """x [..., K] times int4 weights in the blocked layout -> [..., N] in x's dtype."""
    return linear_int4(x, *unblock_int4(packed, scales, zeros, n, x.shape[-1]), bias)


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
