"""The weight layouts that kernels want, as invertible steps of a weight plan."""

from __future__ import annotations

from collections.abc import Callable

import torch

from smelt.runtime.kernels.gpu.int4_layout import lay_out_int4, restore_int4
from smelt.runtime.ops.linear import GROUPED_BITS
from smelt.runtime.ops.linear_fp8 import block_fp8, unblock_fp8
from smelt.runtime.ops.linear_w8a8 import block_w8a8, unblock_w8a8
from smelt.runtime.ops.packing import block, block_int8, unblock, unblock_int8

from .weights import operation

Layout = Callable[..., tuple[torch.Tensor, ...]]


def _block(bits: int) -> Layout:
    def apply(
        qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, *, n: int, k: int
    ) -> tuple[torch.Tensor, ...]:
        return block(qweight, scales, zeros, bits, k)

    return operation(f"block_int{bits}")(apply)


def _unblock(bits: int) -> Layout:
    def apply(
        packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, *, n: int, k: int
    ) -> tuple[torch.Tensor, ...]:
        return unblock(packed, scales, zeros, bits, n, k)

    return apply


@operation("block_int8")
def _block_int8(
    qweight: torch.Tensor, scales: torch.Tensor, *, n: int, k: int
) -> tuple[torch.Tensor, ...]:
    return block_int8(qweight, scales)


@operation("block_w8a8")
def _block_w8a8(qweight: torch.Tensor, *, n: int, k: int) -> tuple[torch.Tensor, ...]:
    return (block_w8a8(qweight),)


@operation("block_fp8")
def _block_fp8(
    qweight: torch.Tensor, scales: torch.Tensor, *, n: int, block: int
) -> tuple[torch.Tensor, ...]:
    return block_fp8(qweight, scales, block)


@operation("lay_out_int4")
def _lay_out_int4(
    qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, *, n: int, k: int
) -> tuple[torch.Tensor, ...]:
    return lay_out_int4(qweight, scales, zeros, k)


def _unblock_w8a8(packed: torch.Tensor, *, n: int, k: int) -> tuple[torch.Tensor, ...]:
    return (unblock_w8a8(packed, n, k),)


def _unblock_fp8(
    packed: torch.Tensor, scales: torch.Tensor, *, n: int, block: int
) -> tuple[torch.Tensor, ...]:
    return unblock_fp8(packed, scales, n, block)


def _unblock_int8(
    packed: torch.Tensor, scales: torch.Tensor, *, n: int, k: int
) -> tuple[torch.Tensor, ...]:
    return unblock_int8(packed, scales, n)


def _restore_int4(
    packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, *, n: int, k: int
) -> tuple[torch.Tensor, ...]:
    return restore_int4(packed, scales, zeros, n, k)


# From a provider's layout back to the canonical form, by the name of the layout step.
INVERSES: dict[str, Layout] = {
    "block_int8": _unblock_int8,
    "block_w8a8": _unblock_w8a8,
    "block_fp8": _unblock_fp8,
    "lay_out_int4": _restore_int4,
}
for _bits in GROUPED_BITS:
    _block(_bits)
    INVERSES[f"block_int{_bits}"] = _unblock(_bits)
