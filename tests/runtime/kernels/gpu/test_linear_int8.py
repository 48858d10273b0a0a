"""Linears with int8 weights and 16-bit inputs on tensor cores, against the reference."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from helpers.guarded import DEVICE, among_poison, guarded_outputs
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.runtime.kernels.gpu import linear_int8 as module
from smelt.runtime.kernels.gpu import weight_tiles
from smelt.runtime.kernels.gpu.linear_int8 import candidates, cost, linear_int8, variants
from smelt.runtime.ops import packing
from smelt.runtime.ops.gated_activation import ACTIVATIONS, activate

from .ptx import as_float, run

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Half a unit in the last place.
ROUNDING = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 2.0**-24}
CAPABILITIES = (80, 86, 90, 100, 120)
BOUNDS = (16, 64, 0)


@dataclass(frozen=True)
class Case:
    """rows: the bound on tokens that a program is compiled for."""

    rows: int
    tokens: int
    n: int
    k: int
    group: int
    dtype: torch.dtype = FP16
    gate: str = ""
    bias: torch.dtype | None = FP32
    residual: bool = True
    seed: int = 0


class Linear:
    """Random inputs of a case."""

    def __init__(self, case: Case) -> None:
        self.case, make = case, torch.Generator().manual_seed(case.seed)
        n, k, groups = case.n, case.k, case.k // case.group
        self.qweight = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=make)
        self.scales = (torch.rand(n, groups, generator=make) * 1e-3 + 1e-4).bfloat16()
        self.x = torch.randn(case.tokens, k, generator=make).to(case.dtype)
        self.bias = torch.randn(n, generator=make).to(case.bias) if case.bias else None
        self.residual = None
        if case.residual and not case.gate:
            self.residual = torch.randn(case.tokens, n, generator=make).to(case.dtype)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(the result in float64, how far a kernel may lie from it), both [tokens, outputs]."""
        case = self.case
        weight = packing.dequantize_int8(self.qweight, self.scales)
        if case.rows != 16 and case.group < case.k:
            # float16 is given factors of which it keeps eleven bits.
            weight = weight.to(case.dtype)
        x, weight = self.x.double(), weight.double()
        y = x @ weight.T
        slack = 2.0**-20 * (x.abs() @ weight.abs().T)
        if self.bias is not None:
            y = y + self.bias.double()
        if case.gate:
            (gate, up), (near, far) = y.chunk(2, 1), slack.chunk(2, 1)
            # No activation is steeper than 1.2.
            slack = 1.2 * near * (up.abs() + far) + activate(gate, case.gate).abs() * far
            y = activate(gate, case.gate) * up
            slack += 2.0**-20 * y.abs()
        if self.residual is not None:
            y = y + self.residual.double()
        return y, slack + 1.01 * ROUNDING[case.dtype] * y.abs() + 1e-6

    def run(self) -> torch.Tensor:
        case = self.case
        given_ = [among_poison(t) for t in (self.x, self.qweight, self.scales)]
        optional = [None if t is None else among_poison(t) for t in (self.bias, self.residual)]
        with guarded_outputs():
            out = linear_int8(*given_, *optional, case.gate, case.rows)
        return out.cpu()

    def check(self) -> None:
        got, (want, slack) = self.run(), self.expected()
        assert got.dtype == self.case.dtype and got.shape == want.shape
        error = (got.double() - want).abs()
        assert bool((error <= slack).all()), f"{self.case}: {(error - slack).max()} beyond slack"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows = draw(st.sampled_from(BOUNDS))
    group = draw(st.sampled_from([32, 64, 128, 96, 0]))
    k = draw(st.integers(1, 4)) * group or draw(st.integers(1, 300))
    gate = draw(st.sampled_from(["", "", *ACTIVATIONS]))
    n = draw(st.integers(1, 70)) * (2 if gate else 1)
    return Case(
        rows=rows,
        tokens=draw(st.integers(0, {16: 16, 64: 40}.get(rows, 70))),
        n=n,
        k=k,
        group=group or k,
        dtype=draw(st.sampled_from([BF16, FP16, FP32])),
        gate=gate,
        bias=draw(st.sampled_from([None, BF16, FP16, FP32])),
        residual=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=12, deadline=None)
@given(cases())
def test_every_kernel_gives_the_reference(case: Case) -> None:
    Linear(case).check()


@pytest.mark.parametrize("rows", BOUNDS)
@pytest.mark.parametrize("tokens", [1, 8, 9, 16])
def test_around_eight_tokens(rows: int, tokens: int) -> None:
    Linear(Case(rows, tokens, 35, 256, 128, BF16)).check()


@pytest.mark.parametrize("group", [32, 512])
def test_more_tokens_than_the_bound_are_right_too(group: int) -> None:
    Linear(Case(16, 35, 33, 512, group)).check()


@pytest.mark.parametrize("rows", BOUNDS)
def test_a_row_of_nan_stays_in_its_row(rows: int) -> None:
    linear = Linear(Case(rows, 6, 33, 200, 200))
    clean = linear.run()
    linear.x[2] = float("nan")
    got = linear.run()
    keep = torch.arange(6) != 2
    assert bool(got[2].isnan().all()) and torch.equal(got[keep], clean[keep])


