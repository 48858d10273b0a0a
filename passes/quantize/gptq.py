"""GPTQ as a graph pass: each layer rounded so that its errors cancel on calibration text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from smelt.passes.base import Lossy, Pass, PassResult
from smelt.passes.program import Dialect, Program
from smelt.passes.weights import operation
from smelt.runtime.errors import UserError
from smelt.runtime.ops.linear import GROUPED_BITS
from smelt.runtime.ops.packing import pack, unpack

from .awq_search import search_clip
from .calibrate import CalibrationOptions, Statistics, calibrate
from .expert_layers import ExpertLayers
from .experts import MATRICES, Experts, find_experts, replace_experts
from .experts import to_quantized as round_experts
from .formats import Quantized, check_finite, fake_quantize, joined, quantize, row_chunks
from .gptq_refine import refine
from .gptq_solve import DAMPING, errors_of, nearest, prepare, solve
from .groups import Group, find_groups
from .linears import Linear, find_linears, replace_linear, to_quantized
from .spec import FORMATS, QuantSpec
from .verdict import Verdict, expected, group_note, group_size, rewrite_each


@dataclass(frozen=True)
class GptqOptions(CalibrationOptions):
    """As of every calibrated method. damping: added to the Hessian's diagonal, as a share of its
    mean."""

    spec: QuantSpec = field(default_factory=lambda: QuantSpec("gptq"))
    damping: float = DAMPING


@dataclass(frozen=True)
class GptqFound:
    """One rounded linear, packed: as in `runtime/ops/packing.py`.

    Without qweight, scales and zeros it is rounded to nearest, by a step of the plan. Errors are
    relative to the output, over all calibration tokens, against the outputs of the weight that
    comes nearest to the original model. note: why it is only rounded.
    """

    qweight: torch.Tensor | None
    scales: torch.Tensor | None
    zeros: torch.Tensor | None
    error_rtn: float
    error: float
    note: str | None = None


@dataclass(frozen=True)
class Gptq:
    """Error compensation as a calibration method."""

    damping: float = DAMPING
    found: ClassVar[type[GptqFound]] = GptqFound
    whole_gram: ClassVar[bool] = True
    original: ClassVar[bool] = True
    copies: ClassVar[float] = 3.3
    matrices: ClassVar[float] = 6.75
    wide: ClassVar[bool] = False

    def search(
        self, group: Group, weights: Sequence[torch.Tensor], statistics: Statistics
    ) -> list[GptqFound]:
        """Every linear rounded for the group's Hessian."""
        found = []
        for linear, weight in zip(group.linears, weights, strict=True):
            check_finite(weight, linear.layer)
            found.append(_search(linear, weight, statistics, self.damping))
        return found

    def go_on(
        self, group: Group, weights: Sequence[torch.Tensor], found: Sequence[GptqFound]
    ) -> list[torch.Tensor]:
        """The rounded weights in the model's dtype."""
        return [
            joined(_final(linear, weight, each), weight)
            for linear, weight, each in zip(group.linears, weights, found, strict=True)
        ]

    def expert_groups(self, gate_up: Linear, down: Linear) -> tuple[Group, Group]:
        """Each matrix by itself: nothing is folded."""
        return Group((gate_up,)), Group((down,))

    def rounded(self, linear: Linear, weight: torch.Tensor) -> GptqFound:
        """Rounded to nearest."""
        made = quantize(weight.float(), linear.scheme)
        if made.zeros is None:
            return GptqFound(None, None, None, 0.0, 0.0)
        q = pack(made.q, FORMATS[linear.scheme.format].bits)
        return GptqFound(q, made.scales, made.zeros, 0.0, 0.0)

    def put_experts(
        self, program: Program, experts: Experts, found: Mapping[str, Sequence[GptqFound]]
    ) -> fx.Node:
        """The found weights of all experts, one below the other, as values of the plan."""
        if FORMATS[experts.scheme.format].symmetric:
            return round_experts(program, experts)
        names = []
        for matrix, weight in zip(MATRICES, experts.weights, strict=True):
            rows = [_fields(each) for each in found[matrix]]
            packed = {field: torch.cat([each[field] for each in rows]) for field in rows[0]}
            names.append(_planned(program, experts.scheme.format, weight, packed))
        return replace_experts(program, experts, *names)


