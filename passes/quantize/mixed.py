"""Mixed precision as a graph pass: a format for each layer, by measurement, under a budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from smelt.passes.base import Lossy, Pass, PassResult
from smelt.passes.program import Dialect, Program
from smelt.runtime.errors import UserError

from .budget import Choice, choose
from .calibrate import digest
from .experts import MATRICES, Experts, find_experts
from .formats import packed_bytes
from .gptq import GptqOptions, compensate
from .groups import Group, find_groups
from .linears import Linear, find_linears
from .sensitivity import Sensitivity, measure
from .spec import QuantSpec, Scheme
from .verdict import expected

CANDIDATES = (
    Scheme("int2", 32),
    *(Scheme("int3", size) for size in (128, 64, 32)),
    *(Scheme("int4", size) for size in (128, 64, 32)),
    Scheme("int8", 0),
)
EXPERTS_REMARK = "the largest format within the budget; the table is measured for linears alone"
LEFT = "left at 16 bits by the budget"


@dataclass(frozen=True)
class MixedOptions(GptqOptions):
    """As of gptq; spec.bits is the budget, in bits a weight of the layers that are quantized."""

    spec: QuantSpec = field(default_factory=lambda: QuantSpec("mixed"))


class QuantizeMixed(Pass):
    """Linear layers get the formats that lose least together within a budget of bits a weight.

    Before::

        y = aten.linear(x, w1);  z = aten.linear(y, w2)

    After::

        y = smelt::linear_int4(x, ...);  z = smelt::linear_int3(y, ...)

    Layers differ widely in what rounding them does to the model. A table is measured first: the
    divergence of the model's own predictions when one group of linears alone is rounded, and each
    candidate's error on that group's inputs (`sensitivity.py`). The budget is spent where a bit
    saves the most divergence (`budget.py`), counting scales and zero points; then every layer is
    quantized to its format with error compensation, as by gptq, int8 by rounding. Legal for the
    linears and experts that rounding takes; the layers of experts get the largest format within the
    budget, all the same one. Pays in quality at a size between those of uniform formats, or in
    size at their quality.
    """

    name = "quantize-mixed"
    summary = "a format for each layer, from a measured table under a budget (--bits)"
    requires = Dialect.SEMANTIC
    produces = Dialect.QUANTIZED
    numerics = Lossy()
    Options = MixedOptions

    def expect(self, program: Program) -> int | None:
        """One match a linear module or layer of experts of the traced tree."""
        return expected(program)

    def run(self, program: Program, options: MixedOptions) -> PassResult:
        if options.source is None or not options.samples:
            raise UserError("mixed needs calibration text and the checkpoint; use rtn without them")
        linears = find_linears(program, options.spec)
        groups = find_groups(program, linears)
        journal = None
        if options.journal is not None:
            journal = options.journal(digest(program, "sensitivity", options))
        table = measure(program, groups, CANDIDATES, options, journal)
        bits = options.spec.bits
        assert bits is not None
        taken = assign(groups, table, bits)
        schemes = {
            linear.node: scheme
            for group, scheme in zip(groups, taken, strict=True)
            for linear in group.linears
        }
        experts = [within(e, bits) for e in find_experts(program, options.spec)]
        given = [_given(linear, schemes) for linear in linears]
        result = compensate(program, given, experts, options, EXPERTS_REMARK)
        _report(result, groups, table, taken, bits)
        return result


def assign(
    groups: Sequence[Group], table: Sequence[Sensitivity], bits: float
) -> list[Scheme | None]:
    """The scheme of each group under a budget of `bits` a weight; None: left at 16 bits.

    Raises UserError when the smallest formats of these layers do not fit.
    """
    weights = sum(linear.parameters for group in groups for linear in group.linears)
    layers = []
    for group, entry in zip(groups, table, strict=True):
        sizes = [_bits(group, scheme) for scheme in (*CANDIDATES, None)]
        layers.append([Choice(*pair) for pair in zip(sizes, [*entry.costs(), 0.0], strict=True)])
    try:
        taken = choose(layers, bits * weights)
    except ValueError as error:
        smallest = sum(min(choice.size for choice in choices) for choices in layers) / weights
        raise UserError(
            f"--bits {bits:g}: this model's layers take {smallest:.2f} bits a weight at the least, "
            "with their scales; give more"
        ) from error
    return [(*CANDIDATES, None)[i] for i in taken]


def within(experts: Experts, bits: float) -> Experts:
    """The layer with the largest candidate that takes at most `bits` a weight."""
    shapes = [(linear.n, linear.k) for linear in (experts.matrix(name, 0) for name in MATRICES)]
    weights = sum(n * k for n, k in shapes)
    sizes = {c: 8 * sum(packed_bytes(n, k, c) for n, k in shapes) / weights for c in CANDIDATES}
    fitting = [scheme for scheme in CANDIDATES if sizes[scheme] <= bits]
    return replace(experts, scheme=max(fitting or CANDIDATES[:1], key=lambda c: sizes[c]))


def _bits(group: Group, scheme: Scheme | None) -> float:
    if scheme is None:
        return 16.0 * sum(linear.parameters for linear in group.linears)
    return 8.0 * sum(packed_bytes(linear.n, linear.k, scheme) for linear in group.linears)


def _given(linear: Linear, schemes: dict[fx.Node, Scheme | None]) -> Linear:
    if linear.node not in schemes:
        return linear
    scheme = schemes[linear.node]
    return replace(linear, reason=LEFT) if scheme is None else replace(linear, scheme=scheme)


def _report(
    result: PassResult,
    groups: Sequence[Group],
    table: Sequence[Sensitivity],
    taken: Sequence[Scheme | None],
    bits: float,
) -> None:
    """Add the table to the layers' verdicts, and what was spent to the summary."""
    entries: dict[str, dict[str, float]] = {}
    for group, entry in zip(groups, table, strict=True):
        costs = zip(CANDIDATES, entry.costs(), strict=True)
        named = {_label(scheme): round(cost, 9) for scheme, cost in costs}
        entries |= {linear.layer: named for linear in group.linears}
    for note in result.notes:
        if note.get("layer") in entries:
            note["expected_kl"] = entries[note["layer"]]
    weights = sum(linear.parameters for group in groups for linear in group.linears)
    spent = sum(_bits(g, scheme) for g, scheme in zip(groups, taken, strict=True)) / max(weights, 1)
    counts = Counter(_label(scheme) for scheme in taken)
    formats = ", ".join(f"{count} {label}" for label, count in sorted(counts.items()))
    result.notes[-1]["summary"] += f"; {spent:.2f} bits a weight of {bits:g}: {formats}"
    result.notes[-1]["bits"] = round(spent, 4)


def _label(scheme: Scheme | None) -> str:
    if scheme is None:
        return "16 bit"
    return f"{scheme.format}-g{scheme.group_size}" if scheme.group_size else scheme.format
