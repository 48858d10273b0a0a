"""Move what follows a linear into the kernel that computes it."""

from __future__ import annotations

from typing import Any

from torch import fx

from smelt.runtime.ops.gated_activation import gated_activation

from ..base import Close, Pass, PassResult
from ..dialect import smelt_name
from ..program import Dialect, Program
from ..rewrite import aten, dtype, is_call, only_user, shape

# Linears whose kernel can end with more than a bias.
LINEARS = (
    "linear_int4_triton",
    "linear_int8_triton",
    "linear_w8a8_triton",
    "linear_fp8_triton",
    "linear_fp8_weight_triton",
)


class FuseEpilogues(Pass):
    """A residual add or a gate behind a Triton linear becomes the end of its kernel.

    Before                                          After
        y = smelt.linear_int4_triton(x, ..., n)         z = smelt.linear_int4_triton(x, ..., n,
        z = aten.add(h, y)                                      residual=h)

        y = smelt.linear_int4_triton(x, ..., 2I)        a = smelt.linear_int4_triton(x, ..., 2I,
        gate, up = y[..., :I], y[..., I:]                       gate="silu")
        a = gated_activation(gate, up, "silu")

    Legal when nothing else reads the linear's result, and, for a gate, when its two halves are all
    there is to it. Close: the sum and the gate are computed in float32 from sums that are not
    rounded in between. It pays in decoding: a [1, 2I] result is neither written nor read again, and
    a launch goes. Linears of other providers are left to Inductor.
    """

    name = "fuse-epilogues"
    summary = "residual adds and gates move into the Triton linears before them"
    requires = Dialect.CACHED
    after = ("choose-providers",)
    numerics = Close()

    def run(self, program: Program, options: Any) -> PassResult:
        result = PassResult()
        for node in program.calls():
            if smelt_name(node) not in LINEARS or _argument(node, "residual") is not None:
                continue
            if _argument(node, "gate"):
                continue
            gate: Any = _gate(node)
            if gate is not None:
                result.matched += 1
                _set(node, "gate", gate.args[2])
                program.replace(gate, node)
                for dead in (gate, *gate.args[:2]):
                    program.graph.erase_node(dead)
                program.revalue(node)
                result.rewritten += 1
                continue
            sum_ = only_user(node)
            if sum_ is None or not is_call(sum_, aten.add.Tensor) or sum_.kwargs:
                continue
            result.matched += 1
            residual = sum_.args[1] if sum_.args[0] is node else sum_.args[0]
            reason = _refusal(node, residual)
            if reason is not None:
                result.decline(node, reason)
                continue
            _set(node, "residual", residual)
            sum_.append(node)  # behind what it now reads
            program.replace(sum_, node)
            program.graph.erase_node(sum_)
            program.revalue(node)
            result.rewritten += 1
        return result


def _refusal(node: fx.Node, residual: Any) -> str | None:
    """Why `residual` cannot be added in the kernel of `node`."""
    if residual is node or not isinstance(residual, fx.Node):
        return "what is added is the result itself, or a number"
    if shape(residual) != shape(node) or dtype(residual) != dtype(node):
        return "what is added has another shape or dtype"
    return None


def _gate(node: fx.Node) -> fx.Node | None:
    """The gated activation over the two halves of a linear's result, where that is all there is."""
    halves = list(node.users)
    if len(halves) != 2 or not all(is_call(half, aten.slice.Tensor) for half in halves):
        return None
    width = int(shape(node)[-1])
    last = len(shape(node)) - 1
    first, second = sorted(halves, key=lambda half: int(half.args[2]))  # type: ignore[arg-type]
    if first.args[1:4] != (last, 0, width // 2) or second.args[1:3] != (last, width // 2):
        return None
    if shape(first) != shape(second):
        return None
    gate = only_user(first)
    named = gate is not None and (
        gate.target is gated_activation
        or smelt_name(gate) in ("gated_activation", "gated_activation_triton")
    )
    return gate if gate is not None and named and gate.args[:2] == (first, second) else None


def _index(node: fx.Node, name: str) -> int:
    target: Any = node.target
    return [argument.name for argument in target._schema.arguments].index(name)


def _argument(node: fx.Node, name: str) -> Any:
    return node.args[_index(node, name)]


def _set(node: fx.Node, name: str, value: Any) -> None:
    node.update_arg(_index(node, name), value)
