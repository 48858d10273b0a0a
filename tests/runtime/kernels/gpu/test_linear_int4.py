"""Linears with int4 weights on tensor cores: the layout, and every kernel against the reference."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from helpers.guarded import DEVICE, among_poison, guarded_outputs
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.runtime.kernels.gpu import linear_int4 as module
from smelt.runtime.kernels.gpu import weight_tiles
from smelt.runtime.kernels.gpu.int4_layout import AT_ONCE, lay_out_int4, restore_int4
from smelt.runtime.kernels.gpu.linear_int4 import candidates, cost, linear_int4, variants
from smelt.runtime.ops import packing
from smelt.runtime.ops.gated_activation import ACTIVATIONS, activate

from .ptx import as_bits, as_float, run

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Half a unit in the last place.
ROUNDING = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 2.0**-24}
CAPABILITIES = (80, 86, 90, 100, 120)
BOUNDS = (16, 64, 0)


@dataclass(frozen=True)
class Case:
    """rows: the bound on tokens that a program is compiled for. mean: of x."""

    rows: int
    tokens: int
    n: int
    k: int
    group: int
    dtype: torch.dtype = FP16
    gate: str = ""
    bias: torch.dtype | None = FP32
    residual: bool = True
    mean: float = 0.0
    seed: int = 0


class Linear:
    """Random inputs of a case."""

    def __init__(self, case: Case) -> None:
        self.case, make = case, torch.Generator().manual_seed(case.seed)
        n, k, groups = case.n, case.k, case.k // case.group
        q = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=make)
        self.canonical = (
            packing.pack(q, 4),
            (torch.rand(n, groups, generator=make) * 0.01 + 0.001).bfloat16(),
            torch.randint(0, 16, (n, groups), dtype=torch.uint8, generator=make),
        )
        x = torch.randn(case.tokens, k, generator=make) + case.mean
        self.x = x.to(case.dtype)
        self.bias = torch.randn(n, generator=make).to(case.bias) if case.bias else None
        self.residual = None
        if case.residual and not case.gate:
            self.residual = torch.randn(case.tokens, n, generator=make).to(case.dtype)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(the result in float64, how far a kernel may lie from it), both [tokens, outputs]."""
        case = self.case
        weight = packing.dequantize(*self.canonical, 4, case.k)
        largest = 16.0 * self.canonical[1].double().amax(1)
        if case.rows != 16:
            weight = weight.to(case.dtype)
        else:
            # What is multiplied there is OFFSET + q.
            largest = largest * 10
        x, weight = self.x.double(), weight.double()
        y = x @ weight.T
        slack = 2.0**-21 * (x.abs().sum(1)[:, None] * largest[None, :])
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
        given_ = [among_poison(t) for t in (self.x, *lay_out_int4(*self.canonical, case.k))]
        optional = [None if t is None else among_poison(t) for t in (self.bias, self.residual)]
        with guarded_outputs():
            out = linear_int4(*given_, *optional, case.gate, case.n, case.rows)
        return out.cpu()

    def check(self) -> None:
        got, (want, slack) = self.run(), self.expected()
        assert got.dtype == self.case.dtype and got.shape == want.shape
        error = (got.double() - want).abs()
        assert bool((error <= slack).all()), f"{self.case}: {(error - slack).max()} beyond slack"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows = draw(st.sampled_from(BOUNDS))
    group = draw(st.sampled_from([32, 64, 128, 256, 0]))
    k = draw(st.integers(1, 3 if group > 64 else 6)) * group or draw(st.integers(1, 300))
    gate = draw(st.sampled_from(["", "", *ACTIVATIONS]))
    n = draw(st.integers(1, 150))
    if gate:
        n = draw(st.sampled_from([128, 256, 2 * n]))
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
        mean=draw(st.sampled_from([0.0, 5.0])),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=12, deadline=None)
@given(cases())
def test_every_kernel_gives_the_reference(case: Case) -> None:
    Linear(case).check()


@pytest.mark.parametrize("rows", BOUNDS)
@pytest.mark.parametrize("tokens", [1, 8, 9, 16])
def test_around_eight_tokens(rows: int, tokens: int) -> None:
    Linear(Case(rows, tokens, 70, 384, 128, BF16)).check()


