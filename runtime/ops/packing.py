"""How quantized weights are stored: the canonical packed forms and the CPU kernels' layout.

Canonical forms are what quantization writes and what other layouts can be turned back into:

int4, int3, int2   qweight uint8 [N, ceil(K * bits / 8)]: each row a stream of `bits` bits a value,
                   feature 0 in the lowest bits of byte 0; scales bfloat16 [N, K/g], zeros uint8
                   [N, K/g]; weight = (q - zero) * scale, q in 0 .. 2^bits - 1.
int8               qweight int8 [N, K]; scales bfloat16 [N, K/g]; weight = q * scale, q in
                   -127..127.

g is the group size along K, or K itself for one scale a row.

The blocked layout serves matrix-vector kernels: sixteen output rows side by side, so that one
vector register holds sixteen partial sums and no sum crosses lanes. Rows of a block share words of
32 bits, each word holding values of one row:

int4   packed int32 [NB, ceil(K/8), 16]: 8 features a word, feature j in bits 4j..4j+3.
int2   packed int32 [NB, ceil(K/16), 16]: 16 features a word, feature j in bits 2j..2j+1.
int3   packed int32 [NB, 3 ceil(K/32), 16]: 32 features in three words. The first two hold the low
       two bits of 16 features each, as int2; the third the high bits, in the order in which the
       kernels meet them: feature j in bit j % 8 + 8 (j / 16) + 16 (j / 8 % 2).
int8   packed int8 [NB, K, 16].

Scales become bfloat16 and zeros uint8 [NB, K/g, 16]. NB = ceil(N/16); rows and features beyond N
and K are zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

LANES = 16
# Rows that are laid out at a time: the values lie one a byte meanwhile, and the experts of a layer
# together have hundreds of thousands of rows.
AT_ONCE = 1 << 14


class Piece(NamedTuple):
    """Bits low .. low + width of a feature's value, at `shift` of word `word`."""

    feature: int
    low: int
    width: int
    word: int
    shift: int


class Words(NamedTuple):
    """A chunk of the blocked layout: so many features in so many words, and where each lies."""

    features: int
    words: int
    pieces: tuple[Piece, ...]


WORDS: dict[int, Words] = {
    4: Words(8, 1, tuple(Piece(j, 0, 4, 0, 4 * j) for j in range(8))),
    2: Words(16, 1, tuple(Piece(j, 0, 2, 0, 2 * j) for j in range(16))),
    3: Words(
        32,
        3,
        tuple(Piece(j, 0, 2, j // 16, 2 * (j % 16)) for j in range(32))
        + tuple(Piece(j, 2, 1, 2, j % 8 + 8 * (j // 16) + 16 * (j // 8 % 2)) for j in range(32)),
    ),
}


def _overlaps(bits: int) -> list[tuple[int, int, int]]:
    """(value, byte, shift to the left) of each overlap of eight values with their bytes."""
    pairs = [(j, i, bits * j - 8 * i) for j in range(8) for i in range(bits)]
    return [(j, i, shift) for j, i, shift in pairs if -bits < shift < 8]


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [N, K] with values below 2^bits -> uint8 [N, ceil(K * bits / 8)]."""
    k = values.shape[1]
    eights = F.pad(values, (0, -k % 8)).unflatten(1, (-1, 8))
    out = torch.zeros(*eights.shape[:2], bits, dtype=torch.uint8, device=values.device)
    for j, i, shift in _overlaps(bits):
        out[..., i] |= eights[..., j] << shift if shift >= 0 else eights[..., j] >> -shift
    return out.flatten(1)[:, : -(-k * bits // 8)].contiguous()


def unpack(qweight: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """uint8 [N, ceil(K * bits / 8)] -> uint8 [N, K], one value a byte."""
    parts = F.pad(qweight, (0, -qweight.shape[1] % bits)).unflatten(1, (-1, bits)).unbind(-1)
    values: list[torch.Tensor | None] = [None] * 8
    for j, i, shift in _overlaps(bits):
        part = parts[i] >> shift if shift >= 0 else parts[i] << -shift
        before = values[j]
        values[j] = part if before is None else before | part
    eights = torch.stack([value for value in values if value is not None], -1)
    return (eights & (2**bits - 1)).flatten(1)[:, :k].contiguous()


def dequantize(
    qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, k: int
) -> torch.Tensor:
    """Canonical int4, int3 or int2 -> float32 [N, K]."""
    q = unpack(qweight, bits, k).float().unflatten(1, (scales.shape[1], -1))
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


def block(
    qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Canonical int4, int3 or int2 -> (packed, scales, zeros) in the blocked layout."""
    if qweight.shape[0] > AT_ONCE:
        pieces = zip(*(x.split(AT_ONCE) for x in (qweight, scales, zeros)), strict=True)
        parts = [block(q, s, z, bits, k) for q, s, z in pieces]
        packed, scales, zeros = map(torch.cat, zip(*parts, strict=True))
        return packed, scales, zeros
    layout = WORDS[bits]
    values = F.pad(unpack(qweight, bits, k), (0, -k % layout.features))
    chunks = _block_rows(values).unflatten(1, (-1, layout.features))
    blocks, count = chunks.shape[:2]
    packed = torch.zeros(
        blocks, count, layout.words, LANES, dtype=torch.int32, device=values.device
    )
    for piece in layout.pieces:
        part = (chunks[:, :, piece.feature] >> piece.low) & (2**piece.width - 1)
        packed[:, :, piece.word] |= part.to(torch.int32) << piece.shift
    return packed.flatten(1, 2), _block_rows(scales), _block_rows(zeros)


def unblock(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
    n: int,
    k: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse of `block`."""
    if n > AT_ONCE:
        pieces = zip(*(x.split(AT_ONCE // LANES) for x in (packed, scales, zeros)), strict=True)
        counts = [min(AT_ONCE, n - start) for start in range(0, n, AT_ONCE)]
        parts = [
            unblock(p, s, z, bits, count, k)
            for (p, s, z), count in zip(pieces, counts, strict=True)
        ]
        qweight, scales, zeros = map(torch.cat, zip(*parts, strict=True))
        return qweight, scales, zeros
    layout = WORDS[bits]
    chunks = packed.unflatten(1, (-1, layout.words))
    shape = (*chunks.shape[:2], layout.features, LANES)
    values = torch.zeros(shape, dtype=torch.int32, device=packed.device)
    for piece in layout.pieces:
        part = (chunks[:, :, piece.word] >> piece.shift) & (2**piece.width - 1)
        values[:, :, piece.feature] |= part << piece.low
    rows = _unblock_rows(values.flatten(1, 2).to(torch.uint8), n)[:, :k]
    return pack(rows, bits), _unblock_rows(scales, n), _unblock_rows(zeros, n)


def block_int8(qweight: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Canonical int8 -> (packed, scales) in the blocked layout."""
    return _block_rows(qweight), _block_rows(scales)


def unblock_int8(
    packed: torch.Tensor, scales: torch.Tensor, n: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `block_int8`."""
    return _unblock_rows(packed, n), _unblock_rows(scales, n)
