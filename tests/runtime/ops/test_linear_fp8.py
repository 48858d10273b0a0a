"""e4m3: the format's own numbers, scales of rows and blocks, rounding of inputs, and the layout."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from smelt.runtime.ops.linear_fp8 import (
    E4M3_MAX,
    block_fp8,
    dequantize_fp8,
    linear_fp8,
    round_activations,
    to_e4m3,
    unblock_fp8,
)

smelt = torch.ops.smelt


def test_the_largest_e4m3_is_448_and_nothing_becomes_nan() -> None:
    """Not 240 (e4m3fnuz), not 57344 (e5m2)."""
    assert torch.finfo(torch.float8_e4m3fn).max == E4M3_MAX == 448
    values = to_e4m3(torch.tensor([448.0, 449.0, 500.0, 1e30, -1e30, 2.0**-9, 2.0**-11]))
    assert values.float().tolist() == [448, 448, 448, 448, -448, 2.0**-9, 0]


def test_rounding_is_to_nearest_with_ties_to_even() -> None:
    values = to_e4m3(torch.tensor([17.0, 19.0, 18.0, 1.0625, 1.1875]))
    assert values.float().tolist() == [16, 20, 18, 1.0, 1.25]


def test_block_scales_belong_to_their_128_x_128_weights() -> None:
    torch.manual_seed(0)
    n, k = 200, 300
    qweight, scales = to_e4m3(torch.randn(n, k)), torch.rand(2, 3)
    weight = dequantize_fp8(qweight, scales, 128)
    for row, column in ((0, 0), (127, 128), (128, 127), (199, 299)):
        expected = qweight[row, column].float() * scales[row // 128, column // 128]
        assert weight[row, column] == expected


def test_dynamic_scales_are_a_tokens_or_a_tokens_group() -> None:
    x = torch.zeros(2, 256)
    x[0, 0], x[0, 200], x[1, 5] = 1000.0, 0.01, 3.0
    whole = round_activations(x, None, "dynamic", 0)
    assert whole[0, 0] == pytest.approx(1000) and whole[1, 5] == pytest.approx(3)
    assert whole[0, 200] != pytest.approx(0.01, rel=1e-3), "beside 1000 it has few bits left"
    grouped = round_activations(x, None, "dynamic", 128)
    assert grouped[0, 200] == pytest.approx(0.01), "in a group of its own it is the largest"


def test_static_scales_clamp() -> None:
    x = torch.tensor([[1.0, -5.0, 1e6]])
    rounded = round_activations(x, torch.tensor([0.01]), "static", 0)
    assert rounded[0].tolist() == pytest.approx([1.0, -4.48, 4.48], rel=0.05)


def test_weight_only_leaves_the_input_alone() -> None:
    torch.manual_seed(0)
    x, qweight, scales = torch.randn(3, 40), to_e4m3(torch.randn(24, 40)), torch.rand(24, 1)
    exact = x @ (qweight.float() * scales).T
    torch.testing.assert_close(linear_fp8(x, qweight, scales, None, None, "none", 0), exact)


@pytest.mark.parametrize(("n", "k", "block"), [(24, 40, 0), (200, 300, 128), (256, 128, 128)])
def test_the_layout_turns_back(n: int, k: int, block: int) -> None:
    torch.manual_seed(0)
    qweight = to_e4m3(torch.randn(n, k))
    scales = torch.rand(-(-n // block), -(-k // block)) if block else torch.rand(n, 1)
    packed, rows = block_fp8(qweight, scales, block)
    assert packed.shape == (-(-n // 16), k, 16) and packed.dtype == torch.float8_e4m3fn
    again, back = unblock_fp8(packed, rows, n, block)
    assert torch.equal(again.view(torch.uint8), qweight.view(torch.uint8))
    assert torch.equal(back, scales)
    x = torch.randn(3, k)
    got = smelt.linear_fp8(x, qweight, scales, None, None, "dynamic", block)
    torch.testing.assert_close(
        smelt.linear_fp8_blocked(x, packed, rows, None, None, "dynamic", block, n),
        got,
        rtol=1e-4,
        atol=1e-4,
    )


def test_fakes_have_the_shapes_of_the_references() -> None:
    qweight, scales = to_e4m3(torch.randn(20, 12)), torch.ones(20, 1)
    packed, rows = block_fp8(qweight, scales, 0)
    x = torch.randn(2, 3, 12, dtype=torch.bfloat16)
    with FakeTensorMode() as mode:
        given = [mode.from_tensor(t) for t in (x, qweight, scales, packed, rows)]
        first = smelt.linear_fp8(given[0], given[1], given[2], None, None, "none", 0)
        second = smelt.linear_fp8_blocked(given[0], given[3], given[4], None, None, "none", 0, 20)
    for fake in (first, second):
        assert fake.shape == (2, 3, 20) and fake.dtype == x.dtype
