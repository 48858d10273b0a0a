"""The values of a stored linear as planned names: in the order of the features, in canonical form.

A `dequantize_stored` step says which planned tensors a checkpoint's linear is (`stored.py`); from
them the steps added here make what an operator reads, without a dequantized weight in between.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from smelt.passes.weights import Step, TensorSource, WeightPlan

from .spec import Scheme


def stored_input(part: Step, kind: str) -> str | None:
    """Planned name of a dequantize step's "zeros" or "order"."""
    return dict(zip(part.args["kinds"], part.inputs[2:], strict=True)).get(kind)


def have_zeros(plan: WeightPlan, parts: Sequence[Step], source: TensorSource | None) -> set[str]:
    """The layers among `parts` with 8 bits that have zero points other than 0. source: None counts
    all that the checkpoint holds as such."""
    eights = [part for part in parts if part.args["form"]["bits"] == 8]
    layers = {stored_input(part, "zeros"): str(part.args["layer"]) for part in eights}
    held = {name: layer for name, layer in layers.items() if name is not None}
    if not held or source is None:
        return set(held.values())
    return {held[name] for name, value in plan.materialize(held, source) if bool(value.any())}


def in_order(plan: WeightPlan, part: Step) -> tuple[str, str, str | None, str | None]:
    """(q, scales, zeros, the sorting of features or None) with every group's features together."""
    q, scales = part.inputs[:2]
    zeros, order = stored_input(part, "zeros"), stored_input(part, "order")
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


def canonical(
    plan: WeightPlan,
    scheme: Scheme,
    base: str,
    q: str,
    scales: str,
    zeros: str | None,
    *,
    k: int,
    layer: str,
) -> list[str]:
    """The canonical form of a linear of K features, as planned names that begin with `base`."""
    fields = ("qweight", "scales", "zeros") if scheme.format == "int4" else ("qweight", "scales")
    names = [f"{base}.{field}" for field in fields]
    if scheme.format == "int4":
        given = [q, scales] if zeros is None else [q, scales, zeros]
        return list(plan.add("keep_int4", names, given, layer=layer))
    if scheme.format == "fp8":
        return list(plan.add("keep_fp8", names, [q, scales], block=scheme.group_size, layer=layer))
    if scheme.activations != "none":
        return list(plan.add("keep_w8a8", names, [q, scales], layer=layer))
    return list(plan.add("keep_int8", names, [q, scales], groups=scheme.groups(k), layer=layer))


def largest_change(plan: WeightPlan, parts: Sequence[Step], source: TensorSource | None) -> float:
    """The largest relative change of a scale of `parts` that is rounded to bfloat16; 0 without a
    source to read them from."""
    if source is None:
        return 0.0
    found = plan.materialize([part.inputs[1] for part in parts], source)
    return max(bfloat16_change(scales) for _, scales in found)


def bfloat16_change(scales: torch.Tensor) -> float:
    """The largest relative change of a scale when it is rounded to bfloat16."""
    wide = scales.double()
    change = (wide.to(torch.bfloat16).double() - wide).abs() / wide.abs()
    return float(change.nan_to_num(0.0, 0.0, 0.0).max())
