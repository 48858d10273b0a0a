"""Outputs of kernels between guards: what is not written shows, and what is written beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

GUARD = 512
# Kernels run in Python over CPU tensors unless there is a device (conftest.py).
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def guarded_outputs() -> Iterator[None]:
    """`torch.empty` gives tensors full of poison (NaN, or the least whole number) in the middle of
    larger ones; on leaving, everything around them must still be poison."""
    made: list[tuple[torch.Tensor, int]] = []

    def empty(shape: Any, *, dtype: torch.dtype, device: Any = None) -> torch.Tensor:
        size = math.prod(shape)
        whole = torch.full((size + 2 * GUARD,), _poison(dtype), dtype=dtype, device=device)
        made.append((whole, size))
        return whole[GUARD : GUARD + size].view(tuple(shape))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        yield
    assert made, "the operator made no output through torch.empty"
    for whole, size in made:
        around = torch.cat([whole[:GUARD], whole[GUARD + size :]])
        poison = torch.full_like(around, _poison(whole.dtype))
        assert torch.equal(around.view(torch.uint8), poison.view(torch.uint8))


def among_poison(x: torch.Tensor) -> torch.Tensor:
    """x on DEVICE, between rows of poison, which a kernel that reads beyond x takes in."""
    whole = torch.full((x.numel() + 2 * GUARD,), _poison(x.dtype)).to(x.dtype).to(DEVICE)
    whole[GUARD : GUARD + x.numel()] = x.flatten()
    return whole[GUARD : GUARD + x.numel()].view(x.shape)


def _poison(dtype: torch.dtype) -> float:
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min or 0xA5
