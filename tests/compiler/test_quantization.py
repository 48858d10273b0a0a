"""The quantization stage: a pass for each method, and text only where a method measures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from smelt.compiler.options import CompileOptions
from smelt.compiler.quantization import METHODS, quantize_stage
from smelt.compiler.weights import ModuleSource
from smelt.passes.quantize import spec
from smelt.runtime.errors import UserError

SOURCE = ModuleSource(nn.Linear(2, 2))


def stage(**options: Any) -> Any:
    return quantize_stage(CompileOptions(**options), SOURCE, None, 64, lambda *_: None)


def test_every_method_has_a_pass() -> None:
    assert set(METHODS) == set(spec.METHODS) - {"none"}
    assert stage() is None


@pytest.mark.parametrize(
    "options",
    [
        {"quant": "rtn", "format": "fp8"},
        {"quant": "fp8"},
        {"quant": "fp8", "group_size": 128},
        {"quant": "smoothquant", "alpha": 0.0},
    ],
)
def test_methods_that_measure_nothing_need_no_tokenizer(options: dict[str, Any]) -> None:
    found = stage(**options)
    assert isinstance(found.pass_, METHODS[options["quant"]])
    assert found.options.spec == CompileOptions(**options).spec


@pytest.mark.parametrize(
    "options",
    [
        {"quant": "smoothquant"},
        {"quant": "smoothquant", "alpha": 0.0, "activations": "static"},
        {"quant": "fp8", "activations": "static"},
        {"quant": "awq"},
    ],
)
def test_methods_that_measure_say_that_they_need_text(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="needs calibration text and so a tokenizer"):
        stage(**options)


def test_eight_bit_floats_are_checked_for_nan() -> None:
    from smelt.compiler.artifact import _finite

    values = torch.tensor([1.0, -448.0])
    assert _finite(values.to(torch.float8_e4m3fn)) and _finite(values)
    broken = torch.tensor([0x7F, 0x00], dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert not _finite(broken)
