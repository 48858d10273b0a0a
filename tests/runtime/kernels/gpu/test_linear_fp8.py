"""e4m3 times e4m3 on a GPU against the reference in float32, with scales of rows and of blocks."""

from __future__ import annotations

import pytest
import torch
from helpers.guarded import DEVICE, among_poison, guarded_outputs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from smelt.runtime.kernels.gpu import linear_fp8 as module
from smelt.runtime.kernels.gpu.linear_launch import Finish, Linear
from smelt.runtime.kernels.gpu.rounding import NAMES
from smelt.runtime.ops.gated_activation import ACTIVATIONS, activate
from smelt.runtime.ops.linear_fp8 import (
    dequantize_fp8,
    linear_fp8,
    round_activations,
    to_e4m3,
)

# (rows of the step, bound of the program): each regime, its bound, one row, none.
STEPS = st.sampled_from([(0, 16), (1, 16), (5, 16), (16, 16), (17, 64), (64, 64), (0, 0), (37, 0)])
DTYPE = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
# A unit in the last place, and the order of float32 sums.
CLOSE = {
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-4},
    torch.float16: {"rtol": 2**-10, "atol": 1e-4},
    torch.float32: {"rtol": 1e-5, "atol": 1e-4},
}
OPS = torch.ops.smelt


