"""SmoothQuant as a graph pass: int8 weights times int8 inputs, outliers moved into the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from smelt.passes.base import Lossy, Pass, PassResult
from smelt.passes.program import Dialect, Program
from smelt.runtime.errors import SmeltError, UserError

from .awq_search import Scale
from .calibrate import CalibrationOptions, Statistics, calibrate
from .expert_layers import ExpertLayers
from .experts import find_experts
from .fold import fold
from .formats import check_finite
from .graph_run import Replacement
from .groups import Group, find_groups
from .linears import Linear, find_linears
from .smooth_search import ALPHAS, Inputs, output_error, search_alpha
from .spec import QuantSpec
from .verdict import Verdict, expected, rewrite_each
from .w8a8 import LABELS, check_width, product, to_w8a8

EXPERTS_REMARK = "weights only and not smoothed: the 16-bit router reads the same input"


@dataclass(frozen=True)
class SmoothQuantOptions(CalibrationOptions):
    """As of every calibrated method; alpha 0 with dynamic activations needs no samples."""

    spec: QuantSpec = field(default_factory=lambda: QuantSpec("smoothquant"))


@dataclass(frozen=True)
class SmoothQuantFound:
    """What was found for one linear.

    factor: of its group, float32 [P], a producer's channel each, None where nothing can be folded;
    alpha: the exponent behind it. input_scale: float32 [1] or None. Errors relative to the output.
    """

    factor: torch.Tensor | None
    alpha: float | None
    input_scale: torch.Tensor | None
    error_rtn: float
    error: float

    @property
    def scale(self) -> Scale | None:
        return None if self.factor is None else Scale(self.alpha or 0.0, self.factor)


@dataclass(frozen=True)
class SmoothQuant:
    """The search for alpha, and of static input scales, as a calibration method."""

    spec: QuantSpec
    found: ClassVar[type[SmoothQuantFound]] = SmoothQuantFound
    whole_gram: ClassVar[bool] = False
    original: ClassVar[bool] = False
    copies: ClassVar[float] = 4.2
    matrices: ClassVar[float] = 0.0
    wide: ClassVar[bool] = True

    def search(
        self, group: Group, weights: Sequence[torch.Tensor], statistics: Statistics
    ) -> list[SmoothQuantFound]:
        """One factor for the group; errors with both sides quantized."""
        for linear, weight in zip(group.linears, weights, strict=True):
            check_finite(weight, linear.layer)
        inputs = Inputs(statistics.largest, statistics.rows, self.spec.activations == "static")
        scale, s = None, None
        if group.producer is not None and group.columns is not None:
            alphas = ALPHAS if self.spec.alpha is None else (self.spec.alpha,)
            scale = search_alpha(weights, inputs, group.columns, group.producer.channels, alphas)
            s = scale.factor[group.columns]
            if not torch.isfinite(s).all() or not (s > 0).all():
                raise SmeltError(
                    f"{group.name}: the scale found by calibration is not finite; "
                    "is the calibration text like what the model is meant for?"
                )
        factor, alpha = (scale.factor, scale.alpha) if scale else (None, None)
        plain = output_error(weights, inputs, None)
        smoothed = plain if s is None else output_error(weights, inputs, s)
        return [
            SmoothQuantFound(factor, alpha, inputs.scale(s), before, after)
            for before, after in zip(plain, smoothed, strict=True)
        ]

    def go_on(
        self, group: Group, weights: Sequence[torch.Tensor], found: Sequence[SmoothQuantFound]
    ) -> list[Replacement]:
        """What the linears compute from then on, their inputs quantized too."""
        chosen: list[Replacement] = []
        for weight, each in zip(weights, found, strict=True):
            s = None if each.factor is None else each.factor[group.columns]
            chosen.append(product(weight, s, each.input_scale))
        return chosen


class QuantizeSmoothQuant(Pass):
    """Linear layers multiply int8 weights by their input, quantized to int8 inside the operator.

    Before::

        n = smelt::rms_norm(x, weight, eps, offset)
        y = aten.linear(n, w, bias)

    After::

        n = smelt::rms_norm(x, weight / s, eps, offset)
        y = smelt::linear_w8a8(n, qweight, scales, None, bias)       # of w * s

    A few channels of the input are far larger than the rest and would leave the others a handful of
    the 255 values. s_j = max|x_j|^alpha / max|w_j|^(1 - alpha) moves them into the weights
    (arXiv:2211.10438): folded into the norm, an earlier linear's rows, or whatever the graph says
    makes those channels, so the runtime multiplies nothing. alpha is given, or searched for each
    group of linears against their own output error with both sides quantized; 0 moves nothing.
    Inputs get one scale a token, or a static one. Legal for any linear over a planned weight that
    nothing else reads; one without a producer to fold into is quantized unsmoothed and says so.
    Experts get int8 weights alone: the router reads what would have to be smoothed for them.
    Pays twice: half the bytes of a decode step, and integer products, which most processors have
    two to four times as many of, in prefill.
    """

    name = "quantize-smoothquant"
    summary = "int8 weights x int8 inputs: activation outliers folded into weights"
    requires = Dialect.SEMANTIC
    produces = Dialect.QUANTIZED
    numerics = Lossy()
    Options = SmoothQuantOptions

    def expect(self, program: Program) -> int | None:
        """One match a linear module or layer of experts of the traced tree."""
        return expected(program)

    def run(self, program: Program, options: SmoothQuantOptions) -> PassResult:
        spec = options.spec
        linears = find_linears(program, spec)
        for linear in linears:
            if linear.reason is None:
                check_width(linear)
        groups = find_groups(program, linears)
        experts = find_experts(program, spec)
        layers = ExpertLayers(program, experts, "smoothquant", remark=EXPERTS_REMARK)
        choices: dict[str, SmoothQuantFound] = {}
        applied: dict[str, dict[str, str]] = {}
        if spec.needs_calibration:
            choices = _calibrated(program, groups, options, layers)
            scaled = [(g, choices[g.linears[0].weight].scale) for g in groups]
            applied = fold(program, scaled)
        reasons = {linear.node: g.reason for g in groups for linear in g.linears}

        def rewrite(linear: Linear, result: PassResult) -> Verdict:
            reason = reasons[linear.node] if spec.alpha != 0 else None
            if reason is not None:
                result.decline(linear.node, f"no scale folded: {reason}")
            choice = choices.get(linear.weight)
            names = applied.get(linear.weight, {})
            static = choice.input_scale if choice else None
            to_w8a8(program, linear, names.get("columns"), names.get("rows"), static)
            return _verdict(linear, spec, choice, reason)

        return rewrite_each(program, linears, rewrite, layers)


def _calibrated(
    program: Program,
    groups: Sequence[Group],
    options: SmoothQuantOptions,
    layers: ExpertLayers,
) -> dict[str, SmoothQuantFound]:
    """Factors and input scales of every linear, by its weight's name."""
    if options.source is None or not options.samples:
        raise UserError(
            "smoothquant needs calibration text and the checkpoint to measure activations; with "
            "alpha 0 and dynamic activations it needs neither"
        )
    return calibrate(program, groups, SmoothQuant(options.spec), options, layers)


def _verdict(
    linear: Linear, spec: QuantSpec, choice: SmoothQuantFound | None, reason: str | None
) -> Verdict:
    return Verdict(
        linear.layer,
        "smoothquant",
        "int8",
        0,
        linear.parameters,
        alpha=choice.alpha if choice else None,
        error_rtn=choice.error_rtn if choice else None,
        error=choice.error if choice else None,
        reason=reason,
        activations=LABELS[spec.activations],
    )