@pytest.mark.parametrize("group", [32, 512])
def test_more_tokens_than_the_bound_are_right_too(group: int) -> None:
    Linear(Case(16, 35, 33, 512, group)).check()


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("group", [128, 1024])
def test_a_mean_far_from_zero_costs_no_digits(dtype: torch.dtype, group: int) -> None:
    """Subtracting a large common part would cost seven bits more than the result has."""
    linear = Linear(Case(16, 4, 64, 1024, group, dtype, "", None, False, 100.0))
    linear.canonical = (*linear.canonical[:2], torch.full_like(linear.canonical[2], 8))
    got, want = linear.run().double(), linear.expected()[0]
    assert float((got - want).abs().max() / want.abs().max()) < 1.5 * ROUNDING[dtype]


@pytest.mark.parametrize("rows", BOUNDS)
def test_a_row_of_nan_stays_in_its_row(rows: int) -> None:
    linear = Linear(Case(rows, 6, 65, 200, 200))
    clean = linear.run()
    linear.x[2] = float("nan")
    got = linear.run()
    keep = torch.arange(6) != 2
    assert bool(got[2].isnan().all()) and torch.equal(got[keep], clean[keep])


def test_leading_dimensions() -> None:
    linear = Linear(Case(16, 6, 40, 160, 32))
    flat = linear.run()
    x, weights = linear.x.view(2, 3, 160), lay_out_int4(*linear.canonical, 160)
    assert linear.bias is not None and linear.residual is not None
    args = [t.to(DEVICE) for t in (x, *weights, linear.bias, linear.residual.view(2, 3, 40))]
    assert torch.equal(linear_int4(*args, "", 40, 16).cpu(), flat.view(2, 3, 40))


@pytest.mark.parametrize(("rows", "parts"), [(16, 2), (64, 3)])
@pytest.mark.parametrize("gate", ["", "silu"])
def test_parts_of_k_are_added(rows: int, parts: int, gate: str) -> None:
    n = 128 if gate else 33
    outputs = 64 if gate else 33
    layer = module._layer(rows, outputs, 1088, 64, gate, "bf16", "bf16")
    assert layer.config(0).constants["SPLIT"] == parts
    Linear(Case(rows, 3, n, 1088, 64, BF16, gate)).check()


def test_refusals() -> None:
    linear = Linear(Case(16, 2, 128, 128, 128))
    weights = lay_out_int4(*linear.canonical, 128)
    with pytest.raises(ValueError, match="no residual"):
        linear_int4(linear.x, *weights, None, linear.x, "silu", 128, 16)
    with pytest.raises(ValueError, match="unknown activation"):
        linear_int4(linear.x, *weights, None, None, "swish", 128, 16)
    with pytest.raises(ValueError, match="float64"):
        linear_int4(linear.x.double(), *weights, None, None, "", 128, 16)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 200), st.integers(1, 300), st.sampled_from([32, 64, 128, 192 * 2, 0]))
def test_layout_is_inverted(n: int, k: int, group: int) -> None:
    k = max(group, k - k % group) if group else k
    canonical = Linear(Case(16, 0, n, k, group or k)).canonical
    back = restore_int4(*lay_out_int4(*canonical, k), n, k)
    for got, want in zip(back, canonical, strict=True):
        assert torch.equal(got, want) and got.is_contiguous() and got.dtype == want.dtype


