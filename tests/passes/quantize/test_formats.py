"""The formats' arithmetic: against its definition, against torchao, and at the edges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.passes.quantize.formats import CLIP_STEPS, fake_quantize, quantize
from smelt.passes.quantize.spec import Scheme
from smelt.passes.weights import OPERATIONS
from smelt.runtime.errors import SmeltError
from smelt.runtime.ops.packing import dequantize, dequantize_int8, pack, unpack

shapes = st.tuples(st.integers(1, 9), st.integers(1, 6), st.sampled_from([1, 2, 7, 16, 32]))
magnitudes = st.sampled_from([1e-30, 1e-6, 1.0, 1e4, 1e30])


def random_weight(n: int, k: int, seed: int, magnitude: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator) * magnitude


@given(shapes, magnitudes, st.sampled_from([2, 3, 4]), st.integers(0, 1000))
@settings(max_examples=90, deadline=None)
def test_grouped_is_within_half_a_step(
    shape: tuple, magnitude: float, bits: int, seed: int
) -> None:
    n, groups, size = shape
    weight = random_weight(n, groups * size, seed, magnitude)
    result = quantize(weight, Scheme(f"int{bits}", size))
    top = 2**bits - 1
    assert result.q.max() <= top and result.zeros is not None and result.zeros.max() <= top
    step = result.scales.float().repeat_interleave(weight.shape[1] // result.scales.shape[1], 1)
    # bfloat16 rounds the scale by up to 2^-9 of itself, which at 15 steps is 0.03 steps more; the
    # zero point is itself rounded to a step.
    assert ((result.dequantize() - weight).abs() <= 1.04 * step).all()


@given(shapes, magnitudes, st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_int8_is_within_half_a_step(shape: tuple, magnitude: float, seed: int) -> None:
    n, groups, size = shape
    weight = random_weight(n, groups * size, seed, magnitude)
    result = quantize(weight, Scheme("int8", size if size > 1 else 0))
    assert result.q.abs().max() <= 127 and result.zeros is None
    step = result.scales.float().repeat_interleave(weight.shape[1] // result.scales.shape[1], 1)
    assert ((result.dequantize() - weight).abs() <= 0.76 * step).all()


@given(st.integers(1, 5), st.integers(1, 70), st.sampled_from([2, 3, 4]), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_packing_keeps_every_value_also_at_odd_k(n: int, k: int, bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
    packed = pack(values, bits)
    assert packed.shape == (n, -(-k * bits // 8))
    assert torch.equal(unpack(packed, bits, k), values)


def test_packed_rows_are_little_endian_streams_of_bits() -> None:
    for bits, values in ((4, [1, 2, 15]), (3, [1, 2, 7, 4, 5, 6, 0, 3]), (2, [1, 2, 3, 0, 1])):
        stream = sum(value << (bits * i) for i, value in enumerate(values))
        row = stream.to_bytes(-(-len(values) * bits // 8), "little")
        assert bytes(pack(torch.tensor([values], dtype=torch.uint8), bits)[0].tolist()) == row


@pytest.mark.parametrize("form", ["int4", "int3", "int2", "int8"])
def test_plan_step_packs_what_the_arithmetic_gives(form: str) -> None:
    weight = random_weight(24, 64, 3)
    scheme = Scheme(form, 32)
    outputs = OPERATIONS[f"quantize_{form}"](weight, groups=2, kinds=[], layer="x")
    if form == "int8":
        back = dequantize_int8(*outputs)  # type: ignore[misc]
    else:
        back = dequantize(*outputs, bits=int(form[3:]), k=64)  # type: ignore[misc]
    assert torch.equal(back, fake_quantize(weight, scheme))
    metas = OPERATIONS[f"quantize_{form}"](weight.to("meta"), groups=2, kinds=[], layer="x")
    assert [(m.shape, m.dtype) for m in metas] == [(o.shape, o.dtype) for o in outputs]


@pytest.mark.parametrize("form", ["int4", "int3", "int2", "int8"])
def test_zero_stays_zero_and_constant_groups_are_exact_enough(form: str) -> None:
    scheme = Scheme(form, 16)
    assert not fake_quantize(torch.zeros(3, 32), scheme).any()
    mixed = random_weight(4, 32, 0) + 3  # all of one sign: 0 is not inside the range
    mixed[:, 5] = 0
    assert not fake_quantize(mixed, scheme)[:, 5].any()
    constant = torch.full((2, 16), -0.37)
    assert torch.allclose(fake_quantize(constant, scheme), constant, rtol=2**-8)


def test_scale_is_rounded_to_bfloat16_before_it_divides() -> None:
    """The kernel multiplies with the stored scale, so rounding must know that very value."""
    weight = random_weight(64, 64, 5)
    stored = quantize(weight, Scheme("int8", 0))
    scale = stored.scales.float()
    assert torch.equal(stored.q.float(), (weight / scale).round().clamp(-127, 127))
    late = (weight / (weight.abs().amax(1, keepdim=True) / 127)).round() * scale
    ours, theirs = (stored.dequantize() - weight).norm(), (late - weight).norm()
    assert ours < theirs


def test_quantization_of_a_row_follows_its_scale() -> None:
    """Q(w / c) = Q(w) / c for powers of two: dividing a producer's rows changes no other choice."""
    weight = random_weight(8, 64, 6)
    factor = torch.tensor([0.25, 0.5, 1, 2, 4, 8, 16, 32.0])[:, None]
    scheme = Scheme("int4", 16)
    assert torch.equal(
        fake_quantize(weight / factor, scheme), fake_quantize(weight, scheme) / factor
    )


