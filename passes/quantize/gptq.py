"""GPTQ as a graph pass: each layer rounded so that its errors cancel on calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from smelt.passes.base import Lossy, Pass, PassResult
from smelt.passes.program import Dialect, Program
from smelt.passes.weights import TensorSource, operation
from smelt.runtime.errors import UserError
from smelt.runtime.ops.linear import GROUPED_BITS
from smelt.runtime.ops.packing import pack

from .awq_search import search_clip
from .calibrate import Progress, Statistics, calibrate
from .formats import Quantized, check_finite, quantize
from .gptq_solve import DAMPING, error_of, solve
from .groups import Group, find_groups
from .linears import Linear, find_linears, replace_linear
from .spec import FORMATS, QuantSpec
from .verdict import Verdict, group_note, group_size, rewrite_each


@dataclass(frozen=True)
class GptqOptions:
    """spec: what to quantize; samples: token ids of calibration sequences; source: the checkpoint.

    max_rows: tokens on which clipping measures output errors. damping: added to the Hessian's
    diagonal, as a share of its mean. progress(name, done, total).
    """

    spec: QuantSpec = field(default_factory=lambda: QuantSpec("gptq"))
    samples: Sequence[Sequence[int]] = ()
    source: TensorSource | None = None
    max_rows: int = 512
    seed: int = 0
    damping: float = DAMPING
    progress: Progress | None = None


@dataclass
class _Choice:
    """What was found for one linear; errors relative to the output, over all calibration tokens."""

    weight: Quantized
    error_rtn: float
    error: float
    note: str | None = None


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
    error. A layer that does not gain against rounding is rounded, and its verdict says so. Legal
    for the linears that rounding takes; nothing is folded, so every layer can be treated. Pays in
    quality, most at 3 bits, at the size and speed of plain rounding.
    """

    name = "quantize-gptq"
    summary = "int4 or int3 with error compensation by second-order statistics"
    requires = Dialect.SEMANTIC
    produces = Dialect.QUANTIZED
    numerics = Lossy()
    Options = GptqOptions

    def expect(self, program: Program) -> int | None:
        """One match a linear module of the traced tree; a fused linear counts as its parts."""
        return program.facts.module_counts.get("linear")

    def run(self, program: Program, options: GptqOptions) -> PassResult:
        if options.source is None or not options.samples:
            raise UserError("gptq needs calibration text and the checkpoint; use rtn without them")
        linears = find_linears(program, options.spec)
        choices: dict[str, _Choice] = {}

        def choose(
            group: Group, values: list[torch.Tensor], statistics: Statistics
        ) -> list[torch.Tensor]:
            for linear, value in zip(group.linears, values, strict=True):
                check_finite(value, linear.layer)
                choices[linear.weight] = _choose(linear, value, statistics, options.damping)
            return [
                choices[linear.weight].weight.dequantize().to(value.dtype)
                for linear, value in zip(group.linears, values, strict=True)
            ]

        calibrate(
            program,
            find_groups(program, linears),
            options.samples,
            options.source,
            choose,
            options.max_rows,
            options.seed,
            options.progress,
            whole_gram=True,
        )

        def rewrite(linear: Linear, result: PassResult) -> Verdict:
            choice = choices.pop(linear.weight)
            _put(program, linear, choice.weight)
            notes = [note for note in (choice.note, group_note(linear)) if note]
            return Verdict(
                linear.layer,
                "gptq",
                linear.scheme.format,
                group_size(linear),
                linear.parameters,
                error_rtn=choice.error_rtn,
                error=choice.error,
                reason="; ".join(notes) or None,
            )

        return rewrite_each(program, linears, rewrite)


def _choose(linear: Linear, value: torch.Tensor, statistics: Statistics, damping: float) -> _Choice:
    """Round one layer with and without clipping, and keep what loses least."""
    assert statistics.gram is not None
    hessian = statistics.gram[0]
    w = value.float()
    bits, groups = FORMATS[linear.scheme.format].bits, linear.scheme.groups(linear.k)
    rounded = quantize(w, linear.scheme)
    candidates = [solve(w, hessian, groups, bits, linear.layer, None, damping)]
    clip = search_clip(w, linear.scheme, statistics.rows, _diagonal_blocks(hessian, groups))
    if clip.any():
        candidates.append(solve(w, hessian, groups, bits, linear.layer, clip, damping))
    size = error_of(w, hessian) or 1.0
    errors = [error_of(found.dequantize() - w, hessian) / size for found in candidates]
    error_rtn = error_of(rounded.dequantize() - w, hessian) / size
    error, best = min(zip(errors, candidates, strict=True), key=lambda pair: pair[0])
    if error >= error_rtn:
        return _Choice(rounded, error_rtn, error_rtn, "rounded to nearest: nothing was gained")
    return _Choice(best, error_rtn, error)


def _diagonal_blocks(hessian: torch.Tensor, groups: int) -> torch.Tensor:
    """[K, K] -> [G, g, g], the products within each group."""
    size = hessian.shape[0] // groups
    parts = hessian.unflatten(0, (groups, size)).unflatten(2, (groups, size))
    return parts.diagonal(dim1=0, dim2=2).movedim(-1, 0)


def _put(program: Program, linear: Linear, weight: Quantized) -> None:
    """The found weights as values of the plan, and the operator that reads them."""
    assert weight.zeros is not None
    bits = FORMATS[linear.scheme.format].bits
    found = {"qweight": pack(weight.q, bits), "scales": weight.scales, "zeros": weight.zeros}
    given = [program.weights.put(f"{linear.weight}.{k}.found", v) for k, v in found.items()]
    outputs = [f"{linear.weight}.{field}" for field in found]
    names = program.weights.add(f"take_int{bits}", outputs, [linear.weight, *given])
    replace_linear(program, linear, names)


def _take_operation(bits: int) -> None:
    @operation(f"take_int{bits}")
    def _take(weight: torch.Tensor, *found: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What was found for `weight`: the step says which weight the values stand for."""
        return found


for _bits in GROUPED_BITS:
    _take_operation(_bits)
