"""How a slot of the paged cache holds one head's keys or values of one token.

    auto    D elements of the model's dtype
    int8    D bytes q, then scale and zero:             2 D / (D + 4)    = 1.94 at D = 128
    int4    two q a byte, then scale and zero:          2 D / (D/2 + 4)  = 3.76
    fp8     D bytes of float8 e4m3, then scale:         2 D / (D + 2)    = 1.97

(bytes of 16-bit elements over bytes of the row.) Every row of D features has parameters of its own,
found when it is written: nothing is calibrated, and a row reads back the same whatever stands
beside it. They are float16 and lie behind the row's values, so that one block holds all that
belongs to its tokens. With h() rounding to float16, and round() to the nearest integer, halves to
even, all else in float32:

    integers  zero = h(min x)    scale = h(max(0, max x - zero) / top)    top = 255 or 15
              q = clamp(round((x - zero) / scale), 0, top), 0 where scale is 0
              x' = q * scale + zero
              |x - x'| <= scale / 2 + (|min x| + max x - min x) / 2^11 + (top + 1) / 2^25
    fp8       scale = h(max |x| / 448)
              q = e4m3(clamp(x / scale, -448, 448)), 0 where scale is 0
              x' = q * scale
              |x - x'| <= |x| / 2^4 + scale / 2^10 + max |x| / 2^11 + 448 / 2^25

The integers are the asymmetric rounding of KIVI (Liu et al. 2024, arXiv:2402.02750) with LMDeploy's
groups, a head of a token: `zero` is a minimum and no integer zero point, since keys with a bias lie
far from 0. The parameters are float16, because bfloat16's 8 bits would cost int8 half a step. fp8
could do without a scale, but a plain cast saturates at 448 and loses what is below 2^-9, and one
scale for a whole tensor has to be calibrated: two bytes a row need neither.

What no float16 can hold is not saturated in silence: a row with a value beyond 65504, an infinity
or a NaN gets NaN for parameters, reads back as NaN, and the engine ends the request with an error.
A row of zero bytes reads as zeros, so a fresh cache does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LARGEST = 65504.0  # of float16
LARGEST_E4M3 = 448.0


@dataclass(frozen=True)
class CacheFormat:
    """bits: of a value. parameters: float16 numbers behind a row's values."""

    name: str
    bits: int
    parameters: int

    @property
    def top(self) -> int:
        """The largest integer of an integer format."""
        return (1 << self.bits) - 1

    def value_bytes(self, size: int) -> int:
        """Bytes of a row's `size` values; of two int4 in a byte the first is the low half."""
        return -(-size * self.bits // 8)

    def row_bytes(self, size: int) -> int:
        """Bytes of a row of `size` features with its parameters."""
        return self.value_bytes(size) + 2 * self.parameters


QUANTIZED = {
    form.name: form
    for form in (CacheFormat("fp8", 8, 1), CacheFormat("int8", 8, 2), CacheFormat("int4", 4, 2))
}
CACHE_FORMATS = ("auto", *QUANTIZED)


def row_bytes(size: int, name: str, dtype: torch.dtype) -> int:
    """Bytes that `size` features take in format `name`, where auto is elements of `dtype`."""
    return size * dtype.itemsize if name == "auto" else QUANTIZED[name].row_bytes(size)


def quantize_rows(x: torch.Tensor, name: str) -> torch.Tensor:
    """x [..., D], any float dtype -> uint8 [..., row_bytes(D)], by the formulas above."""
    form, x = QUANTIZED[name], x.float()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    fits = (low >= -LARGEST) & (high <= LARGEST)  # False where a value is NaN
    # Adding 0 makes 0 of -0: which of two equal zeros is the extreme must not matter.
    low, high = low + 0.0, high + 0.0
    if name == "fp8":
        scale = (torch.maximum(0.0 - low, high) / LARGEST_E4M3).half()
        parameters = scale
    else:
        zero = low.half()
        scale = ((high - zero.float()).clamp(min=0) / form.top).half()
        parameters = torch.cat((scale, zero), -1)
    usable = fits & (scale > 0)
    if name == "fp8":
        y = torch.where(usable, x / scale.float(), 0.0).clamp(-LARGEST_E4M3, LARGEST_E4M3)
        values = y.to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        y = torch.where(usable, (x - zero.float()) / scale.float(), 0.0)
        values = y.round().clamp(0, form.top).to(torch.uint8)
    if form.bits == 4:
        values = torch.nn.functional.pad(values, (0, x.shape[-1] % 2))
        values = values[..., ::2] | values[..., 1::2] << 4
    parameters = torch.where(fits, parameters, torch.nan).half().contiguous()
    return torch.cat((values, parameters.view(torch.uint8)), -1)


def dequantize_rows(rows: torch.Tensor, name: str, size: int) -> torch.Tensor:
    """What `quantize_rows` wrote: uint8 [..., row_bytes(size)] -> float32 [..., size]."""
    form = QUANTIZED[name]
    at = form.value_bytes(size)
    values = rows[..., :at]
    parameters = rows[..., at : at + 2 * form.parameters].contiguous().view(torch.float16).float()
    scale = parameters[..., :1]
    if name == "fp8":
        return values.contiguous().view(torch.float8_e4m3fn).float() * scale
    if form.bits == 4:
        values = torch.stack((values & 15, values >> 4), -1).flatten(-2)[..., :size]
    return values.float() * scale + parameters[..., 1:]
