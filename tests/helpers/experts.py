"""Random layers of routed experts, dense and in every quantized format."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from smelt.runtime.ops import linear_fp8 as fp8
from smelt.runtime.ops import packing
from smelt.runtime.ops.experts_quantized import dequantize_rows

BITS = {"int4": 4, "int3": 3, "int2": 2}
Matrix = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Layer:
    """E experts of K features and width I. gate_up and down: (q, scales, zeros) in canonical form.

    block: of fp8 scales.
    """

    gate_up: Matrix
    down: Matrix
    format: str
    experts: int
    k: int
    width: int
    block: int = 0

    def arguments(self, kind: str = "silu") -> tuple[object, ...]:
        """What experts_quantized takes after x, index and weight."""
        return (*self.gate_up, *self.down, kind, self.format, self.experts, self.block)

    def blocked(self, kind: str = "silu") -> tuple[object, ...]:
        """What experts_quantized_blocked takes after x, index and weight."""
        matrices = (laid_out(self, self.gate_up, self.k), laid_out(self, self.down, self.width))
        return (*matrices[0], *matrices[1], *self.arguments(kind)[6:], self.width)

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The float32 weights that the packed ones stand for: [E, 2I, K] and [E, K, I]."""
        made = []
        for matrix, k in ((self.gate_up, self.k), (self.down, self.width)):
            parts = [
                dequantize_rows(*rows_of(matrix, e, self.experts), self.format, k, self.block)
                for e in range(self.experts)
            ]
            made.append(torch.stack(parts))
        return made[0], made[1]


def rows_of(matrix: Matrix, e: int, experts: int) -> Matrix:
    q, scales, zeros = (None if m is None else m.chunk(experts)[e] for m in matrix)
    assert q is not None and scales is not None
    return q, scales, zeros


def laid_out(layer: Layer, matrix: Matrix, k: int) -> Matrix:
    """A matrix in the blocked layout."""
    q, scales, zeros = matrix
    if zeros is not None:
        return packing.block(q, scales, zeros, BITS[layer.format], k)
    if layer.format == "int8":
        return (*packing.block_int8(q, scales), None)
    return (*fp8.block_fp8(q, scales, layer.block), None)


def random_matrix(format: str, experts: int, n: int, k: int, group: int) -> Matrix:
    """n rows of k features for each expert; group: features that share a scale, fp8's block."""
    rows = experts * n
    if format == "fp8":
        shape = (experts * -(-n // group), -(-k // group)) if group else (rows, 1)
        return fp8.to_e4m3(torch.randn(rows, k) * 100), torch.rand(shape) * 0.001, None
    groups = k // group if group and k % group == 0 else 1
    bits = BITS.get(format, 8)
    scales = ((torch.rand(rows, groups) + 1) / 2**bits).bfloat16()
    if format == "int8":
        return torch.randint(-127, 128, (rows, k), dtype=torch.int8), scales, None
    q = torch.randint(0, 2**bits, (rows, k), dtype=torch.uint8)
    return packing.pack(q, bits), scales, torch.randint(0, 2**bits, scales.shape).byte()


def random_layer(
    format: str, experts: int = 5, k: int = 64, width: int = 48, group: int = 0
) -> Layer:
    block = group if format == "fp8" else 0
    gate_up = random_matrix(format, experts, 2 * width, k, group)
    down = random_matrix(format, experts, k, width, group)
    return Layer(gate_up, down, format, experts, k, width, block)


def random_routing(tokens: int, top: int, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Different experts for every token, and float32 weights that sum to one."""
    index = torch.rand(tokens, experts).argsort(1)[:, :top]
    weight = torch.rand(tokens, top)
    return index, weight / weight.sum(1, keepdim=True)
