"""Round to nearest: every linear's weight in the format's nearest values, no data needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from smelt.passes.base import Lossy, Pass, PassResult
from smelt.passes.program import Dialect, Program

from .fp8 import to_fp8
from .linears import Linear, find_linears, to_quantized
from .spec import QuantSpec
from .verdict import Verdict, group_note, group_size, rewrite_each


@dataclass(frozen=True)
class RtnOptions:
    """spec: format, group size and what stays at 16 bits."""

    spec: QuantSpec = field(default_factory=lambda: QuantSpec("rtn"))

    def to_json(self) -> dict[str, Any]:
        return {"spec": self.spec.to_json()}


class QuantizeRtn(Pass):
    """Linear layers get packed weights, rounded to the nearest value of their group.

    Before::

        y = aten.linear(x, weight, bias)

    After::

        y = smelt::linear_int4(x, qweight, scales, zeros, bias)      # or int3, int2, int8, fp8

    and the weight plan makes qweight, scales and zeros from the weight in one quantize step.

    Legal for any linear over a planned floating-point weight that nothing else reads. The logits'
    linear, routers and layers under `min_features` stay as they are. Pays because a decode step
    reads every weight once: a quarter of the bytes at int4 (4.25 bits with groups of 128), half
    at int8 and fp8 (e4m3, inputs left as they are).
    """

    name = "quantize-rtn"
    summary = "round linear weights to int4, int3, int2, int8 or fp8"
    requires = Dialect.SEMANTIC
    produces = Dialect.QUANTIZED
    numerics = Lossy()
    Options = RtnOptions

    def expect(self, program: Program) -> int | None:
        """One match a linear module of the traced tree; a fused linear counts as its parts."""
        return program.facts.module_counts.get("linear")

    def run(self, program: Program, options: RtnOptions) -> PassResult:
        def rewrite(linear: Linear, result: PassResult) -> Verdict:
            fp8 = linear.scheme.format == "fp8"
            to_fp8(program, linear) if fp8 else to_quantized(program, linear)
            return Verdict(
                linear.layer,
                "rtn",
                linear.scheme.format,
                group_size(linear),
                linear.parameters,
                reason=group_note(linear),
            )

        return rewrite_each(program, find_linears(program, options.spec), rewrite)
