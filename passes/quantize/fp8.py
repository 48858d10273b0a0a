"""fp8: e4m3 weights, and e4m3 inputs rounded inside the operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx
from torch.nn import functional as F

from smelt.passes.base import Lossy, Pass, PassResult
from smelt.passes.program import Dialect, Program
from smelt.passes.weights import operation
from smelt.runtime.errors import UserError
from smelt.runtime.ops.linear_fp8 import E4M3_MAX, dequantize_fp8, round_activations, to_e4m3
from smelt.runtime.ops.linear_w8a8 import usable_scale

from .calibrate import CalibrationOptions, Statistics, calibrate
from .expert_layers import ExpertLayers
from .experts import find_experts
from .formats import _prepared, check_finite, joined, row_chunks
from .graph_run import Replacement
from .groups import Group, find_groups
from .linears import Linear, find_linears
from .spec import QuantSpec, Scheme
from .verdict import Verdict, expected, rewrite_each
from .w8a8 import put_scale

smelt = torch.ops.smelt
EXPERTS_REMARK = "weights only: the inputs of experts stay as they are"


def quantize_fp8(weight: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K] -> (float8_e4m3fn [N, K], scales float32: see runtime/ops/linear_fp8.py).

    A scale is max|w| / 448 of a row (block 0), or of block x block weights, smaller at the edges.
    """
    wide = weight.float()
    if not block:
        scales = usable_scale(wide.abs().amax(1, keepdim=True), E4M3_MAX)
        return to_e4m3(wide / scales), scales
    n, k = wide.shape
    padded = F.pad(wide, (0, -k % block, 0, -n % block))
    blocks = padded.unflatten(1, (-1, block)).unflatten(0, (-1, block))  # [n, block, k, block]
    scales = usable_scale(blocks.abs().amax((1, 3)), E4M3_MAX)
    q = to_e4m3(blocks / scales[:, None, :, None])
    return q.flatten(2, 3).flatten(0, 1)[:n, :k].contiguous(), scales


@operation("quantize_fp8")
def _quantize_fp8(
    weight: torch.Tensor, *extras: torch.Tensor, block: int, kinds: list[str], layer: str
) -> tuple[torch.Tensor, ...]:
    """weight [N, K], extras as in `formats` -> qweight float8_e4m3fn [N, K], scales float32."""
    wide, _ = _prepared(weight, extras, kinds, layer)
    return quantize_fp8(wide, block)


