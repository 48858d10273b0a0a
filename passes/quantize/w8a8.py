"""int8 weights for int8 inputs: the arithmetic, its weight-plan step, and the rewrite of a linear.

Symmetric on both sides, q in -127..127 (-128 has no counterpart and is not used): a weight row's
scale is max|w| / 127, an input's max|x| / 127 a token or the calibrated max|x| / 127 of the tensor.
Scales are float32: the product is scaled after its integer sum is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx
from torch.nn import functional as F

from smelt.passes.program import Program
from smelt.passes.weights import operation
from smelt.runtime.errors import UserError
from smelt.runtime.ops.linear_w8a8 import MAX_K, quantize_rows, usable_scale

from .formats import _prepared, joined, row_chunks
from .linears import Linear

smelt = torch.ops.smelt
LABELS = {"dynamic": "int8, a scale a token", "static": "int8, one scale"}


def quantize_w8a8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K] -> (int8 [N, K], scales float32 [N])."""
    wide = weight.float()
    scales = usable_scale(wide.abs().amax(1), 127.0)
    return (wide / scales[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales


def product(
    weight: torch.Tensor, factor: torch.Tensor | None, input_scale: torch.Tensor | None
) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
    """What the quantized linear computes, as a function of the original's (x, bias).

    weight [N, K] before scaling; factor float32 [K] divides x and multiplies the weight;
    input_scale float32 [1] or None for a scale a token. Close to the operator, whose integer sums
    are exact.
    """
    scaled = (w if factor is None else w * factor for w in row_chunks(weight))
    parts = (q.float().mul_(scales[:, None]) for q, scales in map(quantize_w8a8, scaled))
    dense = joined(parts, weight.new_empty(weight.shape, dtype=torch.float32))

    def apply(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        whole, scale = quantize_rows(x if factor is None else x.float() / factor, input_scale)
        y = F.linear(whole, dense) * scale
        return (y if bias is None else y + bias.float()).to(x.dtype)

    return apply


@operation("quantize_w8a8")
def _quantize_w8a8(
    weight: torch.Tensor, *extras: torch.Tensor, kinds: list[str], layer: str
) -> tuple[torch.Tensor, ...]:
    """weight [N, K], extras as in `formats` -> qweight int8 [N, K], scales float32 [N]."""
    wide, _ = _prepared(weight, extras, kinds, layer)
    return quantize_w8a8(wide)


def check_width(linear: Linear) -> None:
    """Raise UserError where an integer sum might not fit 32 bits."""
    if linear.k > MAX_K:
        raise UserError(
            f"{linear.layer} has {linear.k} input features; sums of int8 products fit 32 bits up "
            f"to {MAX_K}: use rtn with int8 for this model"
        )


def to_w8a8(
    program: Program,
    linear: Linear,
    columns: str | None = None,
    rows: str | None = None,
    input_scale: torch.Tensor | None = None,
) -> fx.Node:
    """Replace `linear` by smelt::linear_w8a8; the plan gains a quantize step.

    columns, rows: planned names of what the weight is multiplied with and divided by. input_scale:
    float32 [1] for static activations.
    """
    check_width(linear)
    given = [(kind, name) for kind, name in (("columns", columns), ("rows", rows)) if name]
    names = program.weights.add(
        "quantize_w8a8",
        [f"{linear.weight}.qweight", f"{linear.weight}.scales"],
        [linear.weight, *(name for _, name in given)],
        kinds=[kind for kind, _ in given],
        layer=linear.layer,
    )
    return call_w8a8(program, linear, names, input_scale)


def call_w8a8(
    program: Program, linear: Linear, names: Sequence[str], input_scale: torch.Tensor | None
) -> fx.Node:
    """Replace `linear` by smelt::linear_w8a8 over planned qweight and scales.

    input_scale: float32 [1] for static activations.
    """
    packed = [program.weight(name) for name in names]
    static = put_scale(program, linear, input_scale)
    with program.graph.inserting_before(linear.node):
        node = program.call(
            smelt.linear_w8a8.default,
            (linear.node.args[0], *packed, static, linear.bias),
            like=linear.node,
        )
    program.replace(linear.node, node)
    return node


def put_scale(program: Program, linear: Linear, input_scale: torch.Tensor | None) -> fx.Node | None:
    """The graph's input for a linear's static input scale; None where there is none."""
    if input_scale is None:
        return None
    name = f"{linear.weight}.input_scale"
    return program.weight(program.weights.put(name, input_scale.reshape(1)))
