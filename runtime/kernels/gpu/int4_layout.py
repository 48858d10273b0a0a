"""How int4 weights lie for tensor cores: in the order in which a warp's threads hold an operand.

The kernels multiply weights [16 rows, 16 features] by x as the first operand of the tensor cores'
m16n8k16 product (PTX ISA, "Matrix Fragments for mma.m16n8k16"; wgmma holds four of them). There
thread 4r + q has rows r and r + 8 and features 2q, 2q + 1, 2q + 8 and 2q + 9: eight elements. An
element is 16 bits here and holds four features that lie 32 apart, so it becomes an element of four
matrices, one after the other, and no value moves between threads. The eight are 16 contiguous
bytes, those of a warp 512 (the idea of Marlin: Frantar et al. 2024, arXiv:2408.11743).

packed   int16 [NB, KB, 4, 2, 8, 4, 2, 2, 2]: 64 rows and 128 features a block. Element [., ., t, s,
         r, q, j, h, p] is of row 16t + 8h + r and has feature 32i + 16s + 8j + 2q + p in bits 4i.
scales   bfloat16 [G, NB, 8, 4, 2]: entry [., ., r, t, h] is of row 16t + 8h + r, so that a thread's
         rows are neighbours.
zeros    int16 [Z, NB, 8, 4, 2]: like elements of packed, the zero points of four times 32 features.

NB = ceil(N/64), KB = ceil(K/128); what lies beyond N and K is zero. Groups of at least 128
features, or one group a row, have G = Z = K/g and zero points that repeat; smaller ones have Z = KB
and G = 128/g KB.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

ROWS, CHUNK, PART = 64, 128, 32
# Rows that are laid out at a time, for intermediate values take several bytes each.
AT_ONCE = 1 << 10


def lay_out_int4(
    qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Canonical int4 (ops/packing.py) of k features -> (packed, scales, zeros) in this layout.

    Raises ValueError for a group size that is not 32, 64, a multiple of 128 or k.
    """
    groups = scales.shape[1]
    parts = parts_of(k, groups)
    packed = torch.cat([_pack(part) for part in qweight.split(AT_ONCE)])
    if parts > 1:
        missing = -groups % parts
        scales, zeros = F.pad(scales, (0, missing)), F.pad(zeros, (0, missing))
    repeated = zeros.to(torch.int16).repeat_interleave(4 // parts, 1)
    return packed, _interleave(scales), _interleave(_combine(repeated.unflatten(1, (-1, 4))))


def restore_int4(
    packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, n: int, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse of `lay_out_int4` for n rows and k features."""
    parts = scales.shape[0] // zeros.shape[0]
    groups = scales.shape[0] if parts == 1 else k // (CHUNK // parts)
    qweight = torch.cat([_unpack(part) for part in packed.split(AT_ONCE // ROWS)])
    values = _separate(_restore(zeros, n)).flatten(1)[:, :: 4 // parts]
    return (
        qweight[:n, : -(-k // 2)].contiguous(),
        _restore(scales, n)[:, :groups].contiguous(),
        values[:, :groups].to(torch.uint8),
    )


def parts_of(k: int, groups: int) -> int:
    """Groups in a chunk of 128 features: 4 or 2, or 1 where groups are not smaller than a chunk."""
    size = k // groups
    if size * groups != k or (groups > 1 and size not in (32, 64) and size % CHUNK):
        raise ValueError(
            f"{groups} groups over {k} features: the kernels have groups of 32, 64, multiples of "
            f"{CHUNK}, or one a row"
        )
    return 1 if groups == 1 else max(1, CHUNK // size)


def _combine(values: torch.Tensor) -> torch.Tensor:
    """int16 [..., 4] of values below 16 -> int16 [...], value i in bits 4i."""
    low = values[..., 0] | values[..., 1] << 4 | values[..., 2] << 8
    return low | values[..., 3] << 12


def _separate(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `_combine`."""
    return torch.stack([words >> shift & 15 for shift in (0, 4, 8, 12)], -1)


def _pack(qweight: torch.Tensor) -> torch.Tensor:
    """uint8 [N, ceil(K/2)] -> int16 [NB, KB, 4, 2, 8, 4, 2, 2, 2]."""
    rows, size = qweight.shape
    padded = F.pad(qweight, (0, -size % (CHUNK // 2), 0, -rows % ROWS)).to(torch.int16)
    # [NB, t, h, r, KB, i, s, j, q]: a byte has the features with p = 0 and p = 1.
    pairs = padded.unflatten(1, (-1, 4, 2, 2, 4)).unflatten(0, (-1, 4, 2, 8))
    words = [_combine((pairs >> shift & 15).movedim(5, -1)) for shift in (0, 4)]
    # [NB, t, h, r, KB, s, j, q, p]
    return torch.stack(words, -1).permute(0, 4, 1, 5, 3, 7, 6, 2, 8).contiguous()


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `_pack` -> uint8 [64 NB, 64 KB]."""
    values = _separate(packed.permute(0, 2, 7, 4, 1, 3, 6, 5, 8))
    pairs = (values[..., 0, :] | values[..., 1, :] << 4).movedim(-1, 5).to(torch.uint8)
    return pairs.flatten(4).flatten(0, 3)


def _interleave(x: torch.Tensor) -> torch.Tensor:
    """[N, G] -> [G, NB, 8, 4, 2], zero beyond N."""
    padded = F.pad(x, (0, 0, 0, -x.shape[0] % ROWS))
    return padded.unflatten(0, (-1, 4, 2, 8)).permute(4, 0, 3, 1, 2).contiguous()


def _restore(x: torch.Tensor, n: int) -> torch.Tensor:
    """The inverse of `_interleave` for n rows."""
    return x.permute(1, 3, 4, 2, 0).flatten(0, 3)[:n]