def test_leading_dimensions() -> None:
    linear = Linear(Case(16, 6, 40, 160, 32))
    flat = linear.run()
    assert linear.bias is not None and linear.residual is not None
    x, residual = linear.x.view(2, 3, 160), linear.residual.view(2, 3, 40)
    args = [t.to(DEVICE) for t in (x, linear.qweight, linear.scales, linear.bias, residual)]
    assert torch.equal(linear_int8(*args, "", 16).cpu(), flat.view(2, 3, 40))


@pytest.mark.parametrize(("rows", "parts"), [(16, 2), (64, 3)])
@pytest.mark.parametrize("gate", ["", "silu"])
def test_parts_of_k_are_added(rows: int, parts: int, gate: str) -> None:
    case = Case(rows, 3, 66 if gate else 33, 700, 700, BF16, gate)
    if rows == 64:
        case = Case(rows, 3, 60 if gate else 30, 700, 700, BF16, gate)
    layer = module._layer(rows, case.n // 2 if gate else case.n, 700, 0, gate, "bf16")
    assert layer.config(0).constants["SPLIT"] == parts
    Linear(case).check()


def test_both_ways_of_reading_bytes_are_tested() -> None:
    paired = {
        (rows, k): module._layer(rows, 33, k, 0, "", "bf16").config(0).constants["PAIRED"]
        for rows in (64, 0)
        for k in (256, 255)
    }
    assert paired == {(64, 256): False, (64, 255): False, (0, 256): True, (0, 255): False}


def test_refusals() -> None:
    linear = Linear(Case(16, 2, 64, 96, 48))
    weights = linear.qweight, linear.scales
    with pytest.raises(ValueError, match="no residual"):
        linear_int8(linear.x, *weights, None, linear.x, "silu", 16)
    with pytest.raises(ValueError, match="unknown activation"):
        linear_int8(linear.x, *weights, None, None, "swish", 16)
    with pytest.raises(ValueError, match="2 groups over 96 features"):
        linear_int8(linear.x, *weights, None, None, "", 16)
    with pytest.raises(ValueError, match="float64"):
        linear_int8(linear.x.double(), weights[0], weights[1][:, :1], None, None, "", 16)


@pytest.mark.parametrize(("name", "dtype"), [("BF16", BF16), ("FP16", FP16)])
def test_assembly_converts_every_byte(name: str, dtype: torch.dtype) -> None:
    low = torch.arange(256)
    bytes_ = [low, low.flip(0), low ^ 0x55, (low + 77) % 256]
    register = sum(b << 8 * i for i, b in enumerate(bytes_))
    assert isinstance(register, torch.Tensor)
    values = [b.to(torch.uint8).view(torch.int8).double() for b in bytes_]
    pairs = run(getattr(weight_tiles, f"INT8_{name}").value, 2, register)
    pairs += run(getattr(weight_tiles, f"PAIR_{name}").value, 1, register & 0xFFFF)
    halves = [h for pair in pairs for h in (pair & 0xFFFF, pair >> 16)]
    for half, value in zip(halves, [*values, *values[:2]], strict=True):
        assert torch.equal(as_float(half, dtype), value)


@pytest.mark.parametrize("rows", BOUNDS)
@pytest.mark.parametrize("gate", ["", "silu"])
def test_exports_with_any_number_of_tokens(rows: int, gate: str) -> None:
    linear = Linear(Case(16, 0, 64, 128, 128))
    weights = linear.qweight, linear.scales

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.smelt.linear_int8_triton(x, *weights, None, None, gate, rows)

    tokens = torch.export.Dim("tokens", min=1, max=4096)
    program = torch.export.export(
        Module(), (torch.zeros(5, 128),), dynamic_shapes=({0: tokens},), strict=False
    )
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert [str(node.target) for node in calls] == ["smelt.linear_int8_triton.default"]
    assert calls[0].meta["val"].shape[1] == (32 if gate else 64)


@pytest.mark.parametrize("found", CAPABILITIES)
def test_variants_give_every_argument(found: int) -> None:
    made = list(variants(found))
    assert 0 < len({variant.name for variant in made}) == len(made) <= 14
    for variant in made:
        constants = {*variant.constants, *variant.config.constants}
        assert {*variant.signature, *constants} == set(variant.kernel.arg_names)
        # A warp for each slice: no factor moves between threads.
        slices = variant.config.constants.get("SLICES", variant.config.num_warps)
        assert slices == variant.config.num_warps


@pytest.mark.parametrize("found", CAPABILITIES)
@pytest.mark.parametrize("step", ["few", "some", "many"])
def test_candidates(found: int, step: str) -> None:
    tried = candidates(step, found)
    assert 4 <= len(tried) <= 10
    assert len({str(config) for config in tried}) == len(tried)


def test_cost_counts_weights_once() -> None:
    one = cost(1, 4096, 2048, 2048)
    assert one.bytes == 4096 * 2050 + 2 * 6144
    assert one.operations == 2 * 4096 * 2048
    assert cost(1, 4096, 2048, 128).bytes - one.bytes == 4096 * 15 * 2
    assert cost(1, 2048, 2048, 2048, gated=True).bytes == 4096 * 2050 + 2 * 4096