def product(
    weight: torch.Tensor, input_scale: torch.Tensor | None, activations: str, block: int
) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
    """What the quantized linear computes, as a function of the original's (x, bias)."""
    parts = (dequantize_fp8(*quantize_fp8(w, block), block) for w in row_chunks(weight))
    dense = joined(parts, weight.new_empty(weight.shape, dtype=torch.float32))

    def apply(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = F.linear(round_activations(x, input_scale, activations, block), dense)
        return (y if bias is None else y + bias.float()).to(x.dtype)

    return apply


def to_fp8(program: Program, linear: Linear, input_scale: torch.Tensor | None = None) -> fx.Node:
    """Replace `linear` by smelt::linear_fp8; the plan gains a quantize step.

    input_scale: float32 [1] for static activations. The scheme's group size is that of blocks.
    """
    block = linear.scheme.group_size
    names = program.weights.add(
        "quantize_fp8",
        [f"{linear.weight}.qweight", f"{linear.weight}.scales"],
        [linear.weight],
        block=block,
        kinds=[],
        layer=linear.layer,
    )
    return call_fp8(program, linear, names, input_scale)


def call_fp8(
    program: Program, linear: Linear, names: Sequence[str], input_scale: torch.Tensor | None
) -> fx.Node:
    """Replace `linear` by smelt::linear_fp8 over planned qweight and scales.

    input_scale: float32 [1] for static activations. The scheme's group size is that of blocks.
    """
    packed = [program.weight(name) for name in names]
    args = (
        *(linear.node.args[0], *packed, put_scale(program, linear, input_scale), linear.bias),
        *(linear.scheme.activations, linear.scheme.group_size),
    )
    with program.graph.inserting_before(linear.node):
        node = program.call(smelt.linear_fp8.default, args, like=linear.node)
    program.replace(linear.node, node)
    return node


def inputs_label(scheme: Scheme) -> str | None:
    """How the operator rounds its input, for the verdict; None where it does not."""
    each = f"for {scheme.group_size} features of a token" if scheme.group_size else "a token"
    labels = {"dynamic": f"e4m3, a scale {each}", "static": "e4m3, one scale"}
    return labels.get(scheme.activations)


@dataclass(frozen=True)
class Fp8Options(CalibrationOptions):
    """As of every calibrated method; samples and source only for static activations."""

    spec: QuantSpec = field(default_factory=lambda: QuantSpec("fp8"))


@dataclass(frozen=True)
class Fp8Found:
    """input_scale: float32 [1], max|x| / 448 over the text. error: relative to the output."""

    input_scale: torch.Tensor
    error: float


@dataclass(frozen=True)
class StaticFp8:
    """Static input scales as a calibration method."""

    found: ClassVar[type[Fp8Found]] = Fp8Found
    whole_gram: ClassVar[bool] = False
    original: ClassVar[bool] = False
    copies: ClassVar[float] = 4.1
    matrices: ClassVar[float] = 0.0
    wide: ClassVar[bool] = True

    def search(
        self, group: Group, weights: Sequence[torch.Tensor], statistics: Statistics
    ) -> list[Fp8Found]:
        """One scale for the group's input."""
        scale = usable_scale(statistics.largest.amax().reshape(1), E4M3_MAX)
        rows = statistics.rows
        found = []
        for linear, weight in zip(group.linears, weights, strict=True):
            check_finite(weight, linear.layer)
            lost = size = 0.0
            for w in row_chunks(weight):
                exact = rows @ w.T
                size += float(exact.square().sum())
                rounded = product(w, scale, "static", 0)(rows, None)
                lost += float(rounded.sub_(exact).square().sum())
            found.append(Fp8Found(scale, lost / max(size, 1e-30)))
        return found

    def go_on(
        self, group: Group, weights: Sequence[torch.Tensor], found: Sequence[Fp8Found]
    ) -> list[Replacement]:
        """What the linears compute from then on, their inputs quantized too."""
        return [
            product(weight, each.input_scale, "static", 0)
            for weight, each in zip(weights, found, strict=True)
        ]


class QuantizeFp8(Pass):
    """Linear layers get e4m3 weights and round their input to e4m3 inside the operator.

    Before::

        y = aten.linear(x, w, bias)

    After::

        y = smelt::linear_fp8(x, qweight, scales, None, bias, "dynamic", 0)

    e4m3 has three bits of mantissa at every size between 2^-6 and 448, so outliers cost the other
    values nothing and no channel has to be moved. Weights get a scale a row and inputs one a token;
    or weights one for 128 x 128 and inputs one for 128 features of a token (`--group-size 128`,
    DeepSeek-V3's form); or inputs one scale from calibration (`--activations static`). Legal for
    any linear over a planned floating-point weight that nothing else reads; the inputs of experts
    stay as they are. Pays in bytes
    everywhere, in time where the processor multiplies e4m3.
    """

    name = "quantize-fp8"
    summary = "e4m3 weights x e4m3 inputs: per token, static, or 128 x 128 blocks"
    requires = Dialect.SEMANTIC
    produces = Dialect.QUANTIZED
    numerics = Lossy()
    Options = Fp8Options

    def expect(self, program: Program) -> int | None:
        """One match a linear module or layer of experts of the traced tree."""
        return expected(program)

    def run(self, program: Program, options: Fp8Options) -> PassResult:
        spec = options.spec
        linears = find_linears(program, spec)
        experts = find_experts(program, spec)
        layers = ExpertLayers(program, experts, "fp8", remark=EXPERTS_REMARK)
        choices: dict[str, Fp8Found] = {}
        if spec.needs_calibration:
            choices = _calibrated(program, find_groups(program, linears), options, layers)

        def rewrite(linear: Linear, result: PassResult) -> Verdict:
            choice = choices.get(linear.weight)
            to_fp8(program, linear, choice.input_scale if choice else None)
            return _verdict(linear, choice.error if choice else None)

        return rewrite_each(program, linears, rewrite, layers)


def _calibrated(
    program: Program, groups: Sequence[Group], options: Fp8Options, layers: ExpertLayers
) -> dict[str, Fp8Found]:
    """Static input scales over the calibration text, by the linear's weight."""
    if options.source is None or not options.samples:
        raise UserError(
            "static activations need calibration text and the checkpoint; dynamic ones need neither"
        )
    return calibrate(program, groups, StaticFp8(), options, layers)


def _verdict(linear: Linear, error: float | None) -> Verdict:
    return Verdict(
        linear.layer,
        "fp8",
        "fp8",
        linear.scheme.group_size,
        linear.parameters,
        error=error,
        activations=inputs_label(linear.scheme),
    )
