"""Keep the integers of a quantized checkpoint: no weight is quantized a second time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from smelt.passes.base import Lossy, Pass, PassResult
from smelt.passes.program import Dialect, Program
from smelt.passes.rewrite import aten, shape
from smelt.passes.weights import Step, TensorSource

from . import fp8, w8a8
from .kept import kept_scheme
from .kept_experts import decide_experts, experts_verdict, keep_experts
from .linears import Linear, find_linears, layer_name, replace_linear
from .spec import QuantSpec, Scheme
from .stored import stored_form, stored_parts
from .stored_values import canonical, have_zeros, in_order, largest_change
from .verdict import Verdict, leave_experts, left_alone, parameters, summary

FIELDS = ("qweight", "scales", "zeros")


@dataclass(frozen=True)
class PrequantizedOptions:
    """source: where the scales are read to say how far bfloat16 moves them, and the zero points of
    8-bit weights to see whether there are any; None: not said, and such weights are left."""

    source: TensorSource | None = None


class KeepQuantized(Pass):
    """Linears and experts whose weights the checkpoint holds quantized take those integers.

    Before, with the weight made by a dequantize_stored step of the plan (or joined from several)::

        y = aten.linear(x, weight, bias)

    After::

        y = smelt::linear_int4(x, qweight, scales, zeros, bias)      # or linear_int8

    and where a GPTQ layer assigns single features to groups (`desc_act`)::

        y = smelt::linear_int4(aten.index_select(x, -1, by_group), qweight, scales, zeros, bias)

    and where the checkpoint rounds the layer's inputs, too::

        y = smelt::linear_w8a8(x, qweight, scales, input_scale, bias)
        y = smelt::linear_fp8(x, qweight, scales, input_scale, bias, "dynamic", 128)

    and layers of experts, whose weights are stacked from such steps, one below the other::

        z = smelt::experts(y, index, share, gate_up, down, "silu")
        z = smelt::experts_quantized(y, index, share, qweight, scales, zeros, ..., "int4", E, 0)

    Legal when an operator exists for the form (`kept.py`): 4 bits with groups of whole features, 8
    bits without zero points, float8 with a scale a tensor, row or square block. Values and zero
    points are kept bit for bit. Scales are exact for weights times rounded inputs and for float8;
    elsewhere a scale that bfloat16 cannot hold is rounded, and the verdict says by how much at
    most. Inputs that the operator cannot round as the checkpoint does are left alone, which the
    verdict says. Every other form stays the dequantized 16-bit weight it is, and its verdict says
    why. A layer of experts is kept as a whole, without the rounding of inputs, when all its linears
    are in one format (`kept_experts.py`). Pays because a decode step reads every weight once.
    """

    name = "keep-quantized"
    summary = "linears and experts of a quantized checkpoint keep its integers, scales and zeros"
    requires = Dialect.SEMANTIC
    produces = Dialect.QUANTIZED
    numerics = Lossy()
    Options = PrequantizedOptions

    def run(self, program: Program, options: PrequantizedOptions) -> PassResult:
        weights = parameters(program)
        result = PassResult()
        decided = []
        for linear in find_linears(program, QuantSpec("rtn")):
            parts = stored_parts(program.weights, linear.weight)
            linear, how = _decide(program, linear, parts, options.source)
            decided.append(linear)
            result.matched += max(1, len(parts))
            if linear.reason is not None:
                result.decline(linear.node, linear.reason)
                result.notes.append(left_alone(linear).to_json())
                continue
            to_kept(program, linear, parts)
            result.rewritten += max(1, len(parts))
            result.notes.append(_verdict(program, linear, parts, how, options.source).to_json())
        experts = decide_experts(program, options.source)
        result.matched += len(experts)
        leave_experts(result, [layer.experts for layer in experts])
        for layer in experts:
            if layer.experts.reason is None:
                verdict = experts_verdict(program, layer, options.source)
                keep_experts(program, layer)
                result.rewritten += 1
                result.notes.append(verdict.to_json())
        result.notes.append(summary(decided, weights, [layer.experts for layer in experts]))
        program.clean()
        return result


def _decide(
    program: Program, linear: Linear, parts: list[Step], source: TensorSource | None
) -> tuple[Linear, str | None]:
    """(the linear with its format, or with the reason to leave it; a remark about what is kept)."""
    if not parts:
        stays = linear.reason or "the checkpoint holds it at 16 bit"
        return replace(linear, reason=stays), None
    names = tuple(f"{part.args['layer']}.weight" for part in parts)
    linear = replace(linear, layer=layer_name(names), sources=names, reason=None)
    scheme, remark = _scheme(program, linear, parts, source)
    if scheme is None:
        dtype = str(program.weights.specs[linear.weight].dtype).removeprefix("torch.")
        return replace(linear, reason=f"{remark}: dequantized to {dtype}"), None
    return replace(linear, scheme=scheme), remark


def _scheme(
    program: Program, linear: Linear, parts: list[Step], source: TensorSource | None
) -> tuple[Scheme | None, str | None]:
    """(the scheme that keeps these weights, a remark), or (None, why they are dequantized)."""
    form = parts[0].args["form"]
    assert isinstance(linear.node.args[1], fx.Node)
    if len(linear.node.args[1].users) > 1:
        return None, "its weight is read in several places"
    if len({stored_form(program.weights, part.outputs[0]) for part in parts}) > 1:
        return None, "its parts are stored in different quantized forms, or in uneven blocks"
    zeros = bool(have_zeros(program.weights, parts, source))
    scheme, remark = kept_scheme(form, zeros=zeros, k=linear.k)
    if scheme is None or scheme.format == "fp8":
        return scheme, remark
    if any(part.args["form"]["order"] == "uneven" for part in parts):
        return None, "its groups have different sizes"
    group = int(parts[0].args["group"])
    if group != linear.k and group % 8:
        return None, f"kernels read features eight at a time, and its groups have {group}"
    return scheme, remark


def to_kept(program: Program, linear: Linear, parts: list[Step]) -> None:
    """Replace `linear` by its quantized operator over the values of `parts`, joined along N."""
    plan = program.weights
    columns: list[list[str]] = []
    by_group: str | None = None
    for part in parts:
        q, scales, zeros, sorting = in_order(plan, part)
        by_group = by_group or sorting
        layer = str(part.args["layer"])
        base = linear.weight if len(parts) == 1 else f"{layer}.weight"
        given = (plan, linear.scheme, base, q, scales, zeros)
        columns.append(canonical(*given, k=linear.k, layer=layer))
    packed = columns[0]
    if len(parts) > 1:
        packed = [
            plan.add("cat", [f"{linear.weight}.{field}"], column, dim=0)[0]
            for field, column in zip(FIELDS, zip(*columns, strict=True), strict=False)
        ]
    if by_group is not None:
        x: Any = linear.node.args[0]
        index = program.weight(by_group)
        with program.graph.inserting_before(linear.node):
            last = len(shape(x)) - 1
            x = program.call(aten.index_select.default, (x, last, index), like=linear.node)
        linear.node.update_arg(0, x)
    _call(program, linear, packed, parts[0].args["form"]["input_scale"])


def _call(program: Program, linear: Linear, names: list[str], input_scale: float | None) -> None:
    """Replace `linear` by the operator of its scheme over the planned weights `names`."""
    scheme = linear.scheme
    static = torch.tensor([input_scale]) if scheme.activations == "static" else None
    if scheme.format == "fp8":
        fp8.call_fp8(program, linear, names, static)
    elif scheme.activations != "none":
        w8a8.call_w8a8(program, linear, names, static)
    else:
        replace_linear(program, linear, names)


def _verdict(
    program: Program,
    linear: Linear,
    parts: list[Step],
    remark: str | None,
    source: TensorSource | None,
) -> Verdict:
    remarks = [remark] if remark else []
    changed, scheme = 0.0, linear.scheme
    if scheme.format != "fp8" and scheme.activations == "none":
        changed = largest_change(program.weights, parts, source)
    if changed:
        remarks.append(f"scales rounded to bfloat16, by at most {changed:.2%}")
    return Verdict(
        linear.layer,
        str(parts[0].args["form"]["method"]),
        scheme.format,
        0 if scheme.group_size == linear.k else scheme.group_size,
        linear.parameters,
        scale_change=changed,
        reason="; ".join(remarks) or None,
        activations=_inputs_label(scheme),
        weight=linear.weight,
    )


def _inputs_label(scheme: Scheme) -> str | None:
    return (
        fp8.inputs_label(scheme) if scheme.format == "fp8" else w8a8.LABELS.get(scheme.activations)
    )
