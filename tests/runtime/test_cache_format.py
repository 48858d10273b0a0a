"""Rows of the quantized cache: bytes, stated error bounds, and what no float16 can hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.runtime.ops.cache_format import (
    CACHE_FORMATS,
    QUANTIZED,
    dequantize_rows,
    quantize_rows,
    row_bytes,
)

FORMATS = tuple(QUANTIZED)


def bound(x: torch.Tensor, rows: torch.Tensor, name: str) -> torch.Tensor:
    """The error that cache_format.py promises for x [..., D], and float32's own rounding."""
    form, size = QUANTIZED[name], x.shape[-1]
    at = form.value_bytes(size)
    scale = rows[..., at : at + 2].contiguous().view(torch.float16).float()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    largest = x.abs().amax(-1, keepdim=True)
    if name == "fp8":
        own = x.abs() / 2**4 + scale / 2**10 + largest / 2**11 + 448 / 2**25
    else:
        own = scale / 2 + (low.abs() + high - low) / 2**11 + (form.top + 1) / 2**25
    return own + (largest + high - low) / 2**20


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=150, deadline=None)
@given(
    size=st.integers(1, 70),
    seed=st.integers(0, 2**20),
    exponent=st.integers(-14, 14),
    shift=st.floats(-30, 30),
    tail=st.booleans(),
)
def test_reading_back_stays_within_the_stated_error(
    name: str, size: int, seed: int, exponent: int, shift: float, tail: bool
) -> None:
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(3, size, generator=made)
    if tail:
        x[:, 0] *= 40  # one feature far above the others, as keys have
    x = ((x + shift) * 2.0**exponent).clamp(-60000, 60000)
    rows = quantize_rows(x, name)
    assert rows.dtype == torch.uint8 and rows.shape == (3, QUANTIZED[name].row_bytes(size))
    found = dequantize_rows(rows, name, size)
    assert found.dtype == torch.float32 and found.shape == x.shape
    wrong = (found - x).abs() - bound(x, rows, name)
    assert wrong.max() <= 0, f"{name}: {wrong.max().item()} beyond the bound"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_values_are_rounded_as_their_float32(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(5, 3, 40).to(dtype)
    assert torch.equal(quantize_rows(x, name), quantize_rows(x.float(), name))


def test_the_bytes_of_a_row() -> None:
    assert CACHE_FORMATS == ("auto", "fp8", "int8", "int4")
    sixteen = row_bytes(128, "auto", torch.bfloat16)
    ratios = {name: sixteen / row_bytes(128, name, torch.bfloat16) for name in FORMATS}
    assert {name: round(ratio, 2) for name, ratio in ratios.items()} == {
        "fp8": 1.97,
        "int8": 1.94,
        "int4": 3.76,
    }
    assert [QUANTIZED["int4"].row_bytes(size) for size in (1, 2, 23)] == [5, 5, 16]


def test_int4_puts_the_first_of_two_values_into_the_low_half() -> None:
    rows = quantize_rows(torch.tensor([[0.0, 15.0, 3.0]]), "int4")
    assert rows[0, :2].tolist() == [0xF0, 0x03]
    scale, zero = rows[0, 2:].clone().view(torch.float16).tolist()
    assert (scale, zero) == (1.0, 0.0)


def test_the_formulas_by_hand() -> None:
    x = torch.tensor([[-1.0, 0.0, 0.3, 1.55]])  # a step of 0.01
    rows = quantize_rows(x, "int8")
    scale = torch.tensor(2.55 / 255).half().float()
    expected = ((x + 1) / scale).round()
    assert rows[0, :4].tolist() == expected[0].int().tolist() == [0, 100, 130, 255]
    rows = quantize_rows(torch.tensor([[448.0, -1.0, 1.0625, 0.0]]), "fp8")
    # 1.0625 lies between 1 and 1.125: to even. e4m3 is sign, 4 bits of exponent, 3 of fraction.
    assert rows[0, :4].tolist() == [0x7E, 0xB8, 0x38, 0x00]
    assert rows[0, 4:].clone().view(torch.float16).item() == 1.0


@pytest.mark.parametrize("name", FORMATS)
def test_constant_rows_and_rows_of_zeros(name: str) -> None:
    x = torch.tensor([0.0, 3.1, -2.0])[:, None].expand(3, 17).contiguous()
    found = dequantize_rows(quantize_rows(x, name), name, 17)
    assert found[0].eq(0).all()
    torch.testing.assert_close(found, x, atol=0, rtol=2**-10)
    fresh = torch.zeros(2, QUANTIZED[name].row_bytes(17), dtype=torch.uint8)
    assert dequantize_rows(fresh, name, 17).eq(0).all(), "a fresh cache reads as zeros"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 7e4, -7e4])
def test_what_float16_cannot_hold_is_not_saturated_in_silence(name: str, value: float) -> None:
    x = torch.randn(3, 20)
    x[1, 7] = value
    found = dequantize_rows(quantize_rows(x, name), name, 20)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


def test_int8_is_finer_than_fp8_and_int4_coarser() -> None:
    x = torch.randn(200, 64)
    error = {n: (dequantize_rows(quantize_rows(x, n), n, 64) - x).square().mean() for n in FORMATS}
    assert error["int8"] < error["fp8"] / 4 < error["int4"]
