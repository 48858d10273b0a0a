"""The quantization passes through the harness that every pass goes through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.check_pass import check_pass
from helpers.quantized import module, program_of, random_ids
from helpers.tiny import Subject

from smelt.compiler.weights import ModuleSource
from smelt.passes.base import Pass
from smelt.passes.quantize import (
    QuantizeAwq,
    QuantizeGptq,
    QuantizeMixed,
    QuantizeRtn,
    QuantSpec,
)

PASSES: dict[str, Pass] = {"rtn": QuantizeRtn(), "awq": QuantizeAwq(), "gptq": QuantizeGptq()}
# Per layer: fused q/k/v, o, fused gate/up, down. The head stays.
LINEARS = 4


@pytest.fixture(scope="module")
def subject() -> Subject:
    model = module("Llama", num_hidden_layers=1)
    return Subject(program_of(model), ModuleSource(model), torch.tensor(random_ids(1, 24)[0]))


def options(method: str, form: str, subject: Subject) -> dict[str, Any]:
    # Random weights at 3 bits need small groups to keep the promised agreement of a lossy pass.
    given: dict[str, Any] = {"spec": QuantSpec(method, form, 16 if form == "int3" else 32)}
    if method != "rtn":
        given |= {"samples": random_ids(4, 32, seed=3), "source": subject.source}
    return given


@pytest.mark.parametrize(
    ("method", "form"),
    [
        ("rtn", "int8"),
        ("rtn", "int4"),
        ("rtn", "int3"),
        ("awq", "int4"),
        ("awq", "int3"),
        ("gptq", "int4"),
        ("gptq", "int3"),
    ],
)
def test_every_linear_but_the_head_is_packed(method: str, form: str, subject: Subject) -> None:
    check_pass(
        subject,
        PASSES[method],
        before={"aten.linear": LINEARS + 1, f"smelt.linear_{form}": 0},
        after={"aten.linear": 1, f"smelt.linear_{form}": LINEARS},
        matched=8,
        rewritten=7,
        declined=["lm_head"],
        options=options(method, form, subject),
        golden=f"quantize-{method}_layer" if form == "int4" else None,
    )


def test_mixed_packs_each_layer_in_its_own_format(subject: Subject) -> None:
    check_pass(
        subject,
        QuantizeMixed(),
        before={"aten.linear": LINEARS + 1},
        after={"aten.linear": 1},
        matched=8,
        rewritten=7,
        declined=["lm_head"],
        options={
            "spec": QuantSpec("mixed", bits=6.0),
            "samples": random_ids(4, 32, seed=3),
            "source": subject.source,
        },
        golden="quantize-mixed_layer",
    )
