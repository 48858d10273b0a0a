"""Layers of routed experts: which are quantized, and the rewrite of one.

A layer's weights are two tensors, gate_up [E, 2I, K] and down [E, K, I]. They are quantized expert
by expert, so that no more than one is ever in float32, and their rows are stored one below the
other: what comes out has the form of a linear's weight (`runtime/ops/experts_quantized.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from smelt.passes.program import Program, module_path
from smelt.passes.weights import OPERATIONS, operation
from smelt.runtime.errors import SmeltError
from smelt.runtime.ops.experts_quantized import dequantize_rows

from .linears import Linear
from .spec import FORMATS, QuantSpec, Scheme

smelt = torch.ops.smelt
EXPERTS = smelt.experts.default
MATRICES = ("gate_up", "down")
SEVERAL_PLACES = "its weights are read in several places"


@dataclass(frozen=True)
class Experts:
    """One smelt::experts of the graph. weights: planned names of gate_up and down.

    scheme: inputs always stay as they are. reason: why it is left at 16 bits, or None.
    """

    node: fx.Node
    layer: str
    weights: tuple[str, str]
    count: int
    k: int
    width: int
    scheme: Scheme
    reason: str | None = None

    @property
    def parameters(self) -> int:
        return 3 * self.count * self.k * self.width

    @property
    def name(self) -> str:
        return self.layer

    @property
    def kind(self) -> str:
        return str(self.node.args[5])

    def matrix(self, name: str, e: int) -> Linear:
        """Expert e's matrix `name`, of MATRICES, as the linear layer that it is."""
        n, k = (2 * self.width, self.k) if name == "gate_up" else (self.k, self.width)
        layer = f"{self.layer}.{e}.{name}"
        return Linear(self.node, layer, layer, (), n, k, self.scheme)


def find_experts(program: Program, spec: QuantSpec) -> list[Experts]:
    """Every layer of experts over planned weights, in graph order, with the decision about it."""
    found = []
    for node in program.calls(EXPERTS):
        weights: Any = node.args[3:5]
        gate_up, down = (program.weight_name(weight) for weight in weights)
        if gate_up is None or down is None:
            continue
        specs = [program.weights.specs[name] for name in (gate_up, down)]
        count, k, width = specs[1].shape
        layer = module_path(node) or node.name
        scheme = replace(spec.scheme(layer), activations="none")
        reason = None
        if any(len(weight.users) > 1 for weight in weights):
            reason = SEVERAL_PLACES
        elif min(k, width) < spec.min_features:
            reason = f"too small ({2 * width} x {k})"
        elif not all(s.dtype.is_floating_point for s in specs):
            reason = "its weights are not floating point"
        found.append(Experts(node, layer, (gate_up, down), count, k, width, scheme, reason))
    return found


def to_quantized(
    program: Program,
    experts: Experts,
    extras: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
) -> fx.Node:
    """Replace the layer by its quantized operator; the plan gains one step a matrix.

    extras: by matrix, what is applied to each expert's weight first (`formats._prepared`), with the
    experts along the first dimension.
    """
    names = []
    for matrix, weight in zip(MATRICES, experts.weights, strict=True):
        given = dict((extras or {}).get(matrix, {}))
        inputs = [program.weights.put(f"{weight}.{kind}", value) for kind, value in given.items()]
        names.append(
            program.weights.add(
                "quantize_experts",
                [f"{weight}.{field}" for field in fields(experts.scheme)],
                [weight, *inputs],
                format=experts.scheme.format,
                group=experts.scheme.group_size,
                kinds=list(given),
                layer=experts.layer,
                matrix=matrix,
            )
        )
    return replace_experts(program, experts, *names)


def fields(scheme: Scheme) -> tuple[str, ...]:
    """The tensors that hold a weight of a format."""
    return (
        ("qweight", "scales")
        if FORMATS[scheme.format].symmetric
        else ("qweight", "scales", "zeros")
    )


def replace_experts(
    program: Program, experts: Experts, gate_up: tuple[str, ...], down: tuple[str, ...]
) -> fx.Node:
    """Replace the layer by the operator over the planned canonical weights `gate_up`, `down`."""
    weights: list[fx.Node | None] = []
    for names in (gate_up, down):
        weights += [program.weight(name) for name in names]
        weights += [None] * (3 - len(names))
    block = experts.scheme.group_size if experts.scheme.format == "fp8" else 0
    args = (*experts.node.args[:3], *weights, experts.kind, experts.scheme.format)
    with program.graph.inserting_before(experts.node):
        node = program.call(
            smelt.experts_quantized.default, (*args, experts.count, block), like=experts.node
        )
    program.replace(experts.node, node)
    return node


@operation("quantize_experts")
def _quantize_experts(
    weight: torch.Tensor,
    *extras: torch.Tensor,
    format: str,
    group: int,
    kinds: list[str],
    layer: str,
    matrix: str,
) -> tuple[torch.Tensor, ...]:
    """weight [E, N, K] and extras [E, ...] -> what `format` stores of the rows [E * N, K]."""
    scheme, found = Scheme(format, group), []
    for e, value in enumerate(weight):
        mine = [extra[e] for extra in extras]
        found.append(_quantize(value, mine, kinds, scheme, f"{layer}.{e}.{matrix}"))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def _quantize(
    weight: torch.Tensor,
    extras: Sequence[torch.Tensor],
    kinds: Sequence[str],
    scheme: Scheme,
    layer: str,
) -> tuple[torch.Tensor, ...]:
    """One expert's matrix [N, K] in canonical form. Raises SmeltError naming it for bad scales."""
    sizes = {"groups": scheme.groups(weight.shape[1])}
    if scheme.format == "fp8":
        sizes = {"block": scheme.group_size}
    quantize = OPERATIONS[f"quantize_{scheme.format}"]
    tensors = quantize(weight, *extras, kinds=list(kinds), layer=layer, **sizes)
    check_scales(tensors[1], layer)
    return tensors


def round_matrix(linear: Linear, weight: torch.Tensor) -> torch.Tensor:
    """weight [N, K] as the runtime will have it after rounding to nearest, float32 [N, K]."""
    q, scales, *zeros = _quantize(weight, (), (), linear.scheme, linear.layer)
    block = linear.scheme.group_size if linear.scheme.format == "fp8" else 0
    zero = zeros[0] if zeros else None
    return dequantize_rows(q, scales, zero, linear.scheme.format, linear.k, block)


def check_scales(scales: torch.Tensor, layer: str) -> None:
    """Raise SmeltError naming the layer for scales that are NaN, infinite or not above zero."""
    if scales.is_meta:
        return
    bad = ~(torch.isfinite(scales) & (scales > 0))
    if bad.any():
        raise SmeltError(
            f"{layer}: {int(bad.sum())} of its {scales.numel()} scales are NaN, infinite or not "
            "above zero, so it cannot be quantized; is the checkpoint whole?"
        )
