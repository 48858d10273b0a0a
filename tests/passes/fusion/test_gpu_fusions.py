"""The fusions behind Triton kernels: epilogues, the rotary embedding, quantized inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.check_pass import check_pass, operators
from helpers.tiny import Subject, Toy, program_of, tiny_program
from torch import nn

from smelt.compiler.manager import PassManager
from smelt.compiler.pipeline import PipelineConfig, pipeline, portable_stages
from smelt.compiler.quantization import stage_for
from smelt.passes.fusion.epilogues import FuseEpilogues
from smelt.passes.fusion.quantized_inputs import FuseQuantizedInputs
from smelt.passes.fusion.rope_write import FuseRopeWrite
from smelt.passes.program import Dialect
from smelt.passes.providers import ChooseProviders
from smelt.passes.quantize.spec import QuantSpec
from smelt.runtime.kernels.gpu import operators as _  # noqa: F401 - registers them

LAYERS = 2


def chosen(spec: QuantSpec | None, *more: Any, **overrides: str) -> Subject:
    """The tiny Llama for CUDA, its providers chosen, and `more` passes run."""
    subject = tiny_program("llama")
    quantize = stage_for(spec) if spec is not None else None
    options = {"choose-providers": {"overrides": tuple(overrides.items())}}
    stages = pipeline(PipelineConfig("O2", quantize, options=options))
    subject.program.target = "cuda"
    first, rest = portable_stages(stages)
    wanted = [s for s in rest if isinstance(s.pass_, (ChooseProviders, *more))]
    PassManager([*first, *wanted]).run(subject.program)
    return subject


def lowered(toy: Toy) -> Subject:
    """A toy written with kernels."""
    subject = program_of(toy)
    subject.program.dialect = Dialect.LOWERED
    return subject


@pytest.mark.parametrize(
    "spec",
    [QuantSpec("rtn", "int4", 32), QuantSpec("rtn", "int8"), QuantSpec("smoothquant", alpha=0.0)],
)
def test_residuals_and_gates_end_the_linears_before_them(spec: QuantSpec) -> None:
    found = check_pass(
        chosen(spec),
        FuseEpilogues(),
        before={"aten.add": 2 * LAYERS, "gated_activation": LAYERS},
        after={"aten.add": 0, "gated_activation": 0},
        matched=3 * LAYERS,
        rewritten=3 * LAYERS,
        tolerance=2e-3,
    )
    assert found.program.dialect is Dialect.LOWERED


def test_linears_of_other_providers_are_left_to_inductor() -> None:
    check_pass(
        chosen(None),
        FuseEpilogues(),
        before={"aten.add": 2 * LAYERS, "gated_activation": LAYERS},
        after={"aten.add": 2 * LAYERS, "gated_activation": LAYERS},
        matched=0,
    )


class Sums(Toy):
    """Linears whose results are added to what does not fit, or read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(16, 16))
        self.scales = nn.Parameter(torch.empty(16, 1))

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        weight, scales = (self.weight * 20).round().to(torch.int8), self.scales.bfloat16()
        return torch.ops.smelt.linear_int8_triton(x, weight, scales, None, None, "", 0)

    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        y = self.linear(x) + self.scales[:, 0].float()  # another shape
        z = self.linear(y)
        z = z + z
        twice = self.linear(z)
        return twice * 0.5 + (x + twice)  # another reader


def test_near_misses_keep_their_sums() -> None:
    check_pass(
        lowered(Sums()),
        FuseEpilogues(),
        before={"smelt.linear_int8_triton": 3},
        after={"smelt.linear_int8_triton": 3},
        matched=2,
        rewritten=0,
        declined=["another shape or dtype", "the result itself"],
    )


def test_the_rotary_embedding_goes_into_the_write() -> None:
    check_pass(
        chosen(None),
        FuseRopeWrite(),
        before={"rope": 2 * LAYERS, "smelt.rope_write_triton": LAYERS},
        after={"rope": 0, "smelt.rope_write_triton": LAYERS},
        matched=LAYERS,
        rewritten=LAYERS,
        tolerance=1e-5,
    )


@pytest.mark.parametrize(
    ("spec", "norm"),
    [
        (QuantSpec("smoothquant", alpha=0.0), "add_rms_norm_int8_triton"),
        (QuantSpec("fp8"), "add_rms_norm_fp8_triton"),
        (QuantSpec("fp8", group_size=128), "add_rms_norm_fp8_triton"),
    ],
)
def test_norms_and_gates_give_the_next_products_their_inputs(spec: QuantSpec, norm: str) -> None:
    subject = chosen(spec)  # gates stay: without their epilogues there is one to quantize
    found = check_pass(
        subject,
        FuseQuantizedInputs(),
        before={f"smelt.{norm}": 0},
        after={f"smelt.{norm}": 2 * LAYERS, "gated_activation": 0},
        matched=3 * LAYERS,
        rewritten=3 * LAYERS,
        tolerance=2e-2,
    )
    gate = norm.replace("add_rms_norm", "gated_activation")
    assert operators(found.program)[f"smelt.{gate}"] == LAYERS


def test_a_gated_linear_cannot_know_the_scale_of_a_token() -> None:
    subject = chosen(QuantSpec("smoothquant", alpha=0.0), FuseEpilogues)
    found = check_pass(
        subject,
        FuseQuantizedInputs(),
        before={"smelt.linear_w8a8_requantized_triton": 0},
        after={"smelt.linear_w8a8_requantized_triton": 0},
        matched=3 * LAYERS,
        rewritten=2 * LAYERS,
        declined=["no tile of the linear holds"] * LAYERS,
        tolerance=2e-2,
    )
    assert found.record["rewritten"]


def test_blocks_of_scales_are_found_by_the_gated_linear_itself() -> None:
    subject = chosen(QuantSpec("fp8", group_size=128), FuseEpilogues)
    check_pass(
        subject,
        FuseQuantizedInputs(),
        before={"smelt.linear_fp8_requantized_triton": 0},
        after={"smelt.linear_fp8_requantized_triton": LAYERS},
        rewritten=3 * LAYERS,
        tolerance=2e-2,
    )


def test_with_a_static_scale_the_linear_quantizes() -> None:
    class Static(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(16, 16))
            self.scales = nn.Parameter(torch.empty(16))

        def linear(self, x: torch.Tensor) -> torch.Tensor:
            ops = torch.ops.smelt
            q, scale = ops.quantize_int8_triton(x, self.scales[:1].abs() * 0.05)
            weight = (self.weight * 20).round().to(torch.int8)
            w = (weight, self.scales, None, None, "", "fp32", 0)
            return ops.linear_w8a8_triton(q, scale, *w)

        def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return self.linear(self.linear(x))

    check_pass(
        lowered(Static()),
        FuseQuantizedInputs(),
        before={"smelt.quantize_int8_triton": 2, "smelt.linear_w8a8_triton": 2},
        after={
            "smelt.quantize_int8_triton": 1,
            "smelt.linear_w8a8_triton": 1,
            "smelt.linear_w8a8_requantized_triton": 1,
        },
        matched=1,
        rewritten=1,
    )