class Case:
    """An input and a layer of n outputs; `layer` is on DEVICE, between poison."""

    def __init__(
        self,
        rows: int,
        n: int,
        k: int,
        block: int,
        dtype: torch.dtype,
        seed: int,
        gated: bool = False,
    ) -> None:
        source = torch.Generator().manual_seed(seed)
        width = 2 * n if gated else n
        self.x = torch.randn(rows, k, generator=source).to(dtype)
        self.weight = to_e4m3(torch.randn(width, k, generator=source) * 50)
        shape = (-(-width // block), -(-k // block)) if block else (width, 1)
        self.scales = (torch.rand(shape, generator=source) + 0.1) / 50 / k**0.5
        self.bias = torch.randn(width, generator=source).to(dtype)
        self.residual = torch.randn(rows, n, generator=source).to(dtype)
        self.block = block

    def layer(self, bias: bool, residual: bool, gate: str) -> tuple[object, ...]:
        return (
            among_poison(self.weight.view(torch.uint8)).view(torch.float8_e4m3fn),
            among_poison(self.scales),
            among_poison(self.bias) if bias else None,
            among_poison(self.residual) if residual else None,
            gate,
        )

    def quantized(
        self, input_scale: torch.Tensor | None, block: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scale = None if input_scale is None else input_scale.to(DEVICE)
        q, s = OPS.quantize_fp8_triton(self.x.to(DEVICE), scale, block)
        return among_poison(q.view(torch.uint8)).view(q.dtype), among_poison(s)


@settings(max_examples=12, deadline=None)
@given(
    STEPS,
    st.integers(1, 70),
    st.integers(1, 200),
    DTYPE,
    st.booleans(),
    st.sampled_from([0, 32, 64, 96]),
    st.booleans(),
    st.integers(0, 2**31),
)
@example((5, 16), 16, 700, torch.bfloat16, True, 0, False, 0)
@example((5, 16), 33, 700, torch.bfloat16, True, 64, False, 0)
@example((37, 0), 70, 130, torch.float32, True, 64, False, 1)
def test_against_the_reference(
    step: tuple[int, int],
    n: int,
    k: int,
    dtype: torch.dtype,
    bias: bool,
    block: int,
    static: bool,
    seed: int,
) -> None:
    rows, bound = step
    case = Case(rows, n, k, block, dtype, seed)
    if rows > 1:
        case.x[rows // 2, k // 2] = float("inf")
        case.x[-1] *= 0
    input_scale = torch.tensor([0.011]) if static else None
    # Blocks of activations are powers of two on the GPU; a weight's need not be.
    x_block = 0 if static or block == 96 else block
    with guarded_outputs():
        y = OPS.linear_fp8_triton(
            *case.quantized(input_scale, x_block),
            *case.layer(bias, False, ""),
            block,
            NAMES[dtype],
            bound,
        )
    added = case.bias if bias else None
    mode = "static" if static else "dynamic"
    if x_block == block:
        want = linear_fp8(case.x, case.weight, case.scales, input_scale, added, mode, block)
    else:
        want = one_scale_a_row(case, input_scale, mode, added)
    assert y.dtype == dtype and y.shape == (rows, n)
    torch.testing.assert_close(y.cpu(), want, **CLOSE[dtype], equal_nan=True)
    assert rows < 2 or (y[rows // 2].isnan().all() and y[0].isfinite().all())


def one_scale_a_row(
    case: Case, input_scale: torch.Tensor | None, mode: str, bias: torch.Tensor | None
) -> torch.Tensor:
    """The reference for weights of blocks times activations with one scale a row."""
    whole = dequantize_fp8(case.weight, case.scales, case.block)
    y = F.linear(round_activations(case.x, input_scale, mode, 0), whole)
    return (y + bias.float() if bias is not None else y).to(case.x.dtype)


@settings(max_examples=10, deadline=None)
@given(
    STEPS,
    st.integers(1, 40),
    st.integers(1, 130),
    DTYPE,
    st.sampled_from(["", *ACTIVATIONS]),
    st.sampled_from([0, 32]),
    st.integers(0, 2**31),
)
@example((37, 0), 33, 64, torch.bfloat16, "silu", 32, 0)
@example((37, 0), 32, 64, torch.bfloat16, "silu", 32, 0)
@example((5, 16), 16, 512, torch.bfloat16, "silu", 32, 0)
@example((5, 16), 16, 512, torch.float32, "", 0, 0)
def test_gate_or_residual(
    step: tuple[int, int],
    n: int,
    k: int,
    dtype: torch.dtype,
    gate: str,
    block: int,
    seed: int,
) -> None:
    """33 gates with blocks of 32: a block holds gates and what they gate."""
    rows, bound = step
    case = Case(rows, n, k, block, dtype, seed, bool(gate))
    with guarded_outputs():
        y = OPS.linear_fp8_triton(
            *case.quantized(None, block),
            *case.layer(True, not gate, gate),
            block,
            NAMES[dtype],
            bound,
        )
    want = linear_fp8(case.x.float(), case.weight, case.scales, None, case.bias, "dynamic", block)
    if gate:
        gates, ups = want.chunk(2, -1)
        want = activate(gates, gate) * ups
    else:
        want = want + case.residual.float()
    assert y.dtype == dtype and y.shape == (rows, n)
    torch.testing.assert_close(y.cpu().float(), want, **CLOSE[dtype])


@settings(max_examples=8, deadline=None)
@given(
    STEPS,
    st.integers(1, 40),
    st.integers(1, 100),
    st.sampled_from([None, 16, 32, 64]),
    st.sampled_from(["", "silu"]),
    st.sampled_from([0, 32]),
    st.integers(0, 2**31),
)
@example((5, 16), 16, 512, 16, "", 0, 0)
@example((37, 0), 70, 64, 32, "silu", 32, 0)
def test_requantized(
    step: tuple[int, int],
    n: int,
    k: int,
    output_block: int | None,
    gate: str,
    block: int,
    seed: int,
) -> None:
    """As `linear_fp8_triton` and then quantization of its rounded result. None: a static scale."""
    rows, bound = step
    case = Case(rows, n, k, block, torch.bfloat16, seed, bool(gate))
    if rows > 1:
        case.x[0, 0] = float("nan")
    scale = torch.tensor([0.01], device=DEVICE) if output_block is None else None
    layer = (*case.quantized(None, block), *case.layer(True, False, gate))
    # The same sums: a split along K adds them in another order.
    parts = [
        Linear("e4m3", bound, n, k, block).config(module.TABLE, f, 0)[1]
        for f in (Finish(gate, None, None, "bf16"), finish(gate, scale, output_block or 0))
    ]
    assert parts[0] == parts[1]
    y = OPS.linear_fp8_triton(*layer, block, "bf16", bound)
    with guarded_outputs():
        q, s = OPS.linear_fp8_requantized_triton(
            *layer, scale, output_block or 0, block, "bf16", bound
        )
    want, t = OPS.quantize_fp8_triton(y, scale, output_block or 0)
    assert q.dtype == torch.float8_e4m3fn and q.shape == y.shape
    if output_block is None:
        # A row's NaN is in its values: a tile does not see the whole row.
        assert torch.equal(s.cpu(), torch.full((rows, 1), 0.01))
        if rows > 1:
            assert q[0].float().isnan().all()
            q, want = q[1:], want[1:]
    else:
        torch.testing.assert_close(s, t, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(q.float(), want.float(), rtol=0, atol=0, equal_nan=True)


def test_requantized_infinity_is_nan() -> None:
    """float16 overflows: the value, or its block's scale, says so."""
    case = Case(3, 32, 64, 0, torch.float16, 0)
    case.scales[5] = 1e6
    layer = (*case.quantized(None, 0), *case.layer(False, False, ""))
    assert OPS.linear_fp8_triton(*layer, 0, "fp16", 0)[:, 5].isinf().all()
    static = torch.tensor([0.01], device=DEVICE)
    q, _ = OPS.linear_fp8_requantized_triton(*layer, static, 0, 0, "fp16", 0)
    lost = q.float().isnan()
    assert lost[:, 5].all() and lost.sum() == 3
    _, scale = OPS.linear_fp8_requantized_triton(*layer, None, 16, 0, "fp16", 0)
    assert scale.isnan().tolist() == [[True, False]] * 3


def finish(gate: str, scale: torch.Tensor | None, block: int) -> Finish:
    return Finish(gate, None, None, "bf16", "e4m3", scale, block)


@pytest.mark.parametrize("block", [0, 32])
@pytest.mark.parametrize("k", [256, 500, 1024])
def test_split_along_k(k: int, block: int) -> None:
    n = 16
    parts = Linear("e4m3", 16, n, k, block).config(module.TABLE, Finish("", None, None, "fp32"), 0)
    assert parts[1] == {256: 2, 500: 4, 1024: 4}[k]
    case = Case(5, n, k, block, torch.float32, k)
    with guarded_outputs():
        y = OPS.linear_fp8_triton(
            *case.quantized(None, block), *case.layer(True, False, ""), block, "fp32", 16
        )
    want = linear_fp8(case.x, case.weight, case.scales, None, case.bias, "dynamic", block)
    torch.testing.assert_close(y.cpu(), want, **CLOSE[torch.float32])


def test_nan_of_a_weight_is_not_lost() -> None:
    case = Case(5, 20, 64, 0, torch.bfloat16, 0)
    case.weight.view(torch.uint8)[3, 7] = 0x7F
    y = OPS.linear_fp8_triton(*case.quantized(None, 0), *case.layer(True, False, ""), 0, "bf16", 16)
    lost = y.isnan()
    assert lost[:, 3].all() and lost.sum() == 5


def test_a_row_does_not_depend_on_the_others() -> None:
    case = Case(16, 40, 300, 0, torch.bfloat16, 0)
    q, scale = case.quantized(None, 0)
    layer = case.layer(True, False, "")
    together = OPS.linear_fp8_triton(q, scale, *layer, 0, "bf16", 16)
    for row in (0, 7, 15):
        one = slice(row, row + 1)
        alone = OPS.linear_fp8_triton(q[one], scale[one], *layer, 0, "bf16", 16)
        assert torch.equal(alone[0], together[row])


def test_what_is_refused() -> None:
    case = Case(2, 4, 40, 0, torch.bfloat16, 0)
    layer = (*case.quantized(None, 0), *case.layer(False, False, ""))
    with pytest.raises(ValueError, match="multiples of 32"):
        OPS.linear_fp8_triton(*layer, 40, "bf16", 0)
    with pytest.raises(ValueError, match="3 scales a row, not 1 or 2"):
        scale = torch.ones(2, 3, device=DEVICE)
        OPS.linear_fp8_triton(layer[0], scale, *layer[2:], 32, "bf16", 0)
    with pytest.raises(ValueError, match="39 input features, the weight has 40"):
        OPS.linear_fp8_triton(layer[0][:, :39], *layer[1:], 0, "bf16", 0)
    with pytest.raises(ValueError, match="no tile sees a whole row"):
        OPS.linear_fp8_requantized_triton(*layer, None, 0, 0, "bf16", 0)
    for block in (8, 48, 512):
        with pytest.raises(ValueError, match="power of two from 16 to 256"):
            OPS.linear_fp8_requantized_triton(*layer, None, block, 0, "bf16", 0)


def test_exports() -> None:
    class Layer(torch.nn.Module):
        def forward(self, q: torch.Tensor, s: torch.Tensor, w: torch.Tensor, ws: torch.Tensor):
            args = (q, s, w, ws, None, None)
            y = OPS.linear_fp8_triton(*args, "silu", 32, "bf16", 16)
            z, scale = OPS.linear_fp8_requantized_triton(*args, "", None, 16, 32, "bf16", 0)
            return y, z.view(torch.uint8), scale

    def inputs(rows: int) -> tuple[torch.Tensor, ...]:
        case = Case(rows, 12, 300, 32, torch.bfloat16, 0, gated=True)
        return (*case.quantized(None, 32), case.weight.to(DEVICE), case.scales.to(DEVICE))

    tokens = torch.export.Dim("T", min=2, max=4096)
    shapes = ({0: tokens}, {0: tokens}, None, None)
    program = torch.export.export(Layer(), inputs(5), dynamic_shapes=shapes, strict=False)
    found = {n.target: n.meta["val"] for n in program.graph.nodes if n.op == "call_function"}
    y = found[OPS.linear_fp8_triton.default]
    z, scale = found[OPS.linear_fp8_requantized_triton.default]
    assert y.dtype == torch.bfloat16 and y.shape[1] == 12
    assert z.dtype == torch.float8_e4m3fn and z.shape[1] == 24 and scale.shape[1] == 2
    other = inputs(9)
    for a, b in zip(program.module()(*other), Layer()(*other), strict=True):
        assert torch.equal(a, b)


def test_cost_counts_bytes_and_operations() -> None:
    cost = module.cost(3, 256, 300, 128)
    assert cost.bytes == 3 * 300 + 256 * 300 + 4 * (3 * 3 + 2 * 3) + 3 * 256 * 2
    assert cost.operations == 2 * 3 * 256 * 300 and cost.kind == "fp8"
    assert module.cost(3, 256, 300).bytes == 3 * 304 + 256 * 304 + 3 * 256 * 2
    assert module.cost(3, 256, 300, gated=True).operations == 2 * cost.operations


@pytest.mark.parametrize("found", [80, 86, 90, 100, 120])
def test_variants_have_names_of_their_own(found: int) -> None:
    names = [variant.name for variant in module.variants(found)]
    assert names and len(names) == len(set(names))
