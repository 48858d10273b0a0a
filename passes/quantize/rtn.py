"""Round to nearest: every linear's weight in the format's nearest values, no data needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from smelt.passes.base import Lossy, Pass, PassResult
from smelt.passes.program import Dialect, Program

from .expert_layers import ExpertLayers
from .experts import find_experts
from .fp8 import to_fp8
from .linears import Linear, find_linears, to_quantized
from .spec import QuantSpec
from .verdict import Verdict, expected, group_note, group_size, rewrite_each


@dataclass(frozen=True)
class RtnOptions:
    """spec: format, group size and what stays at 16 bits."""

    spec: QuantSpec = field(default_factory=lambda: QuantSpec("rtn"))

    def to_json(self) -> dict[str, Any]:
        return {"spec": self.spec.to_json()}


class QuantizeRtn(Pass):
    """Linear layers and experts get packed weights, rounded to the nearest value of their group.

    Before::

        y = aten.linear(x, weight, bias)
        z = smelt::experts(y, index, share, gate_up, down, "silu")

    After::

        y = smelt::linear_int4(x, qweight, scales, zeros, bias)      # or int3, int2, int8, fp8
        z = smelt::experts_quantized(y, index, share, qweight, scales, zeros, ..., "int4", E, 0)

    and the weight plan makes qweight, scales and zeros from the weight in one quantize step.

    Legal for any linear, and any experts, over planned floating-point weights that nothing else
    reads. The logits' linear, routers and layers under `min_features` stay as they are. Pays
    because a decode step reads every weight once: a quarter of the bytes at int4 (4.25 bits with
    groups of 128), half at int8 and fp8 (e4m3, inputs left as they are).
    """

    name = "quantize-rtn"
    summary = "round linear weights to int4, int3, int2, int8 or fp8"
    requires = Dialect.SEMANTIC
    produces = Dialect.QUANTIZED
    numerics = Lossy()
    Options = RtnOptions

    def expect(self, program: Program) -> int | None:
        """One match a linear module or layer of experts of the traced tree."""
        return expected(program)

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

        linears = find_linears(program, options.spec)
        layers = ExpertLayers(program, find_experts(program, options.spec), "rtn")
        return rewrite_each(program, linears, rewrite, layers)
