"""int8 x int8: the formulas, against ones that circulate and are wrong, and the layout."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from smelt.runtime.ops.linear_w8a8 import (
    MAX_K,
    block_w8a8,
    linear_w8a8,
    quantize_rows,
    unblock_w8a8,
)

smelt = torch.ops.smelt


def test_a_tokens_scale_is_its_largest_value_over_127() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [-30.0, 29.9, 0.1, 15.0]])
    q, scale = quantize_rows(x, None)
    assert torch.equal(scale[:, 0], torch.tensor([2 / 127, 1.0, 30 / 127]))
    assert q[0].tolist() == [64, -127, 32, 0]  # 63.5 and 31.75: ties go to even
    assert q[1].tolist() == [0, 0, 0, 0]
    assert q[2].tolist() == [-127, 127, 0, 64]  # 126.58, 0.42, 63.5


def test_minus_128_is_not_used() -> None:
    """Symmetric means symmetric: a static scale that is too small clamps to -127, not -128."""
    q, _ = quantize_rows(torch.tensor([[-1000.0, 1000.0]]), torch.tensor([1.0]))
    assert q.tolist() == [[-127, 127]]


def test_a_token_is_scaled_by_itself_and_not_by_its_batch() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 32)
    x[3] *= 1000
    qweight, scales = torch.randint(-127, 128, (8, 32), dtype=torch.int8), torch.rand(8)
    together = linear_w8a8(x, qweight, scales, None, None)
    alone = torch.cat([linear_w8a8(row[None], qweight, scales, None, None) for row in x])
    assert torch.equal(together, alone)


def test_the_sum_is_exact() -> None:
    """Whole numbers are summed: what float32 would lose at K = 8192 is there."""
    k = 8192
    x = torch.full((1, k), 127.0)
    x[0, 0] = 126.0
    qweight = torch.full((1, k), 127, dtype=torch.int8)
    qweight[0, 0] = 1
    exact = 127 * 127 * (k - 1) + 126
    got = linear_w8a8(x.double(), qweight, torch.ones(1), torch.ones(1), None)
    assert float(got) == float(torch.tensor(exact, dtype=torch.float32))
    assert 127 * 127 * MAX_K < 2**31


def test_close_to_the_product_it_stands_for() -> None:
    torch.manual_seed(0)
    x, qweight = torch.randn(5, 7, 64), torch.randint(-127, 128, (24, 64), dtype=torch.int8)
    scales, bias = torch.rand(24) * 0.01, torch.randn(24)
    exact = x @ (qweight.float() * scales[:, None]).T + bias
    got = linear_w8a8(x, qweight, scales, None, bias)
    assert (got - exact).square().mean() < 1e-4 * exact.square().mean()


@pytest.mark.parametrize("shape", [(16, 4), (17, 5), (40, 64), (3, 1)])
def test_the_layout_turns_back(shape: tuple[int, int]) -> None:
    n, k = shape
    qweight = torch.randint(-127, 128, shape, dtype=torch.int8)
    packed = block_w8a8(qweight)
    assert packed.shape == (-(-n // 16), -(-k // 4), 16, 4)
    assert int(packed[0, 0, min(n, 2) - 1, 0]) == int(qweight[min(n, 2) - 1, 0])
    assert torch.equal(unblock_w8a8(packed, n, k), qweight)
    assert int(packed.abs().sum(dtype=torch.int64)) == int(qweight.abs().sum(dtype=torch.int64))


def test_fakes_have_the_shapes_of_the_references() -> None:
    qweight, scales = torch.ones(20, 12, dtype=torch.int8), torch.ones(20)
    x, static = torch.randn(2, 3, 12, dtype=torch.bfloat16), torch.ones(1)
    packed = block_w8a8(qweight)
    for operator, weight in ((smelt.linear_w8a8, qweight), (smelt.linear_w8a8_blocked, packed)):
        real = operator(x, weight, scales, static, None)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(t) for t in (x, weight, scales, static)]
            fake = operator(*fakes, None)
        assert fake.shape == real.shape == (2, 3, 20) and fake.dtype == real.dtype == x.dtype
