"""Let the kernel before a quantized product write the product's input quantized."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from smelt.runtime.ops.gated_activation import gated_activation
from smelt.runtime.ops.norm import rms_norm

from ..base import Close, Pass, PassResult
from ..dialect import smelt_name
from ..gpu_providers import triton_operators
from ..program import Dialect, Program
from ..rewrite import aten, getitem, only_user

# Features that share a scale where fp8 has blocks of them.
_BLOCK = 128


class FuseQuantizedInputs(Pass):
    """What only a quantization reads is quantized by the kernel that makes it.

    Before                                          After
        n = rms_norm(x, w)                              _, q, scale =
        q, scale = smelt.quantize_int8_triton(n)                smelt.add_rms_norm_int8_triton(x, w)

        y = smelt.linear_w8a8_triton(..., gate)         q = smelt.linear_w8a8_requantized_triton(
        q, scale = smelt.quantize_int8_triton(y, s)             ..., gate, s)      s: static

    Legal when the quantization is the only reader. A linear's tile holds no whole row of its
    result, so behind a linear only a static scale, or one for every 128 features, can be found.
    Close: a norm sums in another order; what it gives is rounded to the model's dtype before it is
    quantized, as it would have been. It pays by what is not written and read again: Inductor does
    not see into the kernel that quantizes, and would leave the norm a kernel of its own.
    """

    name = "fuse-quantized-inputs"
    summary = "norms, gates and linears write what the next quantized product reads"
    requires = Dialect.CACHED
    after = ("fuse-epilogues",)
    numerics = Close()

    def run(self, program: Program, options: Any) -> PassResult:
        result = PassResult()
        for node in program.calls():
            form = {"quantize_int8_triton": "int8", "quantize_fp8_triton": "fp8"}.get(
                smelt_name(node) or ""
            )
            if form is None:
                continue
            fuse = _fusion(node.args[0])
            if fuse is None:
                continue
            result.matched += 1
            source: Any = node.args[0]
            reason = "something else reads what is quantized" if only_user(source) is None else None
            reason = reason or (_no_tile_scale(node) if fuse is _linear else None)
            if reason is not None:
                result.decline(node, reason)
                continue
            with program.graph.inserting_before(node):
                values, scales = fuse(program, node, form, triton_operators(program.target))
            for user in list(node.users):
                program.replace(user, values if user.args[1] == 0 else scales)
                program.graph.erase_node(user)
            program.graph.erase_node(node)
            result.rewritten += 1
        return result


Fusion = Callable[[Program, fx.Node, str, Any], tuple[Any, Any]]


def _fusion(source: Any) -> Fusion | None:
    """How a value's maker takes its quantization in, None where it cannot."""
    if not isinstance(source, fx.Node):
        return None
    name = smelt_name(source)
    if source.target is rms_norm or name == "rms_norm":
        return _norm
    if source.target is gated_activation or name in ("gated_activation", "gated_activation_triton"):
        return _gate
    if source.target is operator.getitem and source.args[1] == 1:
        maker: Any = source.args[0]
        return _norm if smelt_name(maker) == "add_rms_norm_triton" else None
    return _linear if name in ("linear_w8a8_triton", "linear_fp8_triton") else None


def _no_tile_scale(node: fx.Node) -> str | None:
    """Why no tile of the linear before a quantization knows its scales."""
    if node.args[1] is not None:
        return None
    if smelt_name(node) == "quantize_fp8_triton" and node.args[2] == _BLOCK:
        return None
    return "the scale of a token is that of its whole row, which no tile of the linear holds"


def _call(program: Program, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
    new = program.call(target.default, args, like=like)
    new.meta["provider"] = "triton"
    return new


def _norm(program: Program, node: fx.Node, form: str, ops: Any) -> tuple[Any, Any]:
    source: Any = node.args[0]
    fused = source.target is operator.getitem
    norm = source.args[0] if fused else source
    given = norm.args if fused else (norm.args[0], None, *norm.args[1:])
    target = getattr(ops, f"add_rms_norm_{form}_triton")
    new = _call(program, target, (*given, *node.args[1:]), norm)
    for user in list(norm.users) if fused else ():
        if user.args[1] == 0:
            program.replace(user, getitem(new, 0))
    return getitem(new, 1), getitem(new, 2)


def _gate(program: Program, node: fx.Node, form: str, ops: Any) -> tuple[Any, Any]:
    gate: Any = node.args[0]
    target = getattr(ops, f"gated_activation_{form}_triton")
    new = _call(program, target, (*gate.args, *node.args[1:]), gate)
    return getitem(new, 0), getitem(new, 1)


def _linear(program: Program, node: fx.Node, form: str, ops: Any) -> tuple[Any, Any]:
    linear: Any = node.args[0]
    *before, kind, rows = linear.args
    output_scale = node.args[1]
    if form == "fp8":
        given = (*before[:-1], output_scale, node.args[2], before[-1], kind, rows)
        new = _call(program, ops.linear_fp8_requantized_triton, given, linear)
        return getitem(new, 0), getitem(new, 1)
    given = (*before, output_scale, kind, rows)
    values = _call(program, ops.linear_w8a8_requantized_triton, given, linear)
    # int8 has no NaN: a row's scale carries it on.
    nothing = program.call(aten.mul.Tensor, (linear.args[1], 0.0), linear)
    return values, program.call(aten.add.Tensor, (nothing, output_scale), linear)
