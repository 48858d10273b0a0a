"""The linear kernels against their references, in every instruction set."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from smelt.runtime.ops import linear as reference
from smelt.runtime.ops import packing

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS = (0, 1, 2, 3, 8, 33, 70)
MANY_ROWS = (16, 17, 33, 64, 65, 66, 70)
# (out features, features, group size)
SHAPES = (
    *((16, 32, 32), (37, 172, 172), (100, 256, 64), (129, 384, 128), (64, 45, 45)),
    (150, 576, 576),
)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def _close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Within the dtype's rounding of the row's typical size; `want` is exact."""
    assert got.shape == want.shape
    if want.numel():
        error = (got.double() - want).abs().max() / want.abs().max().clamp(min=1e-6)
        assert error < TOLERANCE[got.dtype], f"error {error}"


def _input(rows: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, k).to(dtype)


def _grouped(
    n: int, k: int, group: int, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Canonical weights of 4, 3 or 2 bits."""
    values = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scales = (torch.rand(n, k // group) * 0.1 + 0.01).bfloat16()
    zeros = torch.randint(0, 2**bits, (n, k // group), dtype=torch.uint8)
    return packing.pack(values, bits), scales, zeros


def _blocked(name: str) -> Callable[..., torch.Tensor]:
    return getattr(torch.ops.smelt, f"linear_{name}_blocked")


def _int8(n: int, k: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    return values, (torch.rand(n, k // group) * 0.1 + 0.01).bfloat16()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(isa: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    n, k, _ = shape
    weight, bias = torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    for rows in ROWS:
        x = _input(rows, k, dtype)
        for b in (None, bias):
            want = reference.linear(x.double(), weight.double(), None if b is None else b.double())
            _close(torch.ops.smelt.linear(x, weight, b), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", reference.GROUPED_BITS)
def test_linear_grouped(
    isa: str, bits: int, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    torch.manual_seed(0)
    n, k, group = shape
    canonical = _grouped(n, k, group, bits)
    blocked, bias = packing.block(*canonical, bits, k), torch.randn(n).to(dtype)
    weight = packing.dequantize(*canonical, bits, k).double()
    for rows in ROWS:
        x = _input(rows, k, dtype)
        for b in (None, bias):
            want = reference.linear(x.double(), weight, None if b is None else b.double())
            _close(_blocked(f"int{bits}")(x, *blocked, b, n), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_int8(isa: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    n, k, group = shape
    canonical = _int8(n, k, group)
    blocked, bias = packing.block_int8(*canonical), torch.randn(n).to(dtype)
    weight = packing.dequantize_int8(*canonical).double()
    for rows in ROWS:
        x = _input(rows, k, dtype)
        for b in (None, bias):
            want = reference.linear(x.double(), weight, None if b is None else b.double())
            _close(torch.ops.smelt.linear_int8_blocked(x, *blocked, b, n), want)


@pytest.mark.parametrize(("bits", "k", "group"), [(4, 48, 12), (3, 48, 24), (2, 80, 40)])
def test_groups_that_split_a_word(isa: str, bits: int, k: int, group: int) -> None:
    n = 24
    canonical = _grouped(n, k, group, bits)
    x = torch.randn(2, k)
    weight = packing.dequantize(*canonical, bits, k).double()
    want = reference.linear(x.double(), weight, None)
    blocked = packing.block(*canonical, bits, k)
    _close(_blocked(f"int{bits}")(x, *blocked, None, n), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours_or_on_threads(
    isa: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    n, k, group = 1000, 704, 64
    weight = torch.randn(n, k).to(dtype)
    grouped = {b: packing.block(*_grouped(n, k, group, b), b, k) for b in reference.GROUPED_BITS}
    int8 = packing.block_int8(*_int8(n, k, group))
    layers = {
        "linear": lambda x: torch.ops.smelt.linear(x, weight, None),
        "int4": lambda x: torch.ops.smelt.linear_int4_blocked(x, *grouped[4], None, n),
        "int3": lambda x: torch.ops.smelt.linear_int3_blocked(x, *grouped[3], None, n),
        "int2": lambda x: torch.ops.smelt.linear_int2_blocked(x, *grouped[2], None, n),
        "int8": lambda x: torch.ops.smelt.linear_int8_blocked(x, *int8, None, n),
    }
    x = _input(70, k, dtype)
    x[50] = torch.inf  # reaches its own row alone
    threads = torch.get_num_threads()
    for name, layer in layers.items():
        # Elsewhere torch multiplies by many rows, in an order of its own; test_dense_bits.py.
        many = name != "linear" and dtype is torch.bfloat16 and isa in ("avx512_bf16", "amx_bf16")
        # Tiles sum in an order of their own, and take over from three rows on.
        fewest = 3 if many and isa == "amx_bf16" else 1
        alone = torch.cat([layer(row.expand(fewest, -1))[:1] for row in x])
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                for rows in (*range(fewest, 8), *(MANY_ROWS if many else ())):
                    got, want = layer(x[:rows]).nan_to_num(), alone[:rows].nan_to_num()
                    assert torch.equal(got, want), (name, rows, count)
        finally:
            torch.set_num_threads(threads)


def test_leading_dimensions_and_strides() -> None:
    torch.manual_seed(0)
    n, k = 40, 64
    weight = torch.randn(n, k)
    for x in (torch.randn(k), torch.randn(1, 3, k), torch.randn(k, 2).T, torch.randn(2, 0, k)):
        got = torch.ops.smelt.linear(x, weight, None)
        torch.testing.assert_close(got, reference.linear(x, weight, None), atol=1e-4, rtol=1e-5)
    # A weight that is a view of something larger goes to torch's own product.
    wide = torch.randn(n, 2 * k)[:, :k]
    x = torch.randn(2, k)
    got = torch.ops.smelt.linear(x, wide, None)
    torch.testing.assert_close(got, x @ wide.T, atol=1e-4, rtol=1e-5)


def test_wrong_shapes_are_refused() -> None:
    blocked = packing.block(*_grouped(32, 64, 64, 4), 4, 64)
    with pytest.raises(RuntimeError, match="does not hold 32 x 96"):
        torch.ops.smelt.linear_int4_blocked(torch.randn(1, 96), *blocked, None, 32)
    with pytest.raises(RuntimeError, match="bias"):
        torch.ops.smelt.linear_int4_blocked(torch.randn(1, 64), *blocked, torch.randn(3), 32)
