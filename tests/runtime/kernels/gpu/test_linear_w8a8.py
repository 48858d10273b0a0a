"""int8 times int8 on a GPU: the reference's bits, with every epilogue, split along K or not."""

from __future__ import annotations

import pytest
import torch
from helpers.guarded import DEVICE, among_poison, guarded_outputs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from smelt.runtime.kernels.gpu import linear_launch
from smelt.runtime.kernels.gpu import linear_w8a8 as module
from smelt.runtime.kernels.gpu.linear_launch import Finish, Linear
from smelt.runtime.kernels.gpu.roofline import CARDS
from smelt.runtime.kernels.gpu.rounding import DTYPES, NAMES
from smelt.runtime.kernels.gpu.tuning import Config, tables
from smelt.runtime.ops.gated_activation import ACTIVATIONS, activate
from smelt.runtime.ops.linear_w8a8 import linear_w8a8, quantize_rows

PLAIN = Finish("", None, None, "bf16")
# A unit in the last place, and float32's own order of operations.
CLOSE = {
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-4},
    torch.float16: {"rtol": 2**-10, "atol": 1e-4},
    torch.float32: {"rtol": 2e-6, "atol": 1e-4},
}
# (rows of the step, bound of the program): each regime, its bound, one row, none.
STEPS = st.sampled_from([(0, 16), (1, 16), (5, 16), (16, 16), (17, 64), (64, 64), (0, 0), (37, 0)])
DTYPE = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


