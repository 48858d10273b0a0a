"""SmoothQuant as a graph pass: int8 weights times int8 inputs, outliers moved into the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from smelt.passes.base import Lossy, Pass, PassResult
from smelt.passes.program import Dialect, Program
from smelt.passes.weights import TensorSource
from smelt.runtime.errors import SmeltError, UserError

from .awq_search import Scale
from .calibrate import Progress, Replacement, Statistics, calibrate
from .fold import fold
from .formats import check_finite
from .groups import Group, find_groups
from .linears import Linear, find_linears
from .smooth_search import ALPHAS, Inputs, output_error, search_alpha
from .spec import QuantSpec
from .verdict import Verdict, rewrite_each
from .w8a8 import LABELS, check_width, product, to_w8a8


@dataclass(frozen=True)
class SmoothQuantOptions:
    """spec: alpha and activations; samples: token ids of calibration sequences; source: checkpoint.

    Neither samples nor source are needed for alpha 0 with dynamic activations. max_rows: tokens on
    which output errors are measured. progress(name, done, total).
    """

    spec: QuantSpec = field(default_factory=lambda: QuantSpec("smoothquant"))
    samples: Sequence[Sequence[int]] = ()
    source: TensorSource | None = None
    max_rows: int = 512
    seed: int = 0
    progress: Progress | None = None


@dataclass
class _Choice:
    """What was found for one linear. input_scale float32 [1] or None; errors of its output."""

    scale: Scale | None
    input_scale: torch.Tensor | None
    error_rtn: float
    error: float


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
        """One match a linear module of the traced tree; a fused linear counts as its parts."""
        return program.facts.module_counts.get("linear")

    def run(self, program: Program, options: SmoothQuantOptions) -> PassResult:
        spec = options.spec
        linears = find_linears(program, spec)
        for linear in linears:
            if linear.reason is None:
                check_width(linear)
        groups = find_groups(program, linears)
        choices: dict[str, _Choice] = {}
        applied: dict[str, dict[str, str]] = {}
        if spec.needs_calibration:
            choices = _calibrated(program, groups, options)
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

        return rewrite_each(program, linears, rewrite)


def _calibrated(
    program: Program, groups: Sequence[Group], options: SmoothQuantOptions
) -> dict[str, _Choice]:
    """Factors and input scales of every linear, by its weight's name."""
    spec = options.spec
    if options.source is None or not options.samples:
        raise UserError(
            "smoothquant needs calibration text and the checkpoint to measure activations; with "
            "alpha 0 and dynamic activations it needs neither"
        )
    choices: dict[str, _Choice] = {}

    def choose(
        group: Group, values: list[torch.Tensor], statistics: Statistics
    ) -> list[Replacement]:
        return _choose(group, values, statistics, spec, choices)

    calibrate(
        program,
        groups,
        options.samples,
        options.source,
        choose,
        options.max_rows,
        options.seed,
        options.progress,
    )
    return choices


def _choose(
    group: Group,
    values: list[torch.Tensor],
    statistics: Statistics,
    spec: QuantSpec,
    choices: dict[str, _Choice],
) -> list[Replacement]:
    """Find alpha for one group; what its linears compute from then on, inputs quantized too."""
    for linear, value in zip(group.linears, values, strict=True):
        check_finite(value, linear.layer)
    inputs = Inputs(statistics.largest, statistics.rows, spec.activations == "static")
    scale, s = None, None
    if group.producer is not None and group.columns is not None:
        alphas = ALPHAS if spec.alpha is None else (spec.alpha,)
        scale = search_alpha(values, inputs, group.columns, group.producer.channels, alphas)
        s = scale.factor[group.columns]
        if not torch.isfinite(s).all() or not (s > 0).all():
            raise SmeltError(
                f"{group.name}: the scale found by calibration is not finite; "
                "is the calibration text like what the model is meant for?"
            )
    plain = output_error(values, inputs, None)
    found = plain if s is None else output_error(values, inputs, s)
    for linear, before, after in zip(group.linears, plain, found, strict=True):
        choices[linear.weight] = _Choice(scale, inputs.scale(s), before, after)
    return [product(value, s, inputs.scale(s)) for value in values]


def _verdict(
    linear: Linear, spec: QuantSpec, choice: _Choice | None, reason: str | None
) -> Verdict:
    return Verdict(
        linear.layer,
        "smoothquant",
        "int8",
        0,
        linear.parameters,
        alpha=choice.scale.alpha if choice and choice.scale else None,
        error_rtn=choice.error_rtn if choice else None,
        error=choice.error if choice else None,
        reason=reason,
        activations=LABELS[spec.activations],
    )