def test_layout_of_many_rows_is_that_of_its_pieces() -> None:
    n = AT_ONCE + 70
    canonical = Linear(Case(16, 0, n, 96, 32)).canonical
    packed, scales, _ = lay_out_int4(*canonical, 96)
    first = lay_out_int4(*(t[:AT_ONCE] for t in canonical), 96)
    assert torch.equal(packed[: AT_ONCE // 64], first[0])
    assert torch.equal(scales[:, : AT_ONCE // 64], first[1])
    assert torch.equal(restore_int4(*lay_out_int4(*canonical, 96), n, 96)[0], canonical[0])


@pytest.mark.parametrize("group", [32, 64, 128])
def test_where_the_layout_has_a_value(group: int) -> None:
    n, k = 130, 256
    qweight, scales, zeros = Linear(Case(16, 0, n, k, group)).canonical
    q = packing.unpack(qweight, 4, k)
    packed, s, z = lay_out_int4(qweight, scales, zeros, k)
    per_chunk = max(1, 128 // group)
    for row, feature in ((0, 0), (129, 255), (77, 130), (63, 97), (40, 31)):
        t, h, r = row % 64 // 16, row % 16 // 8, row % 8
        i, step, j, quad, p = (
            feature % 128 // 32,
            feature % 32 // 16,
            feature % 16 // 8,
            feature % 8 // 2,
            feature % 2,
        )
        word = packed[row // 64, feature // 128, t, step, r, quad, j, h, p]
        assert int(word) >> 4 * i & 15 == int(q[row, feature])
        number = feature // group
        assert s[number, row // 64, r, t, h] == scales[row, number]
        word = z[number // per_chunk, row // 64, r, t, h]
        assert int(word) >> 4 * i & 15 == int(zeros[row, number])


@pytest.mark.parametrize(("k", "groups"), [(96, 2), (160, 4), (100, 3), (48, 3)])
def test_layout_refuses_other_groups(k: int, groups: int) -> None:
    weights = torch.zeros(8, k // 2, dtype=torch.uint8), torch.ones(8, groups).bfloat16()
    with pytest.raises(ValueError, match="groups"):
        lay_out_int4(*weights, torch.zeros(8, groups, dtype=torch.uint8), k)


@pytest.mark.parametrize(("name", "dtype", "offset"), [("BF16", BF16, 128), ("FP16", FP16, 64)])
def test_assembly_unpacks_every_element(name: str, dtype: torch.dtype, offset: int) -> None:
    elements = torch.arange(1 << 16)
    other = elements.flip(0)
    levels = run(getattr(weight_tiles, f"LEVELS_{name}").value, 4, elements | other << 16)
    for i, level in enumerate(levels):
        for half, of in ((level & 0xFFFF, elements), (level >> 16, other)):
            assert torch.equal(as_float(half, dtype), (of >> 4 * i & 15) + float(offset))


@pytest.mark.parametrize(("name", "dtype", "offset"), [("BF16", BF16, 128), ("FP16", FP16, 64)])
def test_assembly_subtracts_exactly_and_rounds_a_product_once(
    name: str, dtype: torch.dtype, offset: int
) -> None:
    q, zero = (torch.arange(16.0).repeat(*times).flatten() for times in ((16, 1), (1, 1)))
    zero = zero.repeat_interleave(16)
    pairs = [as_bits((v + offset).to(dtype)) * 0x10001 for v in (q, zero)]
    (difference,) = run(getattr(weight_tiles, f"MINUS_{name}").value, 1, *pairs)
    for half in (difference & 0xFFFF, difference >> 16):
        assert torch.equal(as_float(half, dtype), (q - zero).double())
    scale = (torch.rand(256) * 0.2).to(dtype)
    times = getattr(weight_tiles, f"TIMES_{name}").value
    (weight,) = run(times, 1, difference, as_bits(scale) * 0x10001)
    want = ((q - zero).double() * scale.double()).to(dtype).double()
    assert torch.equal(as_float(weight & 0xFFFF, dtype), want)


@pytest.mark.parametrize("rows", BOUNDS)
@pytest.mark.parametrize("gate", ["", "silu"])
def test_exports_with_any_number_of_tokens(rows: int, gate: str) -> None:
    weights = lay_out_int4(*Linear(Case(16, 0, 128, 128, 128)).canonical, 128)

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.smelt.linear_int4_triton(x, *weights, None, None, gate, 128, rows)

    tokens = torch.export.Dim("tokens", min=1, max=4096)
    program = torch.export.export(
        Module(), (torch.zeros(5, 128),), dynamic_shapes=({0: tokens},), strict=False
    )
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert [str(node.target) for node in calls] == ["smelt.linear_int4_triton.default"]
    assert calls[0].meta["val"].shape[1] == (64 if gate else 128)


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
    one = cost(1, 4096, 4096, 128)
    assert one.bytes == 4096 * (2048 + 32 * 4) + 2 * 8192
    assert one.operations == 2 * 4096 * 4096
    assert cost(1, 4096, 4096, 32).bytes - one.bytes == 4096 * 96 * 2
    assert cost(1, 2048, 4096, 4096, gated=True).bytes == 4096 * 2052 + 8192 + 4096
