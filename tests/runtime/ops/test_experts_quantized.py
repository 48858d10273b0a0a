"""The references of experts with quantized weights, against the dense experts they stand for."""

from __future__ import annotations

import pytest
import torch
from helpers.experts import Layer, random_layer, random_routing
from torch._subclasses.fake_tensor import FakeTensorMode

from smelt.runtime.ops import experts as dense
from smelt.runtime.ops import experts_quantized as quantized

CASES = [("int4", 16), ("int3", 0), ("int2", 16), ("int8", 0), ("fp8", 0), ("fp8", 16)]


def inputs(layer: Layer, tokens: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(tokens, layer.k), *random_routing(tokens, 2, layer.experts)


@pytest.mark.parametrize(("format", "group"), CASES)
def test_both_forms_equal_the_dense_experts(format: str, group: int) -> None:
    layer = random_layer(format, group=group)
    given = inputs(layer)
    want = dense.experts(*given, *layer.dense(), "silu")
    assert want.abs().max() > 0.1
    torch.testing.assert_close(quantized.experts_quantized(*given, *layer.arguments()), want)
    found = quantized.experts_quantized_blocked(*given, *layer.blocked())
    torch.testing.assert_close(found, want)


def test_rows_that_fill_no_block_stay_apart() -> None:
    """20 rows an expert: canonical forms know no blocks."""
    layer = random_layer("int4", k=20, width=10)
    given = inputs(layer)
    found = quantized.experts_quantized(*given, *layer.arguments())
    torch.testing.assert_close(found, dense.experts(*given, *layer.dense(), "silu"))


def test_blocks_of_scales_end_with_their_expert() -> None:
    """40 rows in blocks of 16 are three rows of scales for each expert."""
    layer = random_layer("fp8", k=40, width=20, group=16)
    assert layer.gate_up[1].shape == (5 * 3, 3)
    given = inputs(layer)
    found = quantized.experts_quantized(*given, *layer.arguments())
    torch.testing.assert_close(found, dense.experts(*given, *layer.dense(), "silu"))


def test_an_unknown_format_is_refused() -> None:
    layer = random_layer("int8")
    arguments = [*layer.arguments()]
    arguments[7] = "int5"
    with pytest.raises(ValueError, match="no experts of format 'int5', known: int4"):
        quantized.experts_quantized(*inputs(layer), *arguments)


@pytest.mark.parametrize("name", ["experts_quantized", "experts_quantized_blocked"])
def test_fakes_tell_the_truth(name: str) -> None:
    layer = random_layer("int4")
    operator = getattr(torch.ops.smelt, name)
    x, index, weight = inputs(layer)
    rest = layer.arguments() if name == "experts_quantized" else layer.blocked()
    args = (x.bfloat16().T.contiguous().T, index, weight, *rest)
    real = operator(*args)
    with FakeTensorMode() as mode:
        faked = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        fake = operator(*faked)
    assert real.dtype == torch.bfloat16
    assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())
