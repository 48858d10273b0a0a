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
from .experts import Experts, find_experts
from .kept import kept_scheme
from .linears import Linear, find_linears, layer_name, replace_linear
from .spec import QuantSpec, Scheme
from .stored import DEQUANTIZE, stored_form, stored_parts
from .verdict import Verdict, leave_experts, left_alone, parameters, summary

FIELDS = ("qweight", "scales")
EXPERTS_REMARK = "dequantized: the integers of a checkpoint's experts are not kept"


@dataclass(frozen=True)
class PrequantizedOptions:
    """source: where the scales are read to say how far bfloat16 moves them, and the zero points of
    8-bit weights to see whether there are any; None: not said, and such weights are left."""

    source: TensorSource | None = None


class KeepQuantized(Pass):
    """Linears whose weight the checkpoint holds quantized take those integers.

    Before, with the weight made by a dequantize_stored step of the plan (or joined from several)::

        y = aten.linear(x, weight, bias)

    After::

        y = smelt::linear_int4(x, qweight, scales, zeros, bias)      # or linear_int8

    and where a GPTQ layer assigns single features to groups (`desc_act`)::

        y = smelt::linear_int4(aten.index_select(x, -1, by_group), qweight, scales, zeros, bias)

    and where the checkpoint rounds the layer's inputs, too::

        y = smelt::linear_w8a8(x, qweight, scales, input_scale, bias)
        y = smelt::linear_fp8(x, qweight, scales, input_scale, bias, "dynamic", 128)

    Legal when an operator exists for the form (`kept.py`): 4 bits with groups of whole features, 8
    bits without zero points, float8 with a scale a tensor, row or square block. Values and zero
    points are kept bit for bit. Scales are exact for weights times rounded inputs and for float8;
    elsewhere a scale that bfloat16 cannot hold is rounded, and the verdict says by how much at
    most. Inputs that the operator cannot round as the checkpoint does are left alone, which the
    verdict says. Every other form stays the dequantized 16-bit weight it is, and its verdict says
    why. Pays because a decode step reads every weight once.
    """

    name = "keep-quantized"
    summary = "linears of a quantized checkpoint keep its integers, scales and zero points"
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
        experts = _experts(program)
        leave_experts(result, experts)
        result.notes.append(summary(decided, weights, experts))
        program.clean()
        return result


def _experts(program: Program) -> list[Experts]:
    """The layers of experts, each with the reason why it is left."""
    found = []
    for layer in find_experts(program, QuantSpec("rtn")):
        steps = program.weights.needed(layer.weights)
        packed = any(step.op == DEQUANTIZE for step in steps)
        reason = EXPERTS_REMARK if packed else "the checkpoint holds them at 16 bit"
        found.append(replace(layer, reason=reason))
    return found


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
    scheme, remark = kept_scheme(form, zeros=_has_zeros(program, parts, source), k=linear.k)
    if scheme is None or scheme.format == "fp8":
        return scheme, remark
    if any(part.args["form"]["order"] == "uneven" for part in parts):
        return None, "its groups have different sizes"
    group = int(parts[0].args["group"])
    if group != linear.k and group % 8:
        return None, f"kernels read features eight at a time, and its groups have {group}"
    return scheme, remark


def _input(part: Step, kind: str) -> str | None:
    """Planned name of a dequantize step's "zeros" or "order"."""
    return dict(zip(part.args["kinds"], part.inputs[2:], strict=True)).get(kind)


def _has_zeros(program: Program, parts: list[Step], source: TensorSource | None) -> bool:
    """Whether 8-bit weights have zero points other than 0."""
    if parts[0].args["form"]["bits"] != 8:
        return False
    names = [name for part in parts if (name := _input(part, "zeros")) is not None]
    if not names or source is None:
        return bool(names)
    return any(bool(value.any()) for _, value in program.weights.materialize(names, source))


def to_kept(program: Program, linear: Linear, parts: list[Step]) -> None:
    """Replace `linear` by its quantized operator over the values of `parts`, joined along N."""
    plan = program.weights
    fields = ("qweight", "scales", "zeros") if linear.scheme.format == "int4" else FIELDS
    columns: list[list[str]] = []
    by_group: str | None = None
    for part in parts:
        q, scales, zeros, sorting = _in_order(program, part)
        by_group = by_group or sorting
        base = linear.weight if len(parts) == 1 else f"{part.args['layer']}.weight"
        names = [f"{base}.{field}" for field in fields]
        columns.append(_keep(program, linear, part, names, q, scales, zeros))
    packed = columns[0]
    if len(parts) > 1:
        packed = [
            plan.add("cat", [f"{linear.weight}.{field}"], column, dim=0)[0]
            for field, column in zip(fields, zip(*columns, strict=True), strict=True)
        ]
    if by_group is not None:
        x: Any = linear.node.args[0]
        index = program.weight(by_group)
        with program.graph.inserting_before(linear.node):
            last = len(shape(x)) - 1
            x = program.call(aten.index_select.default, (x, last, index), like=linear.node)
        linear.node.update_arg(0, x)
    _call(program, linear, packed, parts[0].args["form"]["input_scale"])


def _keep(
    program: Program,
    linear: Linear,
    part: Step,
    names: list[str],
    q: str,
    scales: str,
    zeros: str | None,
) -> list[str]:
    """The canonical form of one part, as planned names."""
    plan, scheme, layer = program.weights, linear.scheme, str(part.args["layer"])
    if scheme.format == "int4":
        given = [q, scales] if zeros is None else [q, scales, zeros]
        return list(plan.add("keep_int4", names, given, layer=layer))
    if scheme.format == "fp8":
        return list(plan.add("keep_fp8", names, [q, scales], block=scheme.group_size, layer=layer))
    if scheme.activations != "none":
        return list(plan.add("keep_w8a8", names, [q, scales], layer=layer))
    groups = scheme.groups(linear.k)
    return list(plan.add("keep_int8", names, [q, scales], groups=groups, layer=layer))


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


def _in_order(program: Program, part: Step) -> tuple[str, str, str | None, str | None]:
    """(q, scales, zeros, the sorting of features or None) with every group's features together."""
    plan = program.weights
    q, scales = part.inputs[:2]
    zeros, order = _input(part, "zeros"), _input(part, "order")
    if order is None:
        return q, scales, zeros, None
    layer = part.args["layer"]
    if part.args["form"]["order"] != "groups":
        names = [f"{layer}.weight.sorted", f"{layer}.weight.by_group"]
        q, sorting = plan.add("sort_features", names, [q, order])
        return q, scales, zeros, sorting
    moved = [scales] if zeros is None else [scales, zeros]
    names = [f"{name}.moved" for name in moved]
    placed = plan.add("groups_in_place", names, [order, *moved], group=part.args["group"])
    return q, placed[0], placed[1] if zeros is not None else None, None


def _verdict(
    program: Program,
    linear: Linear,
    parts: list[Step],
    remark: str | None,
    source: TensorSource | None,
) -> Verdict:
    remarks = [remark] if remark else []
    changed, scheme = 0.0, linear.scheme
    rounds = scheme.format != "fp8" and scheme.activations == "none"
    if source is not None and rounds:
        names = [part.inputs[1] for part in parts]
        found = program.weights.materialize(names, source)
        changed = max(bfloat16_change(scales) for _, scales in found)
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


def bfloat16_change(scales: torch.Tensor) -> float:
    """The largest relative change of a scale when it is rounded to bfloat16."""
    wide = scales.double()
    change = (wide.to(torch.bfloat16).double() - wide).abs() / wide.abs()
    return float(change.nan_to_num(0.0, 0.0, 0.0).max())
