"""What is said about each layer after quantization, and the one line about the whole model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from torch import fx

from smelt.passes.base import PassResult
from smelt.passes.dialect import smelt_name
from smelt.passes.program import Program, Role
from smelt.passes.rewrite import is_call, shape

from .experts import Experts
from .linears import Linear
from .spec import Scheme


@dataclass(frozen=True)
class Verdict:
    """One linear layer's outcome, or that of a layer of experts, as it stands in the report.

    group_size: the one used, 0 for the whole row. alpha: AWQ's exponent, 0 when no scale paid.
    error_rtn and error: the layer's output error relative to its output, ||dY||^2 / ||Y||^2, on
    calibration rows by plain rounding and as chosen; None where nothing was measured. reason: why
    it was left alone, or why less was done than the method can. activations: how the input is
    quantized. weight: the planned name, by which the kernel that choose-providers notes is found.
    scale_change: of weights that the checkpoint holds quantized, the largest relative change of a
    scale. Of experts, errors are means over the matrices that were searched; tokens_per_expert: the
    calibration tokens that each got; experts_rounded: those that got too few to search.
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
    tokens_per_expert: list[int] | None = None
    experts_rounded: list[int] | None = None

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


def left_alone(layer: Linear | Experts) -> Verdict:
    """The verdict of a layer that stays at 16 bits."""
    verdict = Verdict(layer.layer, "none", "16 bit", 0, layer.parameters, reason=layer.reason)
    return replace(verdict, weight=layer.weight) if isinstance(layer, Linear) else verdict


def leave_experts(result: PassResult, layers: Sequence[Experts]) -> None:
    """Record those of `layers` that have a reason to stay as they are."""
    for experts in layers:
        if experts.reason is not None:
            result.decline(experts.node, experts.reason)
            result.notes.append(left_alone(experts).to_json())


def expected(program: Program) -> int | None:
    """What `rewrite_each` should match: the linear modules of the traced tree, a fused linear as
    its parts, and its layers of experts."""
    counts = program.facts.module_counts
    return counts["linear"] + counts.get("experts", 0) if "linear" in counts else None


class ExpertRewrite(Protocol):
    """The layers of experts of a program, and the rewrite of one."""

    @property
    def found(self) -> Sequence[Experts]: ...

    def rewrite(self, experts: Experts) -> Verdict: ...


def rewrite_each(
    program: Program,
    linears: Sequence[Linear],
    rewrite: Callable[[Linear, PassResult], Verdict],
    experts: ExpertRewrite,
) -> PassResult:
    """Rewrite every linear and every layer of experts that is quantized; everybody's verdicts.

    `rewrite` is given the result, too, to say there what it declined of a linear it quantizes.
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
    result.matched += len(experts.found)
    leave_experts(result, experts.found)
    for layer in experts.found:
        if layer.reason is None:
            result.notes.append(experts.rewrite(layer).to_json())
            result.rewritten += 1
    result.notes.append(summary(linears, weights, experts.found))
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
        return "experts"
    return "norms and biases" if len(shape(node)) < 2 else "other weights"


def summary(
    linears: Sequence[Linear], weights: Sequence[Parameter], experts: Sequence[Experts] = ()
) -> dict[str, Any]:
    """{"summary": "quantized 98.7 % of the parameters; left at 16 bit: ...", and its numbers}."""
    done = {linear.weight for linear in linears if linear.reason is None}
    reasons = {linear.weight: linear.reason for linear in linears if linear.reason}
    count = len(done)
    for layer in experts:
        if layer.reason is None:
            done.update(layer.weights)
        else:
            reasons |= dict.fromkeys(layer.weights, f"experts ({layer.reason})")
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
        "linears_quantized": count,
        "experts_quantized": sum(layer.reason is None for layer in experts),
        "left": dict(left.most_common()),
    }
