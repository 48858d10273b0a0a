"""16-bit activations times e4m3 weights on a GPU, against the reference in float32."""

from __future__ import annotations

import pytest
import torch
from helpers.guarded import DEVICE, among_poison, guarded_outputs
from hypothesis import example, given, settings
from hypothesis import strategies as st

from smelt.runtime.kernels.gpu import linear_fp8_weight as module
from smelt.runtime.kernels.gpu.linear_launch import Finish, Linear
from smelt.runtime.ops.gated_activation import ACTIVATIONS, activate
from smelt.runtime.ops.linear_fp8 import linear_fp8, to_e4m3

# (rows of the step, bound of the program): each regime, its bound, one row, none.
STEPS = st.sampled_from([(0, 16), (1, 16), (5, 16), (16, 16), (17, 64), (64, 64), (0, 0), (37, 0)])
DTYPE = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
# A unit in the last place, and the order of float32 sums.
CLOSE = {
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-4},
    torch.float16: {"rtol": 2**-10, "atol": 1e-4},
    torch.float32: {"rtol": 1e-5, "atol": 1e-4},
}
WEIGHT = torch.ops.smelt.linear_fp8_weight_triton


def draw(
    rows: int, n: int, k: int, block: int, dtype: torch.dtype, seed: int, gated: bool = False
) -> tuple[torch.Tensor, ...]:
    """(x, qweight, scales, bias, residual) on the CPU."""
    source = torch.Generator().manual_seed(seed)
    width = 2 * n if gated else n
    x = torch.randn(rows, k, generator=source).to(dtype)
    weight = to_e4m3(torch.randn(width, k, generator=source) * 50)
    shape = (-(-width // block), -(-k // block)) if block else (width, 1)
    scales = (torch.rand(shape, generator=source) + 0.1) / 50 / k**0.5
    bias = torch.randn(width, generator=source).to(dtype)
    return x, weight, scales, bias, torch.randn(rows, n, generator=source).to(dtype)


def poisoned(qweight: torch.Tensor) -> torch.Tensor:
    return among_poison(qweight.view(torch.uint8)).view(torch.float8_e4m3fn)


@settings(max_examples=30, deadline=None)
@given(
    STEPS,
    st.integers(1, 70),
    st.integers(1, 200),
    DTYPE,
    st.sampled_from(["", *ACTIVATIONS]),
    st.sampled_from([0, 32, 64, 96]),
    st.booleans(),
    st.integers(0, 2**31),
)
@example((5, 16), 16, 700, torch.bfloat16, "", 0, True, 0)
@example((5, 16), 33, 700, torch.bfloat16, "silu", 64, True, 0)
@example((37, 0), 70, 130, torch.float16, "", 64, True, 1)
@example((37, 0), 64, 128, torch.bfloat16, "silu", 64, True, 1)
def test_against_the_reference(
    step: tuple[int, int],
    n: int,
    k: int,
    dtype: torch.dtype,
    gate: str,
    block: int,
    extra: bool,
    seed: int,
) -> None:
    """extra: a bias, and without a gate a residual."""
    rows, bound = step
    x, qweight, scales, bias, residual = draw(rows, n, k, block, dtype, seed, bool(gate))
    if rows > 1:
        x[rows // 2, k // 2] = float("nan")
    with guarded_outputs():
        y = WEIGHT(
            among_poison(x),
            poisoned(qweight),
            among_poison(scales),
            among_poison(bias) if extra else None,
            among_poison(residual) if extra and not gate else None,
            gate,
            block,
            bound,
        )
    added = bias if extra else None
    want = linear_fp8(x.float(), qweight, scales, None, added, "none", block)
    if gate:
        gates, ups = want.chunk(2, -1)
        want = activate(gates, gate) * ups
    elif extra:
        want = want + residual.float()
    assert y.dtype == dtype and y.shape == (rows, n)
    torch.testing.assert_close(y.cpu().float(), want, **CLOSE[dtype], equal_nan=True)
    assert rows < 2 or (y[rows // 2].isnan().all() and y[0].isfinite().all())


@pytest.mark.parametrize("block", [0, 32])
@pytest.mark.parametrize("k", [256, 500, 1024])
def test_split_along_k(k: int, block: int) -> None:
    finish = Finish("", None, None, "fp32")
    parts = Linear("weight", 16, 16, k, block).config(module.TABLE, finish, 0)[1]
    assert parts == {256: 2, 500: 4, 1024: 4}[k]
    x, qweight, scales, bias, _ = draw(5, 16, k, block, torch.float32, k)
    with guarded_outputs():
        y = WEIGHT(
            *(among_poison(x), poisoned(qweight), among_poison(scales), among_poison(bias)),
            *(None, "", block, 16),
        )
    want = linear_fp8(x, qweight, scales, None, bias, "none", block)
    torch.testing.assert_close(y.cpu(), want, **CLOSE[torch.float32])


@pytest.mark.parametrize("rows", [16, 64])
def test_every_code_of_a_weight(rows: int) -> None:
    """One column a code, against a row of ones: subnormals and NaN too."""
    codes = torch.zeros(256, 32, dtype=torch.uint8)
    codes[:, 5] = torch.arange(256)
    x = torch.ones(3, 32, dtype=torch.float16, device=DEVICE)
    qweight = codes.view(torch.float8_e4m3fn)
    scales = torch.ones(256, 1, device=DEVICE)
    y = WEIGHT(x, qweight.to(DEVICE), scales, None, None, "", 0, rows)
    want = qweight[:, 5].half().expand(3, -1)
    torch.testing.assert_close(y.cpu(), want, rtol=0, atol=0, equal_nan=True)


def test_what_is_refused() -> None:
    x, qweight, scales, _, residual = (t.to(DEVICE) for t in draw(2, 4, 40, 0, torch.float16, 0))
    with pytest.raises(ValueError, match="multiples of 32"):
        WEIGHT(x, qweight, scales, None, None, "", 40, 0)
    with pytest.raises(ValueError, match="no residual"):
        WEIGHT(x, qweight, scales, None, residual[:, :2], "silu", 0, 0)


def test_exports() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
            return WEIGHT(x, w, s, None, None, "silu", 32, 16)

    def inputs(rows: int) -> tuple[torch.Tensor, ...]:
        made = draw(rows, 12, 300, 32, torch.bfloat16, 0, gated=True)
        return tuple(t.to(DEVICE) for t in made[:3])

    tokens = torch.export.Dim("T", min=2, max=4096)
    shapes = ({0: tokens}, None, None)
    program = torch.export.export(Layer(), inputs(5), dynamic_shapes=shapes, strict=False)
    (node,) = [n for n in program.graph.nodes if n.target == WEIGHT.default]
    assert node.meta["val"].dtype == torch.bfloat16 and node.meta["val"].shape[1] == 12
    other = inputs(9)
    assert torch.equal(program.module()(*other), Layer()(*other))


def test_cost_counts_bytes_and_operations() -> None:
    cost = module.cost(3, 256, 300, 128)
    assert cost.bytes == 256 * 300 + 4 * 2 * 3 + 3 * (300 + 256) * 2
    assert cost.operations == 2 * 3 * 256 * 300 and cost.kind == "bf16"
    assert module.cost(3, 256, 300).bytes == 256 * 304 + 3 * (300 + 256) * 2


@pytest.mark.parametrize("found", [80, 86, 90, 100, 120])
def test_variants_and_candidates(found: int) -> None:
    names = [variant.name for variant in module.variants(found)]
    assert 0 < len(names) == len(set(names)) <= 12
    for shape in ("few", "few/gated", "some", "many", "many/gated"):
        assert 3 <= len(module.candidates(shape, found)) <= 10
