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

from .experts import Experts, find_experts
from .linears import Linear, find_linears, layer_name
from .spec import QuantSpec, Scheme
from .stored import DEQUANTIZE, stored_parts
from .verdict import Verdict, leave_experts, left_alone, parameters, summary

smelt = torch.ops.smelt
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

    Legal when an operator exists for the form: 4 bits with groups of whole features, 8 bits without
    zero points. Values and zero points are kept bit for bit; a scale that bfloat16 cannot hold is
    rounded, and the verdict says by how much at most. Every other form stays the dequantized 16-bit
    weight it is, and its verdict says why. Pays because a decode step reads every weight once.
    """

    name = "keep-quantized"
    summary = "linears of a quantized checkpoint keep its integers, scales and zero points"
    requires = Dialect.SEMANTIC
    produces = Dialect.QUANTIZED
    numerics = Lossy(max_kl=0.01, min_top1=0.9)
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
    group = int(parts[0].args["group"])
    scheme = Scheme("int4" if _q(program, parts[0]) == torch.uint8 else "int8", group)
    linear = replace(linear, layer=layer_name(names), sources=names, scheme=scheme, reason=None)
    reason = _no_operator(program, linear, parts, source)
    if reason is not None:
        dtype = str(program.weights.specs[linear.weight].dtype).removeprefix("torch.")
        return replace(linear, reason=f"{reason}: dequantized to {dtype}"), None
    activations = parts[0].args["form"]["activations"]
    if activations is None:
        return linear, None
    return linear, f"its activations ({activations}) stay as they are: no operator yet"


def _q(program: Program, part: Step) -> torch.dtype:
    return program.weights.specs[part.inputs[0]].dtype


def _no_operator(
    program: Program, linear: Linear, parts: list[Step], source: TensorSource | None
) -> str | None:
    """Why no operator computes with this form; None when one does. The one place that decides."""
    args = parts[0].args
    assert isinstance(linear.node.args[1], fx.Node)
    if len(linear.node.args[1].users) > 1:
        return "its weight is read in several places"
    if any(_q(program, part).is_floating_point for part in parts):
        return f"no operator yet for float8 weights (activations {args['form']['activations']})"
    if any(part.args["form"]["order"] == "uneven" for part in parts):
        return "its groups have different sizes"
    if args["group"] != linear.k and args["group"] % 8:
        return f"kernels read features eight at a time, and its groups have {args['group']}"
    rows = [int(part.args["rows"]) for part in parts]
    n = [program.weights.specs[part.outputs[0]].shape[0] for part in parts]
    whole = all(row >= size for row, size in zip(rows, n, strict=True))
    if any(row != 1 for row in rows) and not (whole and args["group"] == linear.k):
        return "no operator yet for scales that blocks of rows share"
    if linear.scheme.format == "int8" and _has_zeros(program, parts, source):
        return "no operator yet for 8 bits with zero points"
    if linear.scheme.format == "int4" and any(row != 1 for row in rows):
        return "no operator yet for 4 bits with one scale a tensor"
    return None


def _input(part: Step, kind: str) -> str | None:
    """Planned name of a dequantize step's "zeros" or "order"."""
    return dict(zip(part.args["kinds"], part.inputs[2:], strict=True)).get(kind)


def _has_zeros(program: Program, parts: list[Step], source: TensorSource | None) -> bool:
    names = [name for part in parts if (name := _input(part, "zeros")) is not None]
    if not names or source is None:
        return bool(names)
    return any(bool(value.any()) for _, value in program.weights.materialize(names, source))


def to_kept(program: Program, linear: Linear, parts: list[Step]) -> None:
    """Replace `linear` by its quantized operator over the integers of `parts`, joined along N."""
    plan = program.weights
    int4 = linear.scheme.format == "int4"
    fields = ("qweight", "scales", "zeros") if int4 else ("qweight", "scales")
    x: Any = linear.node.args[0]
    columns: list[list[str]] = []
    by_group: str | None = None
    for part in parts:
        q, scales, zeros, sorting = _in_order(program, part)
        by_group = by_group or sorting
        layer = str(part.args["layer"])
        names = [f"{layer}.weight.{field}" for field in fields]
        if len(parts) == 1:
            names = [f"{linear.weight}.{field}" for field in fields]
        if int4:
            given = [q, scales] if zeros is None else [q, scales, zeros]
            columns.append(list(plan.add("keep_int4", names, given, layer=layer)))
        else:
            groups = linear.scheme.groups(linear.k)
            columns.append(
                list(plan.add("keep_int8", names, [q, scales], groups=groups, layer=layer))
            )
    packed = columns[0]
    if len(parts) > 1:
        packed = [
            plan.add("cat", [f"{linear.weight}.{field}"], column, dim=0)[0]
            for field, column in zip(fields, zip(*columns, strict=True), strict=True)
        ]
    target = smelt.linear_int4.default if int4 else smelt.linear_int8.default
    weights = [program.weight(name) for name in packed]
    index = program.weight(by_group) if by_group is not None else None
    with program.graph.inserting_before(linear.node):
        if index is not None:
            last = len(shape(x)) - 1
            x = program.call(aten.index_select.default, (x, last, index), like=linear.node)
        node = program.call(target, (x, *weights, linear.bias), like=linear.node)
    program.replace(linear.node, node)


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
    changed = 0.0
    if source is not None:
        names = [part.inputs[1] for part in parts]
        found = program.weights.materialize(names, source)
        changed = max(bfloat16_change(scales) for _, scales in found)
    if changed:
        remarks.append(f"scales rounded to bfloat16, by at most {changed:.2%}")
    return Verdict(
        linear.layer,
        str(parts[0].args["form"]["method"]),
        linear.scheme.format,
        0 if linear.scheme.group_size == linear.k else linear.scheme.group_size,
        linear.parameters,
        scale_change=changed,
        reason="; ".join(remarks) or None,
    )


def bfloat16_change(scales: torch.Tensor) -> float:
    """The largest relative change of a scale when it is rounded to bfloat16."""
    wide = scales.double()
    change = (wide.to(torch.bfloat16).double() - wide).abs() / wide.abs()
    return float(change.nan_to_num(0.0, 0.0, 0.0).max())
