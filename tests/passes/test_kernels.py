"""The table of kernels: every operator has one on every target, and choosing follows it."""

from __future__ import annotations

import pytest

from smelt.passes.kernels import INLINED, WEIGHT_ONLY, kernel_for
from smelt.passes.providers import INLINED as REFERENCES
from smelt.passes.providers import INLINED_LINEARS, PROVIDERS


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_every_operator_has_a_provider_that_can_compute_it(target: str) -> None:
    for operator, providers in PROVIDERS.items():
        kernel = kernel_for(operator, target)
        assert kernel.provider in providers and kernel.reason


def test_the_operators_that_are_inlined_are_those_with_a_reference_to_inline() -> None:
    assert set(INLINED) == set(REFERENCES) and set(WEIGHT_ONLY) == set(INLINED_LINEARS)


def test_a_slow_kernel_says_why_nothing_faster_runs() -> None:
    assert "no fp8 arithmetic" in str(kernel_for("linear_fp8", "cpu").limit)
    assert kernel_for("linear_w8a8", "cpu").limit is None
    assert "no kernel for 3 bits" in str(kernel_for("linear_int3", "cuda").limit)
    assert kernel_for("linear_int4", "cuda").limit is None