class Case:
    """A quantized input and a layer on DEVICE, between poison; the same on the CPU."""

    def __init__(
        self, rows: int, n: int, k: int, dtype: torch.dtype, seed: int, gated: bool = False
    ) -> None:
        source = torch.Generator().manual_seed(seed)
        self.x = torch.randn(rows, k, generator=source).to(dtype)
        width = 2 * n if gated else n
        self.weight = torch.randint(-127, 128, (width, k), generator=source, dtype=torch.int8)
        self.scales = torch.rand(width, generator=source) / 1000 / k**0.5
        self.bias = torch.randn(width, generator=source).to(dtype)
        self.residual = torch.randn(rows, n, generator=source).to(dtype)
        self.dtype, self.gated = dtype, gated

    def quantized(self, input_scale: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        q, scale = quantize_rows(self.x, input_scale)
        return among_poison(q.nan_to_num(0.0).to(torch.int8)), among_poison(scale)

    def layer(self, bias: bool, residual: bool, gate: str) -> tuple[object, ...]:
        return (
            among_poison(self.weight),
            among_poison(self.scales),
            among_poison(self.bias) if bias else None,
            among_poison(self.residual) if residual else None,
            gate,
        )

    def sums(self, input_scale: torch.Tensor | None, bias: bool) -> torch.Tensor:
        """The scaled sums and bias in float32."""
        q, scale = quantize_rows(self.x, input_scale)
        total = F.linear(q.double(), self.weight.double()).float() * (scale * self.scales)
        return total + self.bias.float() if bias else total


@settings(max_examples=25, deadline=None)
@given(
    STEPS,
    st.integers(1, 70),
    st.integers(1, 200),
    DTYPE,
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
@example((5, 16), 16, 700, torch.bfloat16, True, False, 0)
@example((37, 0), 64, 128, torch.bfloat16, True, False, 1)
def test_bits_of_the_reference(
    step: tuple[int, int],
    n: int,
    k: int,
    dtype: torch.dtype,
    bias: bool,
    static: bool,
    seed: int,
) -> None:
    rows, bound = step
    case = Case(rows, n, k, dtype, seed)
    if rows > 1:
        case.x[rows // 2, k // 2] = float("nan")
        case.x[-1] *= 0
    input_scale = torch.tensor([0.02]) if static else None
    layer = case.layer(bias, False, "")
    with guarded_outputs():
        y = torch.ops.smelt.linear_w8a8_triton(
            *case.quantized(input_scale), *layer, NAMES[dtype], bound
        )
    added = case.bias if bias else None
    want = linear_w8a8(case.x, case.weight, case.scales, input_scale, added)
    assert y.dtype == dtype and y.shape == (rows, n)
    torch.testing.assert_close(y.cpu(), want, rtol=0, atol=0, equal_nan=True)
    assert rows < 2 or y[rows // 2].isnan().all()


@pytest.mark.parametrize("k", [128, 256, 500, 1024])
@pytest.mark.parametrize("gate", ["", "silu"])
def test_split_along_k(k: int, gate: str) -> None:
    """Few outputs: parts of K by programs of their own, whose sums are added afterwards."""
    n, finish = 16, Finish(gate, None, None, "fp32")
    parts = Linear("int8", 16, n, k).config(module.TABLE, finish, 0)[1]
    assert parts == {128: 1, 256: 2, 500: 4, 1024: 4}[k]
    case = Case(5, n, k, torch.float32, k, bool(gate))
    with guarded_outputs():
        y = torch.ops.smelt.linear_w8a8_triton(
            *case.quantized(), *case.layer(True, not gate, gate), "fp32", 16
        ).cpu()
    want = case.sums(None, True)
    if gate:
        gates, ups = want.chunk(2, -1)
        torch.testing.assert_close(y, activate(gates, gate) * ups, **CLOSE[torch.float32])
    else:
        assert torch.equal(y, want + case.residual)


@settings(max_examples=20, deadline=None)
@given(
    STEPS,
    st.integers(1, 40),
    st.integers(1, 130),
    DTYPE,
    st.sampled_from(["", *ACTIVATIONS]),
    st.booleans(),
    st.integers(0, 2**31),
)
@example((37, 0), 33, 64, torch.bfloat16, "silu", True, 0)
@example((37, 0), 33, 64, torch.bfloat16, "", True, 0)
def test_gate_or_residual(
    step: tuple[int, int],
    n: int,
    k: int,
    dtype: torch.dtype,
    gate: str,
    bias: bool,
    seed: int,
) -> None:
    rows, bound = step
    case = Case(rows, n, k, dtype, seed, bool(gate))
    if rows > 1:
        case.x[0, 0] = float("inf")
    with guarded_outputs():
        y = torch.ops.smelt.linear_w8a8_triton(
            *case.quantized(), *case.layer(bias, not gate, gate), NAMES[dtype], bound
        )
    sums = case.sums(None, bias)
    if gate:
        gates, ups = sums.chunk(2, -1)
        want = activate(gates, gate) * ups
    else:
        want = sums + case.residual.float()
    assert y.dtype == dtype
    torch.testing.assert_close(y.cpu().float(), want, **CLOSE[dtype], equal_nan=True)
    assert rows < 2 or (y[0].isnan().all() and y[1:].isfinite().all())


@settings(max_examples=15, deadline=None)
@given(
    STEPS,
    st.integers(1, 40),
    st.integers(1, 130),
    st.sampled_from(["bf16", "fp16", "fp32"]),
    st.booleans(),
    st.integers(0, 2**31),
)
@example((5, 16), 16, 512, "bf16", True, 0)
def test_requantized(
    step: tuple[int, int], n: int, k: int, dtype: str, residual: bool, seed: int
) -> None:
    """As `linear_w8a8_triton` and then quantization of its rounded result."""
    rows, bound = step
    case = Case(rows, n, k, DTYPES[dtype], seed)
    if rows > 1:
        case.x[0, 0] = float("nan")
    scale = torch.tensor([0.01])
    layer = (*case.quantized(), *case.layer(True, residual, ""))
    y = torch.ops.smelt.linear_w8a8_triton(*layer, dtype, bound)
    with guarded_outputs():
        q = torch.ops.smelt.linear_w8a8_requantized_triton(*layer, scale.to(DEVICE), dtype, bound)
    want, _ = quantize_rows(y.cpu(), scale)
    assert q.dtype == torch.int8
    assert torch.equal(q.cpu().float(), want.nan_to_num(0.0))


def test_requantized_with_a_gate() -> None:
    case = Case(20, 24, 100, torch.bfloat16, 0, gated=True)
    layer = (*case.quantized(), *case.layer(False, False, "gelu_tanh"))
    y = torch.ops.smelt.linear_w8a8_triton(*layer, "bf16", 64)
    scale = torch.tensor([0.002])
    q = torch.ops.smelt.linear_w8a8_requantized_triton(*layer, scale.to(DEVICE), "bf16", 64)
    assert torch.equal(q.cpu().float(), quantize_rows(y.cpu(), scale)[0])
    assert q.unique().numel() > 2


@pytest.mark.parametrize("gate", ["", "silu"])
@pytest.mark.parametrize("kind", ["same", "int8"])
def test_wide_tiles_in_groups(gate: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 256 columns are finished half by half; three row tiles at a time share weights."""
    constants = {"BLOCK_M": 16, "BLOCK_N": 256, "BLOCK_K": 32, "GROUP_M": 3, "CTAS": 0}
    monkeypatch.setattr(linear_launch, "choose", lambda *_: Config(constants, 8, 3))
    case = Case(70, 300, 40, torch.bfloat16, 0, gated=bool(gate))
    args = (*case.quantized(), *case.layer(True, not gate, gate))
    scale = torch.tensor([0.01])
    with guarded_outputs():
        if kind == "same":
            y = torch.ops.smelt.linear_w8a8_triton(*args, "bf16", 0).cpu()
        else:
            y = torch.ops.smelt.linear_w8a8_requantized_triton(
                *args, scale.to(DEVICE), "bf16", 0
            ).cpu()
    want = case.sums(None, True)
    if gate:
        gates, ups = want.chunk(2, -1)
        want = activate(gates, gate) * ups
    else:
        want = want + case.residual.float()
    if kind == "same":
        torch.testing.assert_close(y.float(), want, **CLOSE[torch.bfloat16])
    else:
        assert ((y.float() - quantize_rows(want, scale)[0]).abs() <= 1).all()


def test_a_row_does_not_depend_on_the_others() -> None:
    case = Case(16, 40, 300, torch.bfloat16, 0)
    q, scale = case.quantized()
    layer = case.layer(True, False, "")
    together = torch.ops.smelt.linear_w8a8_triton(q, scale, *layer, "bf16", 16)
    for row in (0, 7, 15):
        one = slice(row, row + 1)
        alone = torch.ops.smelt.linear_w8a8_triton(q[one], scale[one], *layer, "bf16", 16)
        assert torch.equal(alone[0], together[row])


def test_leading_dimensions_and_a_bound_that_is_too_low() -> None:
    case = Case(42, 20, 50, torch.bfloat16, 0)
    q, scale = case.quantized()
    y = torch.ops.smelt.linear_w8a8_triton(
        q.view(2, 21, 50), scale.view(2, 21, 1), *case.layer(True, False, ""), "bf16", 16
    )
    want = linear_w8a8(case.x, case.weight, case.scales, None, case.bias)
    assert torch.equal(y.cpu(), want.view(2, 21, 20))


def test_largest_sums_do_not_overflow() -> None:
    k = 4096
    q = torch.full((3, k), -127, dtype=torch.int8, device=DEVICE)
    weight = torch.full((16, k), 127, dtype=torch.int8, device=DEVICE)
    one = torch.ones(16, device=DEVICE)
    y = torch.ops.smelt.linear_w8a8_triton(
        q, one[:3, None], weight, one, None, None, "", "fp32", 16
    )
    assert (y == -(127.0**2) * k).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gate": "tanh"}, "unknown activation"),
        ({"gate": "silu"}, "no residual"),
        ({"dtype": "int8"}, "not one of"),
    ],
)
def test_what_is_refused(changed: dict[str, str], message: str) -> None:
    case = Case(2, 4, 8, torch.bfloat16, 0, gated=True)
    weight, scales, bias, residual, _ = case.layer(True, True, "")
    gate, dtype = changed.get("gate", ""), changed.get("dtype", "bf16")
    args = (*case.quantized(), weight, scales, bias, residual, gate, dtype, 0)
    with pytest.raises(ValueError, match=message):
        torch.ops.smelt.linear_w8a8_triton(*args)


def test_exports() -> None:
    class Layer(torch.nn.Module):
        def forward(self, q: torch.Tensor, s: torch.Tensor, w: torch.Tensor, ws: torch.Tensor):
            ops = torch.ops.smelt
            y = ops.linear_w8a8_triton(q, s, w, ws, None, None, "silu", "bf16", 16)
            one = ws[:1]
            z = ops.linear_w8a8_requantized_triton(q, s, w, ws, None, None, "", one, "bf16", 0)
            return y, z

    def inputs(rows: int) -> tuple[torch.Tensor, ...]:
        case = Case(rows, 12, 300, torch.bfloat16, 0, gated=True)
        return (*case.quantized(), case.weight.to(DEVICE), case.scales.to(DEVICE))

    tokens = torch.export.Dim("T", min=2, max=4096)
    shapes = ({0: tokens}, {0: tokens}, None, None)
    program = torch.export.export(Layer(), inputs(5), dynamic_shapes=shapes, strict=False)
    found = {n.target: n.meta["val"] for n in program.graph.nodes if n.op == "call_function"}
    y = found[torch.ops.smelt.linear_w8a8_triton.default]
    z = found[torch.ops.smelt.linear_w8a8_requantized_triton.default]
    assert y.dtype == torch.bfloat16 and y.shape[1] == 12
    assert z.dtype == torch.int8 and z.shape[1] == 24
    other = inputs(9)
    for a, b in zip(program.module()(*other), Layer()(*other), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("table", ["linear_w8a8", "linear_fp8", "linear_fp8_weight"])
def test_tables(table: str) -> None:
    kind = {"linear_w8a8": "int8", "linear_fp8": "e4m3", "linear_fp8_weight": "weight"}[table]
    assert set(tables()[table]) == {0, 80, 86, 90, 100, 120}
    for found in tables()[table]:
        for rows in (1, 16, 64, 0):
            for finish in (PLAIN, Finish("silu", None, None, "bf16")):
                for n, k, block in ((1024, 4096, 0), (14336, 4096, 128), (4096, 9728, 0)):
                    if kind == "int8" and block:
                        continue
                    linear = Linear(kind, rows, n, k, block)
                    config, parts = linear.config(table, finish, found)
                    held = config.constants
                    assert "CTAS" not in held and held["SPLIT"] == parts
                    assert held["EVEN_K"] == (k % (held["BLOCK_K"] * held.get("PARTS", 1)) == 0)
                    assert ("PARTS" in held) == (0 < rows <= 16) == ("UNIFORM" not in held)
                    assert parts == 1 or 0 < rows <= 64
                    # A part of K on each multiprocessor, and two tiles at least in each.
                    assert parts == 1 or parts * -(-n // held["BLOCK_N"]) <= 200
                    assert block % held["BLOCK_K"] == 0


def test_blocks_narrow_the_tile() -> None:
    linear = Linear("e4m3", 16, 4096, 4096, 96)
    assert linear.config("linear_fp8", PLAIN, 90)[0].constants["BLOCK_K"] == 32


@pytest.mark.parametrize("found", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("shape", ["few", "few/gated", "some", "some/gated", "many", "many/gated"])
def test_candidates_fit(found: int, shape: str) -> None:
    configs = [config.to_json() for config in module.candidates(shape, found)]
    assert 3 <= len(configs) <= 10 and all(configs.count(c) == 1 for c in configs)
    limit = min(card.shared for card in CARDS.values() if card.capability == found)
    for config in configs:
        c = config["constants"]
        deep = c["BLOCK_K"] * c.get("PARTS", 1)
        tiles = c["BLOCK_M"] + c["BLOCK_N"] * (2 if "gated" in shape else 1)
        assert tiles * deep * config["num_stages"] <= limit
        assert ("PARTS" in c) == shape.startswith("few")
        assert c.get("PARTS", config["num_warps"]) == config["num_warps"]


def test_cost_counts_bytes_and_operations() -> None:
    cost = module.cost(3, 100, 200)
    assert cost.bytes == 3 * 204 + 100 * 204 + 3 * 100 * 2
    assert cost.operations == 2 * 3 * 100 * 200 and cost.kind == "int8"
    gated = module.cost(3, 100, 200, gated=True)
    assert gated.operations == 2 * cost.operations
    assert gated.bytes == cost.bytes + 100 * 204


@pytest.mark.parametrize("found", [80, 86, 90, 100, 120])
def test_variants_have_names_of_their_own(found: int) -> None:
    names = [variant.name for variant in module.variants(found)]
    assert 0 < len(names) == len(set(names)) <= 12
