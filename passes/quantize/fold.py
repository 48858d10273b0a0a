"""Fold scales into their producers, as steps of the weight plan.

A norm's weight (and bias) is divided; what the rounding of the divided weight leaves over is handed
to the linears, so that folding is exact up to float32. A linear that is quantized itself gets its
rows divided inside its quantize step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from smelt.passes.program import Program
from smelt.passes.weights import operation

from .awq_search import Scale
from .groups import Group, Producer


@operation("take")
def _take(x: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """x [P], index int64 [K] -> x[index]."""
    return (x[index],)


def fold(
    program: Program, scaled: Sequence[tuple[Group, Scale | None]]
) -> dict[str, dict[str, str]]:
    """Divide the producers of `scaled`; what each linear's quantize step then has to apply.

    Returns, by the linear's weight name, {"columns": planned name} for what its features are
    multiplied with and {"rows": planned name} for what its outputs are divided by.
    """
    applied: dict[str, dict[str, str]] = {}
    for group, scale in scaled:
        producer = group.producer
        if producer is None or group.columns is None or scale is None or scale.alpha == 0:
            continue
        factor = program.weights.put(f"{producer.weight}.factor", scale.factor)
        factor = _divide(program, producer, factor, applied)
        columns = _for_columns(program, factor, group.columns, producer.channels)
        for linear in group.linears:
            applied.setdefault(linear.weight, {})["columns"] = columns
    return applied


def _divide(
    program: Program, producer: Producer, factor: str, applied: dict[str, dict[str, str]]
) -> str:
    """Divide the producer's rows; the name of the factor that it really got."""
    plan = program.weights
    if producer.linear is None:
        node = program.weight(producer.weight)
        names = [producer.weight, f"{producer.weight}.folded"]
        new, factor = plan.add(
            "fold_factor", names, [producer.weight, factor], offset=producer.offset
        )
        program.point_weight(node, new)
    elif producer.linear.reason is None:
        applied.setdefault(producer.weight, {})["rows"] = factor
    else:
        node = program.weight(producer.weight)
        (new,) = plan.add("divide_rows", [producer.weight], [producer.weight, factor])
        program.point_weight(node, new)
    if producer.bias is not None:
        node = program.weight(producer.bias)
        (new,) = plan.add("divide_rows", [producer.bias], [producer.bias, factor])
        program.point_weight(node, new)
    return factor


def _for_columns(program: Program, factor: str, columns: torch.Tensor, channels: int) -> str:
    if torch.equal(columns, torch.arange(channels)):
        return factor
    index = program.weights.put(f"{factor}.columns", columns)
    (name,) = program.weights.add("take", [f"{factor}.taken"], [factor, index])
    return name