def test_clip_shrinks_the_range() -> None:
    weight = random_weight(4, 32, 7)
    clip = torch.full((4, 2), CLIP_STEPS // 2, dtype=torch.uint8)
    whole, clipped = (quantize(weight, Scheme("int4", 16), c) for c in (None, clip))
    ratio = clipped.scales.float() / whole.scales.float()
    assert torch.allclose(ratio, torch.tensor(0.5), atol=0.01)


def test_columns_and_rows_are_applied_in_float32() -> None:
    weight = random_weight(8, 32, 8).to(torch.bfloat16)
    columns, rows = torch.rand(32) + 0.5, torch.rand(8) + 0.5
    outputs = OPERATIONS["quantize_int8"](
        weight, columns, rows, groups=1, kinds=["columns", "rows"], layer="x"
    )
    expected = fake_quantize(weight.float() * columns / rows[:, None], Scheme("int8", 0))
    assert torch.equal(dequantize_int8(*outputs), expected)  # type: ignore[misc]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_the_layer(bad: float) -> None:
    weight = random_weight(4, 32, 9)
    weight[2, 3] = bad
    with pytest.raises(SmeltError, match=r"layers\.1\.o_proj: 1 of its 128 weights.*row 2"):
        OPERATIONS["quantize_int4"](weight, groups=1, kinds=[], layer="layers.1.o_proj")


def test_int4_agrees_with_torchao() -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    weight = random_weight(32, 128, 10)
    ours = quantize(weight, Scheme("int4", 32))
    assert ours.zeros is not None
    scale, zero = primitives.choose_qparams_affine(
        weight,
        mapping_type=primitives.MappingType.ASYMMETRIC,
        block_size=(1, 32),
        target_dtype=torch.uint8,
        quant_min=0,
        quant_max=15,
        scale_dtype=torch.bfloat16,
        zero_point_dtype=torch.int32,
    )
    assert torch.equal(ours.scales, scale)
    # torchao takes the zero point from the unrounded scale: they may part by one at a tie.
    assert (ours.zeros.int() - zero).abs().max() <= 1
    q = primitives.quantize_affine(
        weight, (1, 32), scale.float(), ours.zeros.int(), torch.uint8, 0, 15
    )
    assert torch.equal(ours.q, q)


def test_int8_agrees_with_torchao() -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    weight = random_weight(16, 64, 11)
    ours = quantize(weight, Scheme("int8", 0))
    zero = torch.zeros(16, 1, dtype=torch.int32)
    q = primitives.quantize_affine(
        weight, (1, 64), ours.scales.float(), zero, torch.int8, -127, 127
    )
    assert torch.equal(ours.q, q)


def test_fold_factor_hands_on_what_rounding_leaves() -> None:
    generator = torch.Generator().manual_seed(12)
    for offset in (0.0, 1.0):
        weight = (torch.rand(64, generator=generator) - offset * 0.5).to(torch.bfloat16)
        factor = torch.rand(64, generator=generator) * 3 + 0.1
        new, left = OPERATIONS["fold_factor"](weight, factor, offset=offset)
        assert new.dtype == torch.bfloat16
        assert torch.allclose((new.float() + offset) * left, weight.float() + offset, rtol=1e-6)
        assert torch.allclose(left, factor, rtol=0.05)
    new, left = OPERATIONS["fold_factor"](torch.zeros(4), torch.full((4,), 2.0), offset=0.0)
    assert torch.equal(left, torch.full((4,), 2.0)) and not new.any()
