"""The int8 x int8 and e4m3 kernels against their references, in every instruction set."""

from __future__ import annotations

import pytest
import torch

from smelt.runtime.ops import linear_fp8 as fp8
from smelt.runtime.ops import linear_w8a8 as w8a8

smelt = torch.ops.smelt
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS = (0, 1, 2, 3, 8, 13, 70)
# (out features, features): whole blocks, remainders of 16 rows and of 4 features
SHAPES = ((16, 32), (37, 172), (100, 256), (150, 320), (64, 45), (70, 3))


def int8_weight(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n) * 0.1 + 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_w8a8_gives_the_references_bits(
    isa: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    n, k = shape
    qweight, scales = int8_weight(n, k)
    packed, bias = w8a8.block_w8a8(qweight), torch.randn(n).to(dtype)
    for rows in ROWS:
        x = torch.randn(rows, k).to(dtype)
        for static in (None, torch.tensor([0.017])):
            for b in (None, bias):
                want = w8a8.linear_w8a8(x, qweight, scales, static, b)
                got = smelt.linear_w8a8_blocked(x, packed, scales, static, b)
                assert got.dtype == dtype and torch.equal(got, want), (rows, static, b is None)


def test_w8a8_sums_do_not_saturate(isa: str) -> None:
    """Pairs of 127 * 127, and of 255 * 127 where bytes are made unsigned, leave 16 bits."""
    n, k = 32, 4096
    for sign in (1, -1):
        qweight = torch.full((n, k), 127 * sign, dtype=torch.int8)
        x = torch.ones(2, k)
        x[1] = -1
        got = smelt.linear_w8a8_blocked(x, w8a8.block_w8a8(qweight), torch.ones(n), None, None)
        exact = torch.tensor([[127.0 * 127 * k * sign], [-127.0 * 127 * k * sign]])
        assert torch.equal(got, (exact * (torch.tensor(1.0) / 127)).expand(2, n))


def test_w8a8_the_widest_sum_fits(isa: str) -> None:
    n, k = 16, w8a8.MAX_K
    qweight = torch.full((n, k), -127, dtype=torch.int8)
    packed, ones = w8a8.block_w8a8(qweight), torch.ones(n)
    got = smelt.linear_w8a8_blocked(torch.full((1, k), -1.0), packed, ones, torch.ones(1), None)
    assert (got == 127.0 * k).all()
    got = smelt.linear_w8a8_blocked(torch.full((1, k), 200.0), packed, ones, torch.ones(1), None)
    assert (got == -127.0 * 127 * k).all(), "static values beyond the scale are clamped to 127"


def test_w8a8_odd_rows(isa: str) -> None:
    """Zero rows give the bias, NaN and infinity give NaN in their own row only."""
    torch.manual_seed(0)
    n, k = 40, 50
    qweight, scales = int8_weight(n, k)
    packed, bias = w8a8.block_w8a8(qweight), torch.randn(n)
    x = torch.randn(5, k)
    x[0] = 0
    x[1, 49] = float("nan")
    x[2, 0] = float("inf")
    x[3] *= 1e-44
    for static in (None, torch.tensor([0.02])):
        want = w8a8.linear_w8a8(x, qweight, scales, static, bias)
        got = smelt.linear_w8a8_blocked(x, packed, scales, static, bias)
        assert torch.equal(got[0], bias) and torch.equal(got[3:], want[3:])
        assert got[1:3].isnan().all() and want[1:3].isnan().all()
        assert not got[3:].isnan().any()


def test_a_row_does_not_depend_on_its_neighbours_or_on_threads(isa: str) -> None:
    torch.manual_seed(0)
    n, k = 600, 704
    qweight, scales = int8_weight(n, k)
    packed = w8a8.block_w8a8(qweight)
    quarter = fp8.block_fp8(fp8.to_e4m3(torch.randn(n, k)), torch.rand(5, 6) + 0.1, 128)
    layers = {
        "w8a8": lambda x: smelt.linear_w8a8_blocked(x, packed, scales, None, None),
        "fp8": lambda x: smelt.linear_fp8_blocked(x, *quarter, None, None, "dynamic", 128, n),
    }
    x = torch.randn(9, k)
    threads = torch.get_num_threads()
    for name, layer in layers.items():
        alone = torch.cat([layer(row[None]) for row in x])
        try:
            for count in (1, 3):
                torch.set_num_threads(count)
                for rows in (1, 2, 5, 9):
                    assert torch.equal(layer(x[:rows]), alone[:rows]), (name, rows, count)
        finally:
            torch.set_num_threads(threads)


def test_leading_dimensions_and_strides() -> None:
    torch.manual_seed(0)
    n, k = 40, 64
    qweight, scales = int8_weight(n, k)
    packed = w8a8.block_w8a8(qweight)
    for x in (torch.randn(k), torch.randn(1, 3, k), torch.randn(k, 2).T, torch.randn(2, 0, k)):
        got = smelt.linear_w8a8_blocked(x, packed, scales, None, None)
        assert torch.equal(got, w8a8.linear_w8a8(x, qweight, scales, None, None))


def test_wrong_shapes_are_refused() -> None:
    qweight, scales = int8_weight(32, 64)
    packed = w8a8.block_w8a8(qweight)
    with pytest.raises(RuntimeError, match="does not hold 32 x 96"):
        smelt.linear_w8a8_blocked(torch.randn(1, 96), packed, scales, None, None)
    with pytest.raises(RuntimeError, match="bias"):
        smelt.linear_w8a8_blocked(torch.randn(1, 64), packed, scales, None, torch.randn(3))
    with pytest.raises(RuntimeError, match="static input scale"):
        smelt.linear_w8a8_blocked(torch.randn(1, 64), packed, scales, torch.ones(2), None)
    blocked = fp8.block_fp8(fp8.to_e4m3(torch.randn(32, 64)), torch.ones(32, 1), 0)
    with pytest.raises(RuntimeError, match="belongs to static"):
        smelt.linear_fp8_blocked(torch.randn(1, 64), *blocked, None, None, "static", 0, 32)
    with pytest.raises(RuntimeError, match="does not hold 32 x 96"):
        smelt.linear_fp8_blocked(torch.randn(1, 96), *blocked, None, None, "none", 0, 32)


# Sums of e4m3 products are taken in another order than the reference's.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [0, 128])
@pytest.mark.parametrize("activations", ["none", "dynamic", "static"])
def test_fp8(isa: str, dtype: torch.dtype, block: int, activations: str) -> None:
    torch.manual_seed(0)
    for n, k in ((37, 172), (144, 300), (16, 128)):
        qweight = fp8.to_e4m3(torch.randn(n, k) * 100)
        shape = (-(-n // block), -(-k // block)) if block else (n, 1)
        scales = torch.rand(shape) * 0.1 + 0.01
        packed, rows_ = fp8.block_fp8(qweight, scales, block)
        static = torch.tensor([0.011]) if activations == "static" else None
        bias = torch.randn(n).to(dtype)
        for rows in ROWS:
            x = torch.randn(rows, k).to(dtype)
            for b in (None, bias):
                want = fp8.linear_fp8(x, qweight, scales, static, b, activations, block)
                got = smelt.linear_fp8_blocked(x, packed, rows_, static, b, activations, block, n)
                assert got.shape == want.shape and got.dtype == dtype
                if rows:
                    error = (got.double() - want.double()).abs().max() / want.double().abs().max()
                    assert error < TOLERANCE[dtype], (n, k, rows, float(error))


def test_every_e4m3_value_is_read_and_rounded_right(isa: str) -> None:
    """All 254 numbers as weights; as inputs all values between and on them, ties to even."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = numbers[~numbers.float().isnan()]
    assert len(numbers) == 254
    one = torch.ones(1, 1)
    packed, rows = fp8.block_fp8(numbers[:, None], torch.ones(254, 1), 0)
    got = smelt.linear_fp8_blocked(one, packed, rows, None, None, "none", 0, 254)
    assert torch.equal(got[0], numbers.float())
    sorted_ = numbers.float().unique()
    middle = (sorted_[1:] + sorted_[:-1]) / 2
    x = torch.cat([sorted_, middle, middle * 0.999, middle * 1.001, torch.tensor([500.0, -1e9])])
    packed, rows = fp8.block_fp8(fp8.to_e4m3(torch.ones(16, 1)), torch.ones(16, 1), 0)
    got = smelt.linear_fp8_blocked(x[:, None], packed, rows, one[0], None, "static", 0, 16)
    assert torch.equal(got[:, 0], fp8.to_e4m3(x).float())
    assert got[-1, 0] == -448 and got[-2, 0] == 448


def test_fp8_with_nan_and_zero_rows(isa: str) -> None:
    torch.manual_seed(0)
    n, k = 20, 200
    canonical = fp8.to_e4m3(torch.randn(n, k)), torch.rand(1, 2) + 0.1
    packed, rows = fp8.block_fp8(*canonical, 128)
    x = torch.randn(3, k)
    x[0] = 0
    x[1, 150] = float("inf")
    got = smelt.linear_fp8_blocked(x, packed, rows, None, None, "dynamic", 128, n)
    want = fp8.linear_fp8(x, *canonical, None, None, "dynamic", 128)
    assert (got[0] == 0).all() and got[1].isnan().all() and want[1].isnan().all()
    torch.testing.assert_close(got[2], want[2], rtol=1e-5, atol=1e-4)