def _final(linear: Linear, weight: torch.Tensor, found: GptqFound) -> Iterator[torch.Tensor]:
    """What the linear will compute with, float32, some rows at a time."""
    at = 0
    for part in row_chunks(weight):
        rows = slice(at, at := at + len(part))
        if found.qweight is None or found.scales is None or found.zeros is None:
            yield fake_quantize(part, linear.scheme)
            continue
        q = unpack(found.qweight[rows], FORMATS[linear.scheme.format].bits, linear.k)
        yield Quantized(q, found.scales[rows], found.zeros[rows]).dequantize()


class QuantizeGptq(Pass):
    """Linear layers get packed weights, rounded column by column with their errors compensated.

    Before::

        y = aten.linear(x, weight, bias)

    After::

        y = smelt::linear_int4(x, qweight, scales, zeros, bias)      # or linear_int3

    Unlike rounding and AWQ the packed weights cannot be made from the checkpoint by a formula: they
    are computed here and stand in the weight plan as values. The Hessian is the sum of x x^T over
    all calibration tokens, streamed; columns are taken in the order of their activations on a grid
    fixed beforehand (`gptq_solve.py`). The grid is clipped where that lowers the layer's output
    error. Rounded is towards what the original model, which runs beside, has after the layer, so
    that it makes up for what those before it lost (`drift.py`); then scales, zero points and whole
    numbers are refined, one after the other (`gptq_refine.py`). A layer that does not gain against
    rounding is rounded, and its verdict says so. Legal for the linears and experts that rounding
    takes; nothing is folded, so every layer can be treated. An expert has the Hessian of the tokens
    that it saw; one that saw too few is rounded.
    Pays in quality, most at 3 bits, at the size and speed of plain rounding.
    """

    name = "quantize-gptq"
    summary = "int4 or int3 with error compensation by second-order statistics"
    requires = Dialect.SEMANTIC
    produces = Dialect.QUANTIZED
    numerics = Lossy()
    Options = GptqOptions

    def expect(self, program: Program) -> int | None:
        """One match a linear module or layer of experts of the traced tree."""
        return expected(program)

    def run(self, program: Program, options: GptqOptions) -> PassResult:
        if options.source is None or not options.samples:
            raise UserError("gptq needs calibration text and the checkpoint; use rtn without them")
        linears = find_linears(program, options.spec)
        return compensate(program, linears, find_experts(program, options.spec), options)


def compensate(
    program: Program,
    linears: Sequence[Linear],
    experts: Sequence[Experts],
    options: GptqOptions,
    remark: str | None = None,
) -> PassResult:
    """Quantize `linears` and `experts`, each by its own scheme: grouped formats with error
    compensation, int8 by rounding. remark: part of the experts' verdicts."""
    groups = find_groups(program, linears)
    method = Gptq(options.damping)
    layers = ExpertLayers(program, experts, options.spec.method, method, options, remark)
    choices = calibrate(program, groups, method, options, layers)

    def rewrite(linear: Linear, result: PassResult) -> Verdict:
        choice = choices.pop(linear.weight)
        if choice.qweight is None:
            to_quantized(program, linear)
        else:
            _put(program, linear, choice)
        notes = [note for note in (choice.note, group_note(linear)) if note]
        return Verdict(
            linear.layer,
            "rtn" if choice.qweight is None else "gptq",
            linear.scheme.format,
            group_size(linear),
            linear.parameters,
            error_rtn=choice.error_rtn,
            error=choice.error,
            reason="; ".join(notes) or None,
        )

    return rewrite_each(program, linears, rewrite, layers)


