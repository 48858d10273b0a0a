"""AWQ as a graph pass: scales found on calibration text and folded away, then clipping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from smelt.passes.base import Lossy, Pass, PassResult
from smelt.passes.program import Dialect, Program
from smelt.passes.weights import TensorSource
from smelt.runtime.errors import SmeltError, UserError

from .awq_search import Scale, output_error, search_clip, search_scale
from .calibrate import Progress, Statistics, calibrate
from .fold import fold
from .formats import check_finite, fake_quantize
from .groups import Group, find_groups
from .linears import Linear, find_linears, to_quantized
from .spec import QuantSpec
from .verdict import Verdict, group_note, group_size, rewrite_each


@dataclass(frozen=True)
class AwqOptions:
    """spec: what to quantize; samples: token ids of calibration sequences; source: the checkpoint.

    max_rows: tokens on which the searches measure output errors. progress(name, done, total).
    """

    spec: QuantSpec = field(default_factory=lambda: QuantSpec("awq"))
    samples: Sequence[Sequence[int]] = ()
    source: TensorSource | None = None
    max_rows: int = 512
    seed: int = 0
    progress: Progress | None = None


@dataclass
class _Choice:
    """What was found for one linear. clip uint8 [N, G]; errors relative to the output."""

    scale: Scale | None
    clip: torch.Tensor
    error_rtn: float
    error: float


class QuantizeAwq(Pass):
    """Linear layers get packed int4 weights, scaled and clipped by what their inputs look like.

    Before::

        n = smelt::rms_norm(x, weight, eps, offset)
        y = aten.linear(n, w)

    After::

        n = smelt::rms_norm(x, weight / s, eps, offset)
        y = smelt::linear_int4(n, qweight, scales, zeros, None)      # of w * s, clipped

    A linear's scale is folded where its input channels come from, and the graph says where: a
    norm's weight (and bias), the rows of an earlier linear through views, attention's values and
    the linear half of a gated activation. Legal when every reader of those channels is a quantized
    linear of the group; otherwise the reason is recorded and the linear is only clipped. s =
    mean|x|^alpha, alpha and the clipping searched against the layer's own output error, layer by
    layer, later ones seeing what earlier ones lost (arXiv:2306.00978). The runtime multiplies
    nothing: it pays in quality at the size and speed of plain rounding.
    """

    name = "quantize-awq"
    summary = "activation-aware int4 or int3: scales folded into producers, then clipping"
    requires = Dialect.SEMANTIC
    produces = Dialect.QUANTIZED
    numerics = Lossy()
    Options = AwqOptions

    def expect(self, program: Program) -> int | None:
        """One match a linear module of the traced tree; a fused linear counts as its parts."""
        return program.facts.module_counts.get("linear")

    def run(self, program: Program, options: AwqOptions) -> PassResult:
        if options.source is None or not options.samples:
            raise UserError("awq needs calibration text and the checkpoint; use rtn without them")
        linears = find_linears(program, options.spec)
        groups = find_groups(program, linears)
        choices: dict[str, _Choice] = {}

        def choose(
            group: Group, values: list[torch.Tensor], statistics: Statistics
        ) -> list[torch.Tensor]:
            return _choose(group, values, statistics, choices)

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
        scales = {g.linears[0].weight: choices[g.linears[0].weight].scale for g in groups}
        applied = fold(program, [(g, scales[g.linears[0].weight]) for g in groups])
        reasons = {linear.node: g.reason for g in groups for linear in g.linears}

        def rewrite(linear: Linear, result: PassResult) -> Verdict:
            choice = choices[linear.weight]
            clip = None
            if choice.clip.any():
                clip = program.weights.put(f"{linear.weight}.clip", choice.clip)
            reason = reasons[linear.node]
            if reason is not None:
                result.decline(linear.node, f"no scale folded: {reason}")
            names = applied.get(linear.weight, {})
            to_quantized(program, linear, names.get("columns"), names.get("rows"), clip)
            return _verdict(linear, choice, reason)

        return rewrite_each(program, linears, rewrite)


def _choose(
    group: Group,
    values: list[torch.Tensor],
    statistics: Statistics,
    choices: dict[str, _Choice],
) -> list[torch.Tensor]:
    """Search scale and clips of one group; the weights to go on with, as the runtime has them."""
    for linear, value in zip(group.linears, values, strict=True):
        check_finite(value, linear.layer)
    rows = statistics.rows
    scale = None
    s = torch.ones(rows.shape[1])
    if group.producer is not None and group.columns is not None:
        schemes = [linear.scheme for linear in group.linears]
        scale = search_scale(
            values, schemes, statistics.mean, rows, group.columns, group.producer.channels
        )
        s = scale.factor[group.columns]
        if not torch.isfinite(s).all() or not (s > 0).all():
            raise SmeltError(
                f"{group.name}: the scale found by calibration is not finite; "
                "is the calibration text like what the model is meant for?"
            )
    chosen = []
    for linear, value in zip(group.linears, values, strict=True):
        w = value.float()
        gram = _scaled(statistics.gram, s) if statistics.gram is not None else None
        clip = search_clip(w * s, linear.scheme, rows / s, gram)
        final = fake_quantize(w * s, linear.scheme, clip) / s
        size = float(output_error(rows, w).sum()) or 1.0
        choices[linear.weight] = _Choice(
            scale,
            clip,
            float(output_error(rows, fake_quantize(w, linear.scheme) - w).sum()) / size,
            float(output_error(rows, final - w).sum()) / size,
        )
        chosen.append(final.to(value.dtype))
    return chosen


def _scaled(gram: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """gram [G, g, g] of x as it would be of x / s, s [K]."""
    parts = s.unflatten(0, (gram.shape[0], -1))
    return gram / (parts[:, :, None] * parts[:, None, :])


def _verdict(linear: Linear, choice: _Choice, reason: str | None) -> Verdict:
    notes = [note for note in (reason, group_note(linear)) if note]
    return Verdict(
        linear.layer,
        "awq",
        linear.scheme.format,
        group_size(linear),
        linear.parameters,
        alpha=choice.scale.alpha if choice.scale else None,
        error_rtn=choice.error_rtn,
        error=choice.error,
        reason="; ".join(notes) or None,
    )
