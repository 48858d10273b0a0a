"""Layers of experts of a quantized checkpoint: which keep its integers, and the rewrite of one.

A checkpoint holds each expert's gate, up and down as linears of their own; the binding stacks their
dequantized weights to the model's gate_up [E, 2I, K] and down [E, K, I]. Read backwards, the plan
says which stored linear every range of rows is. The operator wants those rows one below the other
(`runtime/ops/experts_quantized.py`), so keeping them is unpacking one expert's linear after the
other and joining what comes out: no dequantized weight is ever made.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch

from smelt.passes.program import Program
from smelt.passes.rewrite import aten, shape
from smelt.passes.weights import Step, TensorSource, WeightPlan, operation

from .experts import MATRICES, SEVERAL_PLACES, Experts, fields, find_experts, replace_experts
from .kept import NEXT_EXPERT, expert_block, kept_expert_scheme, unfit_groups
from .spec import QuantSpec, Scheme
from .stored import DEQUANTIZE
from .stored_values import canonical, have_zeros, in_order, largest_change
from .verdict import Verdict


@dataclass(frozen=True)
class KeptExperts:
    """A layer of experts and the `dequantize_stored` steps of its experts' linears.

    experts: with the scheme that keeps them, or the reason why they stay at 16 bits. gate_up: of
    each expert, gate and up; down: of each expert. block: fp8's, cut so that every linear begins a
    block of its own. remark: what is kept otherwise than the checkpoint has it.
    """

    experts: Experts
    gate_up: tuple[tuple[Step, ...], ...] = ()
    down: tuple[Step, ...] = ()
    block: int = 0
    remark: str | None = None

    @property
    def parts(self) -> list[Step]:
        return [*chain.from_iterable(self.gate_up), *self.down]


def decide_experts(program: Program, source: TensorSource | None) -> list[KeptExperts]:
    """The program's layers of experts, each with the decision about it."""
    return [_decide(program, e, source) for e in find_experts(program, QuantSpec("rtn"))]


def _decide(program: Program, experts: Experts, source: TensorSource | None) -> KeptExperts:
    def left(reason: str) -> KeptExperts:
        dtype = program.weights.specs[experts.weights[0]].dtype
        ending = f": dequantized to {str(dtype).removeprefix('torch.')}"
        return KeptExperts(replace(experts, reason=reason + ending))

    plan = program.weights
    if not any(step.op == DEQUANTIZE for step in plan.needed(experts.weights)):
        return KeptExperts(replace(experts, reason="the checkpoint holds them at 16 bit"))
    if experts.reason == SEVERAL_PLACES:
        return left(experts.reason)
    sizes = zip(experts.weights, (2, 1), strict=True)
    rows = [_rows_of(plan, name, experts.count, linears) for name, linears in sizes]
    if any(matrix is None for matrix in rows):
        return left("its experts' weights are put together in a way that is not known")
    made = plan.producers()
    for name in (name for matrix in rows for expert in matrix or () for name in expert):
        if made[name].op != DEQUANTIZE:
            path = name.removeprefix("checkpoint:").removesuffix(".weight")
            return left(f"the checkpoint holds {path} at 16 bit")
    gate_up, down = ([[made[n] for n in expert] for expert in matrix or ()] for matrix in rows)
    kept = KeptExperts(experts, tuple(map(tuple, gate_up)), tuple(part for (part,) in down))
    scheme, block, remark = _scheme(plan, kept, source)
    if scheme is None:
        return left(str(remark))
    named = replace(experts, scheme=scheme, reason=None)
    return replace(kept, experts=named, block=block, remark=remark)


def _rows_of(plan: WeightPlan, name: str, count: int, linears: int) -> list[list[str]] | None:
    """Of each of `count` experts the planned weights, as many as `linears`, that its rows of `name`
    are joined from; None if that cannot be read from the plan."""
    made = plan.producers()
    step = made[name]
    if step.op == "cast":
        step = made[step.inputs[0]]
    stacks = [step]
    if step.op == "cat" and step.args["dim"] == 1:
        stacks = [made[part] for part in step.inputs]
    if len(stacks) != linears:
        return None
    for stack in stacks:
        if stack.op != "stack" or stack.args["dim"] != 0 or len(stack.inputs) != count:
            return None
    return [[stack.inputs[e] for stack in stacks] for e in range(count)]


