"""Sums of smelt::linear on the CPU: one order whatever the step holds."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 32), (75, 96), (200, 64), (129, 172)])
def test_a_row_does_not_depend_on_the_others(
    isa: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    n, k = shape
    weight, bias, x = (torch.randn(*s).to(dtype) for s in ((n, k), (n,), (64, k)))
    x[50] = torch.inf  # reaches its own row alone
    alone = torch.cat([torch.ops.smelt.linear(row[None], weight, bias) for row in x])
    tiles = isa == "amx_bf16" and dtype is torch.bfloat16 and k % 32 == 0
    for rows in (2, 5, 8, 16, 17, 33, 48, 64):
        together = torch.ops.smelt.linear(x[:rows], weight, bias).nan_to_num()
        want = alone[:rows].nan_to_num()
        assert torch.allclose(together.float(), want.float(), rtol=2e-2, atol=1e-1)
        # With more rows torch's own product takes over on the other sets, in an order of its own.
        if rows <= 8 or tiles:
            assert torch.equal(together, want)


@pytest.mark.parametrize("threads", [1, 2])
def test_nor_on_the_number_of_threads(isa: str, threads: int) -> None:
    weight, x = torch.randn(1300, 256).bfloat16(), torch.randn(7, 256).bfloat16()
    before = torch.ops.smelt.linear(x, weight, None)
    torch.set_num_threads(threads)
    assert torch.equal(torch.ops.smelt.linear(x, weight, None), before)
