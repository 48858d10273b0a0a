"""Norms with their residual sum, and gates; quantized results are those of the two operators."""

from __future__ import annotations

import pytest
import torch
from helpers.guarded import DEVICE, among_poison, guarded_outputs
from hypothesis import example, given, settings
from hypothesis import strategies as st

from smelt.runtime.kernels.gpu import norms
from smelt.runtime.ops.gated_activation import ACTIVATIONS, activate
from smelt.runtime.ops.norm import rms_norm

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Half a unit in the last place of each, and what the order of float32 sums may add.
CLOSE = {
    torch.bfloat16: {"rtol": 2**-8, "atol": 1e-6},
    torch.float16: {"rtol": 2**-11, "atol": 1e-6},
    torch.float32: {"rtol": 2e-6, "atol": 1e-6},
}
LEADS = st.sampled_from([(0,), (1,), (7,), (2, 3)])


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=source)
    size = torch.randint(-2, 3, (*shape[:-1], 1), generator=source)
    return among_poison((x * 10.0**size).to(dtype))


@settings(max_examples=20, deadline=None)
@given(
    LEADS,
    st.integers(1, 300),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 1.0]),
    st.integers(0, 2**31),
)
@example((7,), 128, torch.bfloat16, True, True, 1.0, 0)
@example((2, 3), 600, torch.bfloat16, True, True, 0.0, 1)
def test_add_rms_norm(
    lead: tuple[int, ...],
    k: int,
    dtype: torch.dtype,
    added: bool,
    weighted: bool,
    offset: float,
    seed: int,
) -> None:
    x = draw((*lead, k), dtype, seed)
    residual = draw((*lead, k), dtype, seed + 1) if added else None
    weight = draw((k,), dtype, seed + 2) if weighted else None
    with guarded_outputs():
        total, normed = torch.ops.smelt.add_rms_norm_triton(x, residual, weight, 1e-5, offset)
    if residual is None:
        assert total.numel() == 0 and total.dtype == dtype
        total = x
    else:
        assert torch.equal(total, x + residual)
    want = rms_norm(total.float(), None if weight is None else weight.float(), 1e-5, offset)
    assert normed.dtype == dtype and normed.shape == x.shape
    torch.testing.assert_close(normed.float(), want, **CLOSE[dtype])


