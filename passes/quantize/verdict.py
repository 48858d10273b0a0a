"""What is said about each layer after quantization, and the one line about the whole model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import fx

from smelt.passes.base import PassResult
from smelt.passes.dialect import smelt_name
from smelt.passes.program import Program, Role
from smelt.passes.rewrite import is_call, shape

from .linears import Linear
from .spec import Scheme

EXPERTS = "experts (not supported yet)"


@dataclass(frozen=True)
class Verdict:
    """One linear layer's outcome, as it stands in the report.

    group_size: the one used, 0 for the whole row. alpha: AWQ's exponent, 0 when no scale paid.
    error_rtn and error: the layer's output error relative to its output, ||dY||^2 / ||Y||^2, on
    calibration rows by plain rounding and as chosen; None where nothing was measured. reason: why
    it was left alone, or why less was done than the method can. activations: how the input is
    quantized. weight: the planned name, by which the kernel that choose-providers notes is found.
    scale_change: of weights that the checkpoint holds quantized, the largest relative change of a
    scale.
    """

    layer: str
    method: str
    format: str
    group_size: int
    parameters: int
    alpha: float | None = None
    error_rtn: float | None = None
    error: float | None = None
    reason: str | None = None
    activations: str | None = None
    weight: str | None = None
    scale_change: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


def left_alone(linear: Linear) -> Verdict:
    """The verdict of a linear that stays at 16 bits."""
    verdict = Verdict(linear.layer, "none", "16 bit", 0, linear.parameters)
    return replace(verdict, reason=linear.reason, weight=linear.weight)


def left_experts(program: Program, result: PassResult) -> None:
    """Record the expert layers, whose weights no method here quantizes yet."""
    for node in program.calls(torch.ops.smelt.experts.default):
        result.decline(node, EXPERTS)


def rewrite_each(
    program: Program, linears: Sequence[Linear], rewrite: Callable[[Linear, PassResult], Verdict]
) -> PassResult:
    """Call `rewrite` on every linear that is quantized; the result with everybody's verdicts.

    It is given the result, too, to say there what it declined of a linear it quantizes.
    """
    weights = parameters(program)
    result = PassResult()
    for linear in linears:
        count = max(1, len(linear.sources))
        result.matched += count
        if linear.reason is not None:
            result.decline(linear.node, linear.reason)
            result.notes.append(left_alone(linear).to_json())
            continue
        verdict = rewrite(linear, result)
        result.notes.append(replace(verdict, weight=linear.weight).to_json())
        result.rewritten += count
    left_experts(program, result)
    result.notes.append(summary(linears, weights))
    program.clean()
    return result


def group_note(linear: Linear) -> str | None:
    """The reason to record when the group size does not divide K."""
    return indivisible(linear.scheme, linear.k)


def indivisible(scheme: Scheme, k: int) -> str | None:
    """What a layer of K features makes of a group size that does not divide them."""
    if scheme.format == "fp8" or scheme.fits(k):
        return None
    return f"K = {k} is not divisible by {scheme.group_size}: one group a row"


def group_size(linear: Linear) -> int:
    """The group size a linear really gets, 0 for the whole row."""
    return linear.scheme.group_size if linear.scheme.fits(linear.k) else 0


@dataclass(frozen=True)
class Parameter:
    """A checkpoint tensor the graph reads, and what reads it."""

    name: str
    count: int
    kind: str


def parameters(program: Program) -> list[Parameter]:
    """Every floating tensor from the checkpoint, counted once.

    Read before the rewrite: afterwards the graph reads packed weights.
    """
    found = []
    for node in program.placeholders(Role.WEIGHT):
        name = program.inputs[node.name].name
        spec = program.weights.specs[name]
        if spec.dtype.is_floating_point and name not in program.weights.computed:
            found.append(Parameter(name, math.prod(spec.shape), _kind(node)))
    return found


def _kind(node: fx.Node) -> str:
    users = list(node.users)
    if any(is_call(user, torch.ops.aten.embedding.default) for user in users):
        return "embeddings"
    if any(smelt_name(user) == "experts" for user in users):
        return EXPERTS
    return "norms and biases" if len(shape(node)) < 2 else "other weights"


def summary(linears: Sequence[Linear], weights: Sequence[Parameter]) -> dict[str, Any]:
    """{"summary": "quantized 98.7 % of the parameters; left at 16 bit: ...", and its numbers}."""
    done = {linear.weight for linear in linears if linear.reason is None}
    reasons = {linear.weight: linear.reason for linear in linears if linear.reason}
    left: Counter[str] = Counter()
    for weight in weights:
        if weight.name not in done:
            kind = reasons.get(weight.name) or weight.kind
            tied = weight.kind == "embeddings" and weight.name in reasons
            left[f"embeddings, {kind}" if tied else kind] += weight.count
    total = sum(weight.count for weight in weights)
    quantized = sum(weight.count for weight in weights if weight.name in done)
    text = f"quantized {100 * quantized / max(total, 1):.1f} % of the parameters"
    if left:
        text += "; left at 16 bit: " + ", ".join(kind for kind, _ in left.most_common())
    return {
        "summary": text,
        "parameters": total,
        "parameters_quantized": quantized,
        "linears_quantized": len(done),
        "left": dict(left.most_common()),
    }
