"""The arithmetic of the formats, and the weight-plan steps that apply it.

int4, int3, int2   asymmetric, per row and group of K: scale = (max - min) / (2^bits - 1), rounded
                   to bfloat16 *before* anything is divided by it (the value the kernel multiplies
                   with), zero = round(-min / scale) in 0 .. 2^bits - 1; min and max include 0, so
                   that a zero weight stays zero.
int8               symmetric: scale = max|w| / 127, rounded to bfloat16 likewise; q in -127..127.

The packed layout is the canonical one of `runtime/ops/packing.py`. Clipping shrinks a group's range
by 1 - step / CLIP_STEPS; steps are stored as bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from smelt.passes.weights import operation
from smelt.runtime.errors import SmeltError
from smelt.runtime.ops.linear import GROUPED_BITS
from smelt.runtime.ops.packing import pack

from .spec import FORMATS, Scheme

CLIP_STEPS = 20


class Quantized(NamedTuple):
    """q uint8 or int8 [N, K]; scales bfloat16 [N, G]; zeros uint8 [N, G], None if symmetric."""

    q: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    def dequantize(self) -> torch.Tensor:
        """float32 [N, K]."""
        q = self.q.float().unflatten(1, (self.scales.shape[1], -1))
        if self.zeros is not None:
            q = q - self.zeros.float()[..., None]
        return (q * self.scales.float()[..., None]).flatten(1)


def _shrink(clip: torch.Tensor | None) -> torch.Tensor | float:
    return 1.0 if clip is None else 1.0 - clip.float() / CLIP_STEPS


def _usable(scale: torch.Tensor) -> torch.Tensor:
    """bfloat16, and 1 where a group holds only zeros (or values too small for a scale)."""
    scale = scale.to(torch.bfloat16)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def grid(
    weight: torch.Tensor, groups: int, bits: int, clip: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales bfloat16 and zeros float32, both [N, groups], of an asymmetric format."""
    w = weight.float().unflatten(1, (groups, -1))
    shrink = _shrink(clip)
    low = w.amin(-1).clamp(max=0) * shrink
    high = w.amax(-1).clamp(min=0) * shrink
    # Divided one by one: the difference of two large values may not fit float32.
    top = 2**bits - 1
    scales = _usable(high / top - low / top)
    return scales, torch.round(-low / scales.float()).clamp(0, top)


def quantize_grouped(
    weight: torch.Tensor, groups: int, bits: int, clip: torch.Tensor | None = None
) -> Quantized:
    """weight [N, K] -> asymmetric, with `groups` scales a row. clip: uint8 [N, groups]."""
    scales, zeros = grid(weight, groups, bits, clip)
    w = weight.float().unflatten(1, (groups, -1))
    q = torch.round(w / scales.float()[..., None]) + zeros[..., None]
    q = q.clamp(0, 2**bits - 1).to(torch.uint8)
    return Quantized(q.flatten(1), scales, zeros.to(torch.uint8))


def quantize_int8(weight: torch.Tensor, groups: int, clip: torch.Tensor | None = None) -> Quantized:
    """weight [N, K] -> symmetric int8 with `groups` scales a row. clip: uint8 [N, groups]."""
    w = weight.float().unflatten(1, (groups, -1))
    scales = _usable(w.abs().amax(-1) * _shrink(clip) / 127)
    q = torch.round(w / scales.float()[..., None]).clamp(-127, 127)
    return Quantized(q.to(torch.int8).flatten(1), scales, None)


def quantize(weight: torch.Tensor, scheme: Scheme, clip: torch.Tensor | None = None) -> Quantized:
    """weight [N, K] in the scheme's format; one group a row where its size does not divide K."""
    groups = scheme.groups(weight.shape[1])
    form = FORMATS[scheme.format]
    if form.symmetric:
        return quantize_int8(weight, groups, clip)
    return quantize_grouped(weight, groups, form.bits, clip)


def fake_quantize(
    weight: torch.Tensor, scheme: Scheme, clip: torch.Tensor | None = None
) -> torch.Tensor:
    """What the kernel will multiply with: quantized and back, float32 [N, K]."""
    return quantize(weight, scheme, clip).dequantize()


def packed_bytes(n: int, k: int, scheme: Scheme) -> int:
    """Bytes of a linear of N rows and K features in canonical packed form."""
    groups = scheme.groups(k)
    form = FORMATS[scheme.format]
    if scheme.format == "fp8":
        size = scheme.group_size
        return n * k + 4 * (-(-n // size) * -(-k // size) if size else n)
    if scheme.activations != "none":
        return n * (k + 4)
    return n * (-(-k * form.bits // 8) + (2 if form.symmetric else 3) * groups)


def check_finite(weight: torch.Tensor, layer: str) -> None:
    """Raise SmeltError naming the layer for NaN or infinite weights."""
    if weight.is_meta:
        return
    bad = ~torch.isfinite(weight)
    if bad.any():
        row = int(bad.flatten(1).any(1).nonzero()[0]) if weight.dim() > 1 else 0
        raise SmeltError(
            f"{layer}: {int(bad.sum())} of its {weight.numel()} weights are NaN or infinite "
            f"(first in row {row}), so it cannot be quantized; is the checkpoint whole?"
        )


def _prepared(
    weight: torch.Tensor, extras: tuple[torch.Tensor, ...], kinds: list[str], layer: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight in float32 with its factors applied, clip or None).

    kinds names what `extras` are, in order: "columns" [K] multiplies the features (the input was
    divided by it), "rows" [N] divides the outputs (the next layer multiplies), "clip" [N, G].
    """
    given = dict(zip(kinds, extras, strict=True))
    check_finite(weight, layer)
    wide = weight.float()
    if "columns" in given:
        wide = wide * given["columns"].float()
    if "rows" in given:
        wide = wide / given["rows"].float()[:, None]
    return wide, given.get("clip")


def _quantize_operation(bits: int) -> None:
    @operation(f"quantize_int{bits}")
    def _quantize(
        weight: torch.Tensor, *extras: torch.Tensor, groups: int, kinds: list[str], layer: str
    ) -> tuple[torch.Tensor, ...]:
        """weight [N, K] and the extras of `_prepared` -> canonical qweight, scales, zeros."""
        wide, clip = _prepared(weight, extras, kinds, layer)
        result = quantize_grouped(wide, groups, bits, clip)
        assert result.zeros is not None
        return pack(result.q, bits), result.scales, result.zeros


for _bits in GROUPED_BITS:
    _quantize_operation(_bits)


@operation("quantize_int8")
def _quantize_int8(
    weight: torch.Tensor, *extras: torch.Tensor, groups: int, kinds: list[str], layer: str
) -> tuple[torch.Tensor, ...]:
    """weight [N, K] and the extras of `_prepared` -> qweight int8 [N, K], scales."""
    wide, clip = _prepared(weight, extras, kinds, layer)
    result = quantize_int8(wide, groups, clip)
    return result.q, result.scales


@operation("fold_factor")
def _fold_factor(
    x: torch.Tensor, factor: torch.Tensor, *, offset: float
) -> tuple[torch.Tensor, ...]:
    """(norm weight [K], factor [K]) -> (weight divided by factor, the factor it really got).

    The divided weight is rounded to the model's dtype; what is left of the factor afterwards is
    returned in float32, so that the linears are multiplied by exactly what the norm was divided by.
    """
    old = x.float() + offset
    new = (old / factor.float() - offset).to(x.dtype)
    left = old / (new.float() + offset)
    usable = torch.isfinite(left) & (left > 0)
    return new, torch.where(usable, left, factor.float())