def _scheme(
    plan: WeightPlan, kept: KeptExperts, source: TensorSource | None
) -> tuple[Scheme | None, int, str | None]:
    """(the scheme that keeps these experts, the block of fp8 scales, a remark), or (None, 0, why
    they are dequantized)."""
    first, remark = None, None
    groups: dict[str, tuple[int, str]] = {}
    zeros = have_zeros(plan, kept.parts, source)
    for matrix, part in _named(kept):
        form, layer = part.args["form"], part.args["layer"]
        k = plan.specs[part.outputs[0]].shape[1]
        scheme, remark = kept_expert_scheme(form, zeros=layer in zeros)
        if scheme is None:
            return None, 0, f"{layer}: {remark}"
        if first is None:
            first = (scheme, layer)
        if scheme.format != first[0].format:
            return None, 0, f"{first[1]} is {first[0].format}, and {layer} is {scheme.format}"
        # A linear with one group a row may stand beside others with as many features a group.
        group = int(part.args["group"]) if scheme.format != "fp8" else scheme.group_size
        before, whose = groups.setdefault(matrix, (group, layer))
        if group != before:
            return None, 0, f"{whose} has groups of {before} features, and {layer} of {group}"
        reason = _unfit(part, scheme, group, k)
        if reason is not None:
            return None, 0, f"{layer}: {reason}"
    assert first is not None
    scheme = first[0]
    order = _order(kept)
    if order is not None:
        return None, 0, order
    if scheme.format == "fp8":
        sizes = {matrix: size for matrix, (size, _) in groups.items()}
        if len(set(sizes.values())) > 1:
            return None, 0, f"gate_up has blocks of {sizes['gate_up']}, and down of {sizes['down']}"
        rows = (plan.specs[part.outputs[0]].shape[0] for part in kept.parts)
        block = expert_block(scheme.group_size, rows)
        if block is None:
            return None, 0, NEXT_EXPERT.format(scheme.group_size)
        return Scheme("fp8", block), block, remark
    return replace(scheme, group_size=groups["gate_up"][0]), 0, remark


def _named(kept: KeptExperts) -> Iterable[tuple[str, Step]]:
    """(matrix, part) of all parts, expert by expert."""
    for pair, down in zip(kept.gate_up, kept.down, strict=True):
        yield from (("gate_up", part) for part in pair)
        yield ("down", down)


def _unfit(part: Step, scheme: Scheme, group: int, k: int) -> str | None:
    """Why integers that an operator knows cannot be laid out for it."""
    if scheme.format == "fp8":
        return None
    if part.args["form"]["order"] == "uneven":
        return "its groups have different sizes"
    return unfit_groups(group, k)


def _order(kept: KeptExperts) -> str | None:
    """Why features that lie out of order cannot be put in order, or None.

    All experts read one input, so what they read can be selected once and for all of them. What an
    expert's down reads is its own: there the rows of its gate and up change places.
    """
    first = kept.gate_up[0][0]
    for part in chain.from_iterable(kept.gate_up):
        if _sorted(part) != _sorted(first):
            names = f"{first.args['layer']} and {part.args['layer']}"
            return f"{names} read their input's features in different orders (desc_act)"
    return None


def _sorted(part: Step) -> str | None:
    """The order of features that a linear's groups ask of its input; None where it is theirs."""
    order = part.args["form"]["order"]
    return None if order == "groups" else order


def keep_experts(program: Program, kept: KeptExperts) -> None:
    """Replace the layer by its quantized operator over the stored values."""
    plan, experts = program.weights, kept.experts
    orders: list[str | None] = []
    columns: dict[str, list[list[str]]] = {matrix: [] for matrix in MATRICES}
    for pair, down in zip(kept.gate_up, kept.down, strict=True):
        found, by_group = _values(plan, kept, down)
        columns["down"].append(found)
        for part in pair:
            found, order = _values(plan, kept, part, rows=by_group)
            columns["gate_up"].append(found)
            orders.append(order)
    names = []
    for matrix, weight in zip(MATRICES, experts.weights, strict=True):
        joined = zip(fields(experts.scheme), zip(*columns[matrix], strict=True), strict=True)
        names.append(
            tuple(
                plan.add("join_experts", [f"{weight}.{field}"], parts, weight=weight)[0]
                for field, parts in joined
            )
        )
    if orders[0] is not None:
        _select(program, experts, orders[0])
    replace_experts(program, experts, names[0], names[1])