def _search(
    linear: Linear, value: torch.Tensor, statistics: Statistics, damping: float
) -> GptqFound:
    """Round one layer towards its outputs in the original model; each row starts from what loses
    least, with clipping, without, or to nearest, and is refined."""
    assert statistics.gram is not None
    hessian = statistics.gram[0]
    form, groups = FORMATS[linear.scheme.format], linear.scheme.groups(linear.k)
    prepared = None if form.symmetric else prepare(hessian, linear.layer, damping)
    size = before = after = 0.0
    at = 0
    rows: list[Quantized] = []
    for w in row_chunks(value):
        size += float(errors_of(w, hessian).sum())
        rounded = quantize(w, linear.scheme)
        if prepared is None:
            before += float(errors_of(rounded.dequantize() - w, hessian).sum())
            continue
        target = w
        if statistics.drift is not None:
            missing = statistics.drift(w, slice(at, at := at + len(w)))
            target = nearest(missing, prepared, statistics.tokens).add_(w)
        candidates = [rounded]
        blocks = _diagonal_blocks(hessian, groups)
        clip = search_clip(target, linear.scheme, statistics.rows, blocks)
        candidates.append(solve(target, prepared, groups, form.bits))
        candidates.append(solve(target, prepared, groups, form.bits, clip))
        lost = [errors_of(c.dequantize() - target, hessian, prepared.added) for c in candidates]
        best = _picked(candidates, torch.stack(lost).argmin(0))
        best = refine(best, target, hessian, prepared, form.bits)
        before += float(errors_of(rounded.dequantize() - target, hessian).sum())
        after += float(errors_of(best.dequantize() - target, hessian).sum())
        rows.append(best)
    size = size or 1.0
    if prepared is None:
        little = f"rounded to nearest: at {linear.scheme.format} there is little to win back"
        return GptqFound(None, None, None, before / size, before / size, little)
    note = None if after < before else "rounded to nearest: nothing was gained"
    q, scales, zeros = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return GptqFound(pack(q, form.bits), scales, zeros, before / size, after / size, note)


def _picked(candidates: Sequence[Quantized], index: torch.Tensor) -> Quantized:
    """Each row from the candidate that `index` int64 [N] names for it."""
    every = torch.arange(len(index))
    picked = [
        None if any(part is None for part in parts) else torch.stack(parts)[index, every]
        for parts in zip(*candidates, strict=True)
    ]
    return Quantized(*picked)  # type: ignore[arg-type]


def _diagonal_blocks(hessian: torch.Tensor, groups: int) -> torch.Tensor:
    """[K, K] -> [G, g, g], the products within each group."""
    size = hessian.shape[0] // groups
    parts = hessian.unflatten(0, (groups, size)).unflatten(2, (groups, size))
    return parts.diagonal(dim1=0, dim2=2).movedim(-1, 0)


def _put(program: Program, linear: Linear, found: GptqFound) -> None:
    """The found weights as values of the plan, and the operator that reads them."""
    names = _planned(program, linear.scheme.format, linear.weight, _fields(found))
    replace_linear(program, linear, names)


def _fields(found: GptqFound) -> dict[str, torch.Tensor]:
    assert found.qweight is not None and found.scales is not None and found.zeros is not None
    return {"qweight": found.qweight, "scales": found.scales, "zeros": found.zeros}


def _planned(
    program: Program, format: str, weight: str, packed: Mapping[str, torch.Tensor]
) -> tuple[str, ...]:
    """Planned names of the values found for `weight`."""
    given = [program.weights.put(f"{weight}.{k}.found", v) for k, v in packed.items()]
    outputs = [f"{weight}.{field}" for field in packed]
    return program.weights.add(f"take_{format}", outputs, [weight, *given])


def _take_operation(bits: int) -> None:
    @operation(f"take_int{bits}")
    def _take(weight: torch.Tensor, *found: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What was found for `weight`: the step says which weight the values stand for."""
        return found


for _bits in GROUPED_BITS:
    _take_operation(_bits)