@settings(max_examples=20, deadline=None)
@given(
    LEADS,
    st.integers(1, 300),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from([None, 0, 16, 128]),
    st.integers(0, 2**31),
)
@example((7,), 260, torch.bfloat16, False, 128, 0)
@example((7,), 260, torch.bfloat16, True, 128, 0)
def test_add_rms_norm_quantized(
    lead: tuple[int, ...],
    k: int,
    dtype: torch.dtype,
    static: bool,
    block: int | None,
    seed: int,
) -> None:
    """block None: int8."""
    x, residual = draw((*lead, k), dtype, seed), draw((*lead, k), dtype, seed + 1)
    if x.numel() > k:
        x.view(-1, k)[1, k // 2] = float("nan")
    weight = draw((k,), dtype, seed + 2)
    input_scale = torch.tensor([0.013], device=DEVICE) if static else None
    args = (x, residual, weight, 1e-5, 0.0)
    ops = torch.ops.smelt
    total, normed = ops.add_rms_norm_triton(*args)
    with guarded_outputs():
        if block is None:
            found = ops.add_rms_norm_int8_triton(*args, input_scale)
        else:
            found = ops.add_rms_norm_fp8_triton(*args, input_scale, block)
    if block is None:
        q, scale = ops.quantize_int8_triton(normed, input_scale)
    else:
        q, scale = ops.quantize_fp8_triton(normed, input_scale, block)
    same(found, (total, q, scale))


def same(found: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(found, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)


@settings(max_examples=20, deadline=None)
@given(
    LEADS,
    st.integers(1, 300),
    st.sampled_from(DTYPES),
    st.sampled_from(ACTIVATIONS),
    st.booleans(),
    st.integers(0, 2**31),
)
@example((7,), 128, torch.bfloat16, "silu", True, 0)
def test_gated_activation(
    lead: tuple[int, ...], k: int, dtype: torch.dtype, kind: str, halves: bool, seed: int
) -> None:
    gate, up = pair(lead, k, dtype, halves, seed)
    with guarded_outputs():
        found = torch.ops.smelt.gated_activation_triton(gate, up, kind)
    assert found.dtype == dtype and found.is_contiguous()
    want = activate(gate.double(), kind) * up.double()
    # gelu subtracts nearly equal numbers where gate is very negative.
    error = CLOSE[dtype]["rtol"] * want.abs() + 1e-6 * (gate.double() * up.double()).abs() + 1e-6
    assert ((found.double() - want).abs() <= error).all()


def pair(
    lead: tuple[int, ...], k: int, dtype: torch.dtype, halves: bool, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """gate and up: halves of one tensor, or two."""
    if halves:
        # The largest product is a float16.
        gate, up = draw((*lead, 2 * k), dtype, seed).clamp_(-200, 200).chunk(2, -1)
        assert gate.numel() < 2 or not gate.is_contiguous() or k == gate.numel()
        return gate, up
    both = draw((*lead, k), dtype, seed), draw((*lead, k), dtype, seed + 1)
    return both[0].clamp_(-200, 200), both[1].clamp_(-200, 200)


@settings(max_examples=15, deadline=None)
@given(
    LEADS,
    st.integers(1, 150),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 0, 16, 128]),
    st.integers(0, 2**31),
)
@example((7,), 260, torch.bfloat16, True, False, 128, 0)
@example((7,), 260, torch.bfloat16, True, True, 0, 0)
def test_gated_activation_quantized(
    lead: tuple[int, ...],
    k: int,
    dtype: torch.dtype,
    halves: bool,
    static: bool,
    block: int | None,
    seed: int,
) -> None:
    """block None: int8."""
    gate, up = pair(lead, k, dtype, halves, seed)
    if gate.numel() > k:
        up[..., k // 2].flatten()[1:].fill_(float("inf"))
    input_scale = torch.tensor([0.013], device=DEVICE) if static else None
    ops = torch.ops.smelt
    y = ops.gated_activation_triton(gate, up, "silu")
    with guarded_outputs():
        if block is None:
            found = ops.gated_activation_int8_triton(gate, up, "silu", input_scale)
        else:
            found = ops.gated_activation_fp8_triton(gate, up, "silu", input_scale, block)
    if block is None:
        same(found, ops.quantize_int8_triton(y, input_scale))
    else:
        same(found, ops.quantize_fp8_triton(y, input_scale, block))


def test_gate_and_up_have_strides_of_their_own() -> None:
    both = draw((6, 90), torch.float32, 0).clamp_(-20, 20)
    apart = both[:, 60:].contiguous()
    for gate, up in ((both[:, :30], apart), (apart, both[:, 30:60]), (both[:, ::3], apart)):
        found = torch.ops.smelt.gated_activation_triton(gate, up, "silu")
        torch.testing.assert_close(found, activate(gate, "silu") * up, rtol=1e-5, atol=1e-5)


def test_unknown_activation() -> None:
    x = torch.randn(2, 4, device=DEVICE)
    with pytest.raises(ValueError, match="unknown activation"):
        torch.ops.smelt.gated_activation_triton(x, x, "tanh")


def test_exports() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> tuple:
            ops = torch.ops.smelt
            a = ops.add_rms_norm_triton(x, r, w, 1e-5, 0.0)
            b = ops.add_rms_norm_int8_triton(x, r, w, 1e-5, 0.0, None)
            c = ops.add_rms_norm_fp8_triton(x, r, w, 1e-5, 0.0, None, 128)
            gate, up = x.chunk(2, -1)
            d = ops.gated_activation_triton(gate, up, "silu")
            e = ops.gated_activation_int8_triton(gate, up, "silu", None)
            f = ops.gated_activation_fp8_triton(gate, up, "silu", None, 128)
            return (*a, *b, *c, d, *e, *f)

    def inputs(rows: int) -> tuple[torch.Tensor, ...]:
        shapes = ((rows, 300), (rows, 300), (300,))
        return tuple(torch.randn(s, dtype=torch.bfloat16, device=DEVICE) for s in shapes)

    tokens = torch.export.Dim("T", min=2, max=4096)
    shapes = ({0: tokens}, {0: tokens}, None)
    program = torch.export.export(Layer(), inputs(5), dynamic_shapes=shapes, strict=False)
    called = {n.target for n in program.graph.nodes if n.op == "call_function"}
    for name in ("add_rms_norm", "gated_activation"):
        for form in ("", "_int8", "_fp8"):
            assert getattr(torch.ops.smelt, f"{name}{form}_triton").default in called
    other = inputs(9)
    same(program.module()(*other), Layer()(*other))


@pytest.mark.parametrize("found", [80, 86, 90, 100, 120])
def test_variants_have_names_of_their_own(found: int) -> None:
    names = [variant.name for variant in norms.variants(found)]
    assert 0 < len(names) == len(set(names)) <= 14


def test_cost_counts_each_byte_once() -> None:
    # x, residual, their sum, the result; the weight.
    assert norms.norm_cost(10, 256, "same").bytes == 10 * 256 * 2 * 4 + 512
    assert norms.norm_cost(10, 256, "same", residual=False).bytes == 10 * 256 * 2 * 2 + 512
    assert norms.norm_cost(10, 256, "int8").bytes == 10 * (256 * 7 + 4) + 512
    assert norms.gate_cost(10, 256, "e4m3", 128).bytes == 10 * (256 * 5 + 8)
    assert len(norms.candidates("middle", 90)) == 6
