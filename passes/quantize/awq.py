"""AWQ as a graph pass: scales found on calibration text and folded away, then clipping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from smelt.passes.base import Lossy, Pass, PassResult
from smelt.passes.program import Dialect, Program
from smelt.runtime.errors import SmeltError, UserError

from .awq_search import Scale, output_error, search_clip, search_scale
from .calibrate import CalibrationOptions, Statistics, calibrate
from .expert_layers import ExpertLayers
from .experts import Experts, find_experts
from .experts import to_quantized as experts_to_quantized
from .fold import fold
from .formats import check_finite, fake_quantize, joined, row_chunks, row_step
from .groups import Group, Producer, find_groups
from .linears import Linear, find_linears, to_quantized
from .spec import QuantSpec
from .verdict import Verdict, expected, group_note, group_size, rewrite_each

EXPERTS_REMARK = "gate_up is only clipped: the 16-bit router reads the same input"


@dataclass(frozen=True)
class AwqOptions(CalibrationOptions):
    """As of every calibrated method; without a spec int4 in groups of 128.

    Scales are searched on `max_rows` alone, so there are more of them: of 512 tokens the search
    learnt by heart what it should have found.
    """

    spec: QuantSpec = field(default_factory=lambda: QuantSpec("awq"))
    max_rows: int = 2048


@dataclass(frozen=True)
class AwqFound:
    """What was found for one linear, scale and all.

    factor: of its group, float32 [P], a producer's channel each, None where nothing can be folded;
    alpha: the exponent behind it. clip: uint8 [N, G]. Errors relative to the output.
    """

    factor: torch.Tensor | None
    alpha: float | None
    clip: torch.Tensor
    error_rtn: float
    error: float

    @property
    def scale(self) -> Scale | None:
        return None if self.factor is None else Scale(self.alpha or 0.0, self.factor)


@dataclass(frozen=True)
class Awq:
    """The searches of AWQ as a calibration method."""

    found: ClassVar[type[AwqFound]] = AwqFound
    whole_gram: ClassVar[bool] = False
    original: ClassVar[bool] = False
    copies: ClassVar[float] = 3.7
    matrices: ClassVar[float] = 0.0
    wide: ClassVar[bool] = False

    def search(
        self, group: Group, weights: Sequence[torch.Tensor], statistics: Statistics
    ) -> list[AwqFound]:
        """Scale of the group, then clips of its linears."""
        for linear, weight in zip(group.linears, weights, strict=True):
            check_finite(weight, linear.layer)
        rows = statistics.rows
        scale = _scale(group, weights, statistics.mean, rows)
        s = _on_columns(group, scale, rows.shape[1])
        factor, alpha = (scale.factor, scale.alpha) if scale else (None, None)
        gram = _scaled(statistics.gram, s) if statistics.gram is not None else None
        found = []
        for linear, weight in zip(group.linears, weights, strict=True):
            clips, errors = [], torch.zeros(3, dtype=torch.float64)
            for w in row_chunks(weight):
                clips.append(search_clip(w * s, linear.scheme, rows / s, gram))
                kept = _kept(w, linear, s, clips[-1])
                rounded = fake_quantize(w, linear.scheme)
                for i, lost in enumerate((w, rounded.sub_(w), kept.sub_(w))):
                    errors[i] += output_error(rows, lost).sum()
            size, before, after = errors.tolist()
            size = size or 1.0
            found.append(AwqFound(factor, alpha, torch.cat(clips), before / size, after / size))
        return found

    def go_on(
        self, group: Group, weights: Sequence[torch.Tensor], found: Sequence[AwqFound]
    ) -> list[torch.Tensor]:
        """The weights as the runtime will have them, divided by the scale again."""
        chosen = []
        for linear, weight, each in zip(group.linears, weights, found, strict=True):
            s = _on_columns(group, each.scale, linear.k)
            parts = row_chunks(weight)
            clips = each.clip.split(row_step(linear.k))
            kept = (_kept(w, linear, s, c) for w, c in zip(parts, clips, strict=True))
            chosen.append(joined(kept, weight))
        return chosen

    def expert_groups(self, gate_up: Linear, down: Linear) -> tuple[Group, Group]:
        """gate_up is only clipped; down's scale goes into the rows of up before it."""
        rows = UpRows(down.node, gate_up.layer, width=down.k)
        return Group((gate_up,)), Group((down,), rows, torch.arange(down.k))

    def rounded(self, linear: Linear, weight: torch.Tensor) -> AwqFound:
        """No scale and no clip."""
        clip = torch.zeros(linear.n, linear.scheme.groups(linear.k), dtype=torch.uint8)
        return AwqFound(None, None, clip, 0.0, 0.0)

    def put_experts(
        self, program: Program, experts: Experts, found: Mapping[str, Sequence[AwqFound]]
    ) -> fx.Node:
        """The layer quantized with every expert's scale and clips."""
        extras: dict[str, dict[str, torch.Tensor]] = {"gate_up": {}, "down": {}}
        ones = torch.ones(experts.width)
        factors = [ones if each.factor is None else each.factor for each in found["down"]]
        if any((factor != 1).any() for factor in factors):
            extras["gate_up"]["rows"] = torch.stack([torch.cat([ones, f]) for f in factors])
            extras["down"]["columns"] = torch.stack(factors)
        for matrix, given in extras.items():
            clip = torch.stack([each.clip for each in found[matrix]])
            if clip.any():
                given["clip"] = clip
        return experts_to_quantized(program, experts, extras)


