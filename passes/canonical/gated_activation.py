"""Recognise the gate of a gated feed-forward layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..base import Exact, Pass, PassResult
from ..program import Program
from ..rewrite import aten, dtype, is_call, only_user, operands, shape

_KINDS: dict[Any, str] = {aten.silu.default: "silu", aten.relu.default: "relu"}


class CanonicalizeGatedActivation(Pass):
    """act(gate) * up becomes one node.

    Before                              After
        a = aten.silu(gate)                 y = smelt.gated_activation(gate, up, "silu")
        y = aten.mul(a, up)

    Legal when the activation has no other reader and both operands have one shape. Known
    activations: silu, gelu (exact and tanh), relu. Pays because the quantizer may fold a scale
    through `up`, which enters linearly, and not through `gate`.
    """

    name = "canonicalize-gated-activation"
    summary = "an activation times its sibling becomes smelt::gated_activation"
    after = ("remove-noops",)
    numerics = Exact()

    def expect(self, program: Program) -> int | None:
        return program.facts.module_counts.get("gated_mlp", 0)

    def run(self, program: Program, options: Any) -> PassResult:
        result = PassResult()
        for node in program.calls(*_KINDS, aten.gelu.default):
            gate = node.args[0]
            product = only_user(node)
            if product is None and any(is_call(u, aten.mul.Tensor) for u in node.users):
                result.decline(node, "the activation has another reader than the product")
            if product is None or not is_call(product, aten.mul.Tensor):
                continue
            left, right = operands(product)
            up = right if left is node else left
            if not isinstance(up, fx.Node) or up is node:
                continue
            if shape(up) != shape(gate) or dtype(up) != dtype(gate):
                result.decline(node, "the activation and its sibling differ in shape or dtype")
                continue
            result.matched += 1
            with program.graph.inserting_after(product):
                new = program.call(
                    torch.ops.smelt.gated_activation.default, (gate, up, _kind(node)), like=product
                )
            program.replace(product, new)
            result.rewritten += 1
        return result


def _kind(node: fx.Node) -> str:
    if is_call(node, aten.gelu.default):
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    return _KINDS[node.target]
