"""Linear layers with e4m3 weights: weight only, or with the input rounded to e4m3 as well.

e4m3 is float8_e4m3fn of the OCP 8-bit floating point specification: no infinity, one NaN, largest
value 448, smallest 2^-9. Values are clamped to -448..448 before they are converted: what the
conversion itself makes of larger ones, 448 or NaN, depends on the version and device of torch.

qweight float8_e4m3fn [N, K] and scales float32, weight = qweight * scale:

block 0     scales [N, 1], one an output row;
block B     scales [ceil(N/B), ceil(K/B)], one for B x B weights; B = 128 is DeepSeek-V3's form
            (arXiv:2412.19437), whose checkpoints call the scales weight_scale_inv.

activations "none" leaves x as it is; "dynamic" gives every token a scale of max|x| / 448 (with
blocks: every B features of a token); "static" has one scale for all, found by calibration.

The blocked layout serves matrix-vector kernels: packed float8_e4m3fn [NB, K, 16] and scales float32
[NB, G, 16], G of them along K, NB = ceil(N/16); zero beyond N.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .library import operator
from .linear_w8a8 import LANES, usable_scale

E4M3_MAX = 448.0


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """float32 to float8_e4m3fn, to the nearest value, ties to even, clamped to -448..448."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def row_scales(scales: torch.Tensor, n: int, k: int, block: int) -> torch.Tensor:
    """Scales as float32 [N, G]: those of blocks are repeated for each of their rows."""
    if not block:
        return scales
    return scales.repeat_interleave(block, 0)[:n]


def dequantize_fp8(qweight: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    """Canonical fp8 -> float32 [N, K]."""
    n, k = qweight.shape
    rows = row_scales(scales, n, k, block)
    return qweight.float() * (rows.repeat_interleave(block, 1)[:, :k] if block else rows)


def round_activations(
    x: torch.Tensor, input_scale: torch.Tensor | None, activations: str, block: int
) -> torch.Tensor:
    """x [..., K] -> float32 [..., K] as the product sees it: rounded to e4m3 and scaled back."""
    wide = x.float()
    if activations == "none":
        return wide
    k = x.shape[-1]
    if activations == "dynamic" and block:
        parts = F.pad(wide, (0, -k % block)).unflatten(-1, (-1, block))
    else:
        parts = wide.unsqueeze(-2)
    if activations == "dynamic":
        scale = usable_scale(parts.abs().amax(-1, keepdim=True), E4M3_MAX)
    else:
        assert input_scale is not None
        scale = input_scale.reshape(1)
    # NaN and infinity make their group NaN, where clamping would hide infinity.
    scale = torch.where(torch.isfinite(parts).all(-1, keepdim=True), scale, float("nan"))
    return (to_e4m3(parts / scale).float() * scale).flatten(-2)[..., :k]


def block_fp8(
    qweight: torch.Tensor, scales: torch.Tensor, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Canonical fp8 -> (packed, scales) in the blocked layout."""
    n, k = qweight.shape
    bytes_ = _block_rows(qweight.view(torch.uint8))
    return bytes_.view(torch.float8_e4m3fn), _block_rows(row_scales(scales, n, k, block))


def unblock_fp8(
    packed: torch.Tensor, scales: torch.Tensor, n: int, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `block_fp8`."""
    bytes_ = packed.view(torch.uint8).transpose(1, 2).flatten(0, 1)[:n].contiguous()
    rows = scales.transpose(1, 2).flatten(0, 1)[:n]
    return bytes_.view(torch.float8_e4m3fn), rows[:: block or 1].contiguous()


def _block_rows(x: torch.Tensor) -> torch.Tensor:
    """[N, C] -> [NB, C, 16], zero beyond N."""
    padded = F.pad(x, (0, 0, 0, -x.shape[0] % LANES))
    return padded.unflatten(0, (-1, LANES)).transpose(1, 2).contiguous()


def _rows(x: torch.Tensor, qweight: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


@operator(
    "linear_fp8(Tensor x, Tensor qweight, Tensor scales, Tensor? input_scale, Tensor? bias, "
    "str activations, int block) -> Tensor",
    _rows,
)
def linear_fp8(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    activations: str,
    block: int,
) -> torch.Tensor:
    """x [..., K] times e4m3 weights -> [..., N] in x's dtype; computed in float32.

    input_scale: float32 [1] for activations "static", else None.
    """
    wide = round_activations(x, input_scale, activations, block)
    y = F.linear(wide, dequantize_fp8(qweight, scales, block))
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def _n_rows(x: torch.Tensor, *args: object) -> torch.Tensor:
    n = args[-1]
    assert isinstance(n, int | torch.SymInt)
    return x.new_empty(*x.shape[:-1], n)


@operator(
    "linear_fp8_blocked(Tensor x, Tensor packed, Tensor scales, Tensor? input_scale, "
    "Tensor? bias, str activations, int block, int n) -> Tensor",
    _n_rows,
)
def linear_fp8_blocked(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    activations: str,
    block: int,
    n: int,
) -> torch.Tensor:
    """`linear_fp8` over the blocked layout."""
    canonical = unblock_fp8(packed, scales, n, block)
    return linear_fp8(x, *canonical, input_scale, bias, activations, block)