def _values(
    plan: WeightPlan, kept: KeptExperts, part: Step, rows: str | None = None
) -> tuple[list[str], str | None]:
    """(the canonical form of one linear as planned names, the order of its features or None).

    rows: the order in which its rows are stored.
    """
    scheme, layer = kept.experts.scheme, str(part.args["layer"])
    k = plan.specs[part.outputs[0]].shape[1]
    q, scales, zeros, order = in_order(plan, part)
    if kept.block and kept.block != part.args["group"]:
        how = {"rows": part.args["rows"], "group": part.args["group"], "block": kept.block}
        n = plan.specs[q].shape[0]
        (scales,) = plan.add("cut_blocks", [f"{scales}.cut"], [scales], n=n, k=k, **how)
    if not kept.block and scheme.format != "fp8":
        scheme = replace(scheme, group_size=int(part.args["group"]))
    given = (plan, scheme, f"{layer}.weight", q, scales, zeros)
    names = canonical(*given, k=k, layer=layer)
    if rows is not None:
        outputs = [f"{name}.rows" for name in names]
        names = list(plan.add("take_rows", outputs, [rows, *names]))
    return names, order


def _select(program: Program, experts: Experts, order: str) -> None:
    """Let the layer read its input's features in `order`, int64 [K]."""
    x: Any = experts.node.args[0]
    weight = experts.weights[0]
    (name,) = program.weights.add("order_of_experts", [f"{weight}.order"], [order], weight=weight)
    index = program.weight(name)
    with program.graph.inserting_before(experts.node):
        args = (x, len(shape(x)) - 1, index)
        x = program.call(aten.index_select.default, args, like=experts.node)
    experts.node.update_arg(0, x)


def experts_verdict(program: Program, kept: KeptExperts, source: TensorSource | None) -> Verdict:
    """What is said of a layer that is kept."""
    experts, scheme = kept.experts, kept.experts.scheme
    remarks, changed = [kept.remark] if kept.remark else [], 0.0
    form = kept.parts[0].args["form"]
    if kept.block and kept.block != form["group"]:
        remarks.append(f"scales of blocks of {form['group']} repeated for blocks of {kept.block}")
    if scheme.format != "fp8":
        changed = largest_change(program.weights, kept.parts, source)
    if changed:
        remarks.append(f"scales rounded to bfloat16, by at most {changed:.2%}")
    return Verdict(
        experts.layer,
        str(form["method"]),
        scheme.format,
        0 if scheme.group_size == experts.k else scheme.group_size,
        experts.parameters,
        scale_change=changed,
        reason="; ".join(remarks) or None,
    )


@operation("join_experts")
def _join_experts(*parts: torch.Tensor, weight: str) -> tuple[torch.Tensor, ...]:
    """One field of each expert's linears, one below the other. weight: the planned [E, N, K] whose
    rows they are, for those who read the plan."""
    return (torch.cat(parts),)


@operation("order_of_experts")
def _order_of_experts(order: torch.Tensor, *, weight: str) -> tuple[torch.Tensor, ...]:
    """int64 [K], the feature each column of all experts of `weight` belongs to."""
    return (order.clone(),)


@operation("take_rows")
def _take_rows(rows: torch.Tensor, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Each of `parts` [N, ...] with its rows in the order `rows`, int64 [N]."""
    return tuple(part[rows] for part in parts)


@operation("cut_blocks")
def _cut_blocks(
    scales: torch.Tensor, *, n: int, k: int, rows: int, group: int, block: int
) -> tuple[torch.Tensor, ...]:
    """Scales of rows x group weights -> of block x block, which must divide both: each repeated.

    scales [ceil(n / rows), ceil(k / group)] -> [n / block, ceil(k / block)].
    """
    wide = scales.reshape(-(-n // rows), -(-k // group))
    wide = wide.repeat_interleave(rows // block, 0).repeat_interleave(group // block, 1)
    return (wide[: -(-n // block), : -(-k // block)].contiguous(),)
