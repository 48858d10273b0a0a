"""The plan of a calibration's memory against what it really allocates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.memory import PeakMemory
from helpers.quantized import module, program_of, random_ids

from smelt.compiler.weights import ModuleSource
from smelt.passes.quantize import QuantSpec, formats
from smelt.passes.quantize.awq import Awq
from smelt.passes.quantize.calibrate import CalibrationOptions, calibrate
from smelt.passes.quantize.calibration_memory import Memory
from smelt.passes.quantize.expert_layers import ExpertLayers
from smelt.passes.quantize.experts import find_experts
from smelt.passes.quantize.fp8 import StaticFp8
from smelt.passes.quantize.gptq import Gptq
from smelt.passes.quantize.groups import find_groups
from smelt.passes.quantize.linears import find_linears
from smelt.passes.quantize.smoothquant import SmoothQuant

SMOOTH = QuantSpec("smoothquant")
METHODS: dict[str, tuple[Any, QuantSpec]] = {
    "awq": (Awq(), QuantSpec("awq", "int4", 64)),
    "gptq": (Gptq(), QuantSpec("gptq", "int4", 64)),
    "smoothquant": (SmoothQuant(SMOOTH), SMOOTH),
    "fp8": (StaticFp8(), QuantSpec("fp8", activations="static")),
}


def measured(
    name: str,
    samples: list[list[int]],
    dtype: torch.dtype,
    rows: int,
    family: str = "Llama",
    **sizes: int,
) -> tuple[int, Memory]:
    """(bytes really allocated at the peak, the plan)."""
    method, spec = METHODS[name]
    model = module(family, num_hidden_layers=2, **sizes).to(dtype)
    program, told = program_of(model), []
    groups = find_groups(program, find_linears(program, spec))
    options = CalibrationOptions(
        spec, samples, ModuleSource(model), max_rows=rows, planned=told.append
    )
    layers = ExpertLayers(program, find_experts(program, spec), name, method, options)
    with PeakMemory() as memory:
        calibrate(program, groups, method, options, layers)
    (plan,) = told
    return memory.peak, plan


slow = pytest.mark.slow


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=slow), torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_the_plan_is_within_15_percent(name: str, dtype: torch.dtype) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 768}
    few, many = random_ids(2, 16), random_ids(40, 64)
    for samples in (few, many):
        found, plan = measured(name, samples, dtype, 64, **sizes)
        assert plan.bytes == pytest.approx(found, rel=0.15), (name, len(samples))


@pytest.mark.parametrize("name", ["awq", pytest.param("gptq", marks=slow)])
def test_experts_are_planned_one_by_one(name: str) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_local_experts": 8}
    for samples in (random_ids(2, 100), random_ids(30, 100)):
        found, plan = measured(name, samples, torch.float32, 64, "Mixtral", **sizes)
        assert plan.bytes == pytest.approx(found, rel=0.15), len(samples)


def test_a_search_works_on_a_bounded_part_of_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 2048}
    whole, _ = measured("awq", random_ids(2, 16), torch.float32, 16, **sizes)
    monkeypatch.setattr(formats, "CHUNK", 1 << 15)
    parts, plan = measured("awq", random_ids(2, 16), torch.float32, 16, **sizes)
    assert parts < 0.6 * whole
    assert plan.bytes == pytest.approx(parts, rel=0.15)


def test_it_is_said_in_words() -> None:
    assert str(Memory(1_940_000_000, "x")) == "about 1.9 GB beside the model's files"