@dataclass(frozen=True)
class UpRows(Producer):
    """The rows of an expert's up, whose outputs are down's input channels. width: how many."""

    width: int = 0

    @property
    def channels(self) -> int:
        return self.width


def _kept(w: torch.Tensor, linear: Linear, s: torch.Tensor, clip: torch.Tensor) -> torch.Tensor:
    """What is left of some rows of a weight: float32 [n, K]."""
    return fake_quantize(w * s, linear.scheme, clip).div_(s)


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
    linear of the group; otherwise the reason is recorded and the linear is only clipped. Experts
    are searched one by one on the tokens that each saw, `down` scaled by the rows of `up`. s =
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
        """One match a linear module or layer of experts of the traced tree."""
        return expected(program)

    def run(self, program: Program, options: AwqOptions) -> PassResult:
        if options.source is None or not options.samples:
            raise UserError("awq needs calibration text and the checkpoint; use rtn without them")
        linears = find_linears(program, options.spec)
        groups = find_groups(program, linears)
        experts = find_experts(program, options.spec)
        layers = ExpertLayers(program, experts, "awq", Awq(), options, EXPERTS_REMARK)
        choices = calibrate(program, groups, Awq(), options, layers)
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

        return rewrite_each(program, linears, rewrite, layers)


def _scale(
    group: Group, weights: Sequence[torch.Tensor], mean: torch.Tensor, rows: torch.Tensor
) -> Scale | None:
    """The scale of a group, None where there is nothing to fold it into. mean [K], rows [R, K]."""
    if group.producer is None or group.columns is None:
        return None
    schemes = [linear.scheme for linear in group.linears]
    scale = search_scale(weights, schemes, mean, rows, group.columns, group.producer.channels)
    if not torch.isfinite(scale.factor).all() or not (scale.factor[group.columns] > 0).all():
        raise SmeltError(
            f"{group.name}: the scale found by calibration is not finite; "
            "is the calibration text like what the model is meant for?"
        )
    return scale


def _on_columns(group: Group, scale: Scale | None, k: int) -> torch.Tensor:
    """The factor of each of the K columns, float32 [K]."""
    if scale is None or group.columns is None:
        return torch.ones(k)
    return scale.factor[group.columns]


def _scaled(gram: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """gram [G, g, g] of x as it would be of x / s, s [K]."""
    parts = s.unflatten(0, (gram.shape[0], -1))
    return gram / (parts[:, :, None] * parts[:, None, :])


def _verdict(linear: Linear, choice: AwqFound, reason: str | None) -> Verdict:
    notes = [note for note in (reason, group_note(linear)) if note]
    return Verdict(
        linear.layer,
        "awq",
        linear.scheme.format,
        group_size(linear),
        linear.parameters,
        alpha=choice.alpha,
        error_rtn=choice.error_rtn,
        error=choice.error,
        reason="; ".join(notes) or None,
    )
