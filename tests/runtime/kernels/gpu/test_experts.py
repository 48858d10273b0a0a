"""Grouped products over sorted choices, against the reference of runtime/ops in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from smelt.runtime.kernels.gpu import experts, experts_int4, routing
from smelt.runtime.kernels.gpu.experts import Layer, experts_triton
from smelt.runtime.kernels.gpu.experts_int4 import experts_int4_triton
from smelt.runtime.kernels.gpu.int4_layout import lay_out_int4
from smelt.runtime.kernels.gpu.launch import regime
from smelt.runtime.kernels.gpu.tuning import choose
from smelt.runtime.ops.experts import routed
from smelt.runtime.ops.gated_activation import ACTIVATIONS
from smelt.runtime.ops.packing import dequantize, pack

# Half a unit in the last place of 1: the relative error of one rounding.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@contextmanager
def poison() -> Iterator[None]:
    """New tensors hold NaN, or numbers no list may hold: what is read unwritten shows."""
    made = torch.Tensor.new_empty

    def filled(*args: object, **named: object) -> torch.Tensor:
        new = made(*args, **named)  # type: ignore[arg-type]
        return new.fill_(float("nan") if new.is_floating_point() else -77)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch.Tensor, "new_empty", filled)
        yield


class Case:
    """A layer's random inputs. skew: 0 for choices spread evenly, 1 for the same expert always."""

    def __init__(self, layer: Layer, tokens: int, skew: float, dtype: torch.dtype, seed: int):
        source = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, generator=source) * scale).to(dtype)

        self.layer = layer
        # What lies behind the last token is NaN: features beyond K must not be read.
        self.x = normal(tokens + 1, layer.k)
        self.x[tokens] = float("nan")
        self.x = self.x[:tokens]
        self.index = torch.randint(layer.experts, (tokens, layer.top_k), generator=source)
        alone = torch.rand(tokens, layer.top_k, generator=source) < skew
        self.index[alone] = layer.experts // 2
        self.weight = torch.rand(tokens, layer.top_k, generator=source)
        self.gate_up = normal(layer.experts, 2 * layer.width, layer.k, scale=layer.k**-0.5)
        self.down = normal(layer.experts, layer.k, layer.width, scale=layer.width**-0.5)

    @property
    def unused(self) -> list[int]:
        """Experts nobody chose."""
        return sorted(set(range(self.layer.experts)) - set(self.index.flatten().tolist()))

    def check(
        self,
        out: torch.Tensor,
        kind: str,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        cancelled: float = 1.0,
    ) -> None:
        """Within three roundings of the sum of all products' magnitudes, those of float32 aside.

        Hidden, parts and their sum are rounded, and nothing else. cancelled: how much larger what
        is summed in float32 is than the products.
        """
        x, weight = self.x.float(), self.weight.float()
        exact = routed(x, self.index, weight, kind, gate_up.float().__getitem__, down.__getitem__)
        one = torch.zeros_like(x)
        for token, (chosen, factors) in enumerate(zip(self.index, weight, strict=True)):
            for e, factor in zip(chosen.tolist(), factors.tolist(), strict=True):
                gate, up = (gate_up[e] @ x[token]).chunk(2)
                hidden = getattr(torch.nn.functional, kind.split("_")[0])(gate) * up
                one[token] += factor * (down[e].abs() @ hidden.abs())
        sums = 2 * cancelled * (self.layer.k + self.layer.width) * 2.0**-24
        bound = (3.05 * ROUNDING[out.dtype] + sums) * one + 1e-6
        assert out.dtype == self.x.dtype and out.shape == self.x.shape
        assert ((out.float() - exact).abs() <= bound).all()

    def dense(self, kind: str, rows: int) -> torch.Tensor:
        """Checked. Experts nobody chose are full of NaN."""
        gate_up, down = self.gate_up.clone(), self.down.clone()
        gate_up[self.unused], down[self.unused] = float("nan"), float("nan")
        with poison():
            out = experts_triton(self.x, self.index, self.weight, gate_up, down, kind, rows)
        self.check(out, kind, self.gate_up.float(), self.down.float())
        return out

    def int4(self, kind: str, rows: int, groups: tuple[int, int]) -> torch.Tensor:
        """Checked. groups: sizes, of gate_up's and of down's inputs. Experts nobody chose have
        scales of NaN."""
        layer, source = self.layer, torch.Generator().manual_seed(len(self.x))
        laid_out, exact = [], []
        shapes = ((2 * layer.width, layer.k, groups[0]), (layer.k, layer.width, groups[1]))
        for n, k, group in shapes:
            many = (layer.experts * n, k // group)
            values = torch.randint(16, (many[0], k), generator=source, dtype=torch.uint8)
            zeros = torch.randint(16, many, generator=source, dtype=torch.uint8)
            scales = (torch.rand(many, generator=source) * 0.2 * k**-0.5).bfloat16()
            q = pack(values, 4)
            weights = dequantize(q, scales, zeros, 4, k)
            # Where scales multiply sums, weights are not rounded.
            if regime(rows) == "many" or (group < 128 and group != k):
                weights = weights.to(self.x.dtype).float()
            exact.append(weights.unflatten(0, (layer.experts, n)))
            scales.view(layer.experts, n, -1)[self.unused] = float("nan")
            laid_out.append(lay_out_int4(q, scales, zeros, k))
        with poison():
            out = experts_int4_triton(
                *(self.x, self.index, self.weight, *laid_out[0], *laid_out[1]),
                *(kind, layer.experts, layer.width, rows),
            )
        self.check(out, kind, exact[0], exact[1], cancelled=64.0)
        return out


DTYPES = st.sampled_from(sorted(ROUNDING, key=str))


@settings(max_examples=10, deadline=None)
@given(
    tokens=st.integers(0, 21),
    experts=st.sampled_from([1, 3, 8]),
    top_k=st.integers(1, 4),
    k=st.sampled_from([16, 40, 72]),
    width=st.sampled_from([8, 24, 56]),
    skew=st.sampled_from([0.0, 0.5, 1.0]),
    kind=st.sampled_from(ACTIVATIONS),
    dtype=DTYPES,
    seed=st.integers(0, 2**31),
    bounded=st.booleans(),
)
@example(0, 8, 2, 16, 8, 0.0, "silu", torch.bfloat16, 0, True)
@example(1, 8, 2, 72, 56, 0.0, "silu", torch.bfloat16, 1, True)
@example(21, 8, 4, 40, 24, 1.0, "silu", torch.bfloat16, 2, False)
def test_experts(
    tokens: int,
    experts: int,
    top_k: int,
    k: int,
    width: int,
    skew: float,
    kind: str,
    dtype: torch.dtype,
    seed: int,
    bounded: bool,
) -> None:
    """Any routing, sizes that no tile divides, choices that name an expert twice."""
    case = Case(Layer(experts, top_k, k, width), tokens, skew, dtype, seed)
    case.dense(kind, tokens if bounded else 0)


@settings(max_examples=10, deadline=None)
@given(
    tokens=st.integers(0, 21),
    experts=st.sampled_from([1, 3, 6]),
    top_k=st.integers(1, 3),
    sizes=st.sampled_from([(16, 48, 16, 48), (128, 64, 32, 64), (192, 80, 64, 80)]),
    skew=st.sampled_from([0.0, 0.5, 1.0]),
    kind=st.sampled_from(ACTIVATIONS),
    dtype=DTYPES,
    seed=st.integers(0, 2**31),
    rows=st.sampled_from([21, 64, 0]),
)
@example(0, 3, 2, (128, 64, 128, 64), 0.0, "silu", torch.bfloat16, 0, 16)
@example(1, 3, 2, (256, 128, 128, 32), 0.0, "silu", torch.bfloat16, 1, 16)
@example(13, 3, 2, (80, 256, 80, 128), 0.5, "silu", torch.bfloat16, 2, 16)
@example(20, 6, 3, (256, 144, 128, 144), 1.0, "silu", torch.float16, 3, 0)
@example(20, 6, 3, (64, 192, 32, 64), 1.0, "gelu", torch.float16, 4, 0)
def test_int4(
    tokens: int,
    experts: int,
    top_k: int,
    sizes: tuple[int, int, int, int],
    skew: float,
    kind: str,
    dtype: torch.dtype,
    seed: int,
    rows: int,
) -> None:
    """sizes: K, I, and the groups of gate_up's and down's inputs."""
    k, width, *groups = sizes
    case = Case(Layer(experts, top_k, k, width), tokens, skew, dtype, seed)
    case.int4(kind, rows, (groups[0], groups[1]))


def test_int4_of_experts_within_a_block() -> None:
    case = Case(Layer(2, 1, 16, 24), 1, 0.0, torch.float32, 0)
    with pytest.raises(ValueError, match="width 24: both must be multiples of 16"):
        case.int4("silu", 16, (16, 24))


def test_weights_of_the_router_in_the_dtype_of_x() -> None:
    case = Case(Layer(4, 2, 32, 16), 5, 0.0, torch.bfloat16, 0)
    case.weight = case.weight.bfloat16()
    case.dense("silu", 16)


def test_inputs_that_do_not_lie_end_to_end() -> None:
    case = Case(Layer(4, 2, 32, 16), 5, 0.0, torch.float32, 0)
    out = case.dense("silu", 16)
    case.x, case.index, case.weight = (
        torch.stack([t, t], -1)[..., 0] for t in (case.x, case.index, case.weight)
    )
    assert not case.x.is_contiguous() and not case.index.is_contiguous()
    assert torch.equal(case.dense("silu", 16), out)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    """A token's result is the same alone and in a long step: no sum depends on the others."""
    case = Case(Layer(4, 2, 40, 24), 40, 0.3, torch.float32, 0)
    out = case.dense("silu", 0)
    weights = (case.gate_up, case.down, "silu", 0)
    for token in (0, 17, 39):
        one = slice(token, token + 1)
        alone = experts_triton(case.x[one], case.index[one], case.weight[one], *weights)
        assert torch.equal(alone, out[one])


def test_unknown_activation() -> None:
    case = Case(Layer(2, 1, 16, 16), 1, 0.0, torch.float32, 0)
    with pytest.raises(ValueError, match="'swish'"):
        case.dense("swish", 16)


def exported(call: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> list[str]:
    """Operators of the graph of `call`, exported with any number of tokens."""

    class Module(torch.nn.Module):
        def forward(
            self, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor
        ) -> torch.Tensor:
            return call(x, index, weight)

    tokens = torch.export.Dim("tokens", min=1, max=4096)
    program = torch.export.export(Module(), inputs, dynamic_shapes=({0: tokens},) * 3, strict=False)
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("rows", [16, 0])
def test_exports_with_any_number_of_tokens(rows: int) -> None:
    case = Case(Layer(4, 2, 32, 16), 5, 0.0, torch.bfloat16, 0)
    operators = exported(
        lambda *inputs: experts_triton(*inputs, case.gate_up, case.down, "silu", rows),
        *(case.x, case.index, case.weight),
    )
    assert operators == ["smelt.experts_triton.default"]


@pytest.mark.parametrize("rows", [16, 0])
def test_int4_exports_with_any_number_of_tokens(rows: int) -> None:
    case = Case(Layer(4, 2, 32, 16), 5, 0.0, torch.bfloat16, 0)
    weights = []
    for n, k in ((4 * 32, 32), (4 * 32, 16)):
        q = torch.zeros(n, k // 2, dtype=torch.uint8)
        weights += lay_out_int4(q, torch.ones(n, 1).bfloat16(), torch.zeros(n, 1).byte(), k)
    operators = exported(
        lambda *inputs: experts_int4_triton(*inputs, *weights, "silu", 4, 16, rows),
        *(case.x, case.index, case.weight),
    )
    assert operators == ["smelt.experts_int4_triton.default"]


CAPABILITIES = (80, 86, 90, 100, 120)


@pytest.mark.parametrize("module", [experts, experts_int4, routing])
def test_variants_give_every_argument(module: Any) -> None:
    for found in CAPABILITIES:
        made = list(module.variants(found))
        assert 0 < len({variant.name for variant in made}) == len(made) <= 12
        for variant in made:
            constants = {**variant.constants, **variant.config.constants}
            assert set(variant.kernel.arg_names) <= {*variant.signature, *constants}


@pytest.mark.parametrize("module", [experts, experts_int4])
def test_candidates_are_what_the_table_has_and_others(module: Any) -> None:
    for found in CAPABILITIES:
        for step in ("few", "some", "many"):
            sparse = choose(module.TABLE, [f"{step}/sparse", step], found)
            for shape, base in (
                (step, choose(module.TABLE, [step], found)),
                (f"{step}/sparse", sparse),
                (f"{step}/128x8x2048x768", sparse),
                (f"{step}/8x2x4096x14336", choose(module.TABLE, [step], found)),
            ):
                made = module.candidates(shape, found)
                assert made[0] == base and 4 <= len(made) <= 10
                assert all(config.constants.keys() == base.constants.keys() for config in made)


def test_cost_counts_the_weights_of_chosen_experts() -> None:
    """A token of Mixtral 8x7B goes through 2 of 8 experts of 176 million weights each."""
    weights = 2 * 3 * 4096 * 14336
    one = experts.cost(1, experts.MIXTRAL_8X7B)
    assert one.operations == 2 * weights
    assert weights * 2 < one.bytes < weights * 2 * 1.001
    quarter = experts_int4.cost(1, experts.MIXTRAL_8X7B)
    assert weights * 4.25 / 8 < quarter.bytes < weights * 4.25 / 8 * 1.001
    assert experts.cost(64, experts.MIXTRAL_8X7B).bytes < 4.1 * one.bytes
