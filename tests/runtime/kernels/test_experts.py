"""The kernels of routed experts against their references, in every instruction set."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.experts import random_layer, random_routing

from smelt.runtime.ops.experts import experts as reference
from smelt.runtime.ops.gated_activation import ACTIVATIONS

smelt = torch.ops.smelt
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Hidden values are rounded to the dtype between the two products.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
FORMATS = [("int4", 16), ("int4", 0), ("int3", 16), ("int2", 16), ("int8", 0), ("int8", 16)]
FORMATS += [("fp8", 0), ("fp8", 32)]
TOKENS = (0, 1, 2, 9, 90)
# Rows of one expert from which on torch multiplies in bfloat16 (many_rows.h).
MANY = {"dense": 64, "fp8": 96}
Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Within the dtype's rounding of the typical size; `want` is exact."""
    assert got.shape == want.shape
    if want.numel():
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < TOLERANCE[got.dtype], f"error {error}"


def _exact(
    x: torch.Tensor, index: torch.Tensor, share: torch.Tensor, *weights: torch.Tensor, kind: str
) -> torch.Tensor:
    return reference(x.double(), index, share.double(), *(w.double() for w in weights), kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("experts", "k", "width"), [(5, 64, 48), (3, 45, 7), (40, 32, 32)])
def test_dense(isa: str, dtype: torch.dtype, experts: int, k: int, width: int) -> None:
    torch.manual_seed(0)
    gate_up = (torch.randn(experts, 2 * width, k) / k**0.5).to(dtype)
    down = (torch.randn(experts, k, width) / width**0.5).to(dtype)
    for tokens in TOKENS:
        x = torch.randn(tokens, k).to(dtype)
        index, share = random_routing(tokens, 2, experts)
        want = _exact(x, index, share, gate_up, down, kind="silu")
        _close(smelt.experts_dense(x, index, share, gate_up, down, "silu"), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("format", "group"), FORMATS)
def test_quantized(isa: str, format: str, group: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for k, width in ((64, 48), (96, 32), (32, 64)):
        # Blocks of e4m3 scales must end with an expert's rows.
        if format == "fp8" and group and (k % group or 2 * width % group):
            continue
        layer = random_layer(format, 5, k, width, group)
        arguments, weights = layer.blocked(), layer.dense()
        for tokens in TOKENS:
            x = torch.randn(tokens, k).to(dtype)
            index, share = random_routing(tokens, 2, 5)
            want = _exact(x, index, share, *weights, kind="silu")
            _close(smelt.experts_quantized_blocked(x, index, share, *arguments), want)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(isa: str, kind: str) -> None:
    """Over the whole range, and what a row holds elsewhere does not matter."""
    gate = torch.cat([torch.linspace(-12, 12, 400), torch.tensor([0.0, -90.0, 90.0, 1e-6, -1e-6])])
    width = len(gate)
    gate_up = torch.cat([gate[:, None], torch.ones(width, 1)])[None]
    down = torch.ones(1, 1, width)
    index, share = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    for i in range(0, width, 37):
        down[:] = 0
        down[..., i] = 1
        got = smelt.experts_dense(torch.ones(1, 1), index, share, gate_up, down, kind)
        want = _exact(torch.ones(1, 1), index, share, gate_up, down, kind=kind)
        torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=2e-6)


def test_an_unknown_activation_is_refused() -> None:
    index, share = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    with pytest.raises(RuntimeError, match="no activation swish"):
        smelt.experts_dense(
            torch.ones(1, 1), index, share, torch.ones(1, 2, 1), torch.ones(1, 1, 1), "swish"
        )


def _layers(experts: int, k: int, width: int, dtype: torch.dtype) -> dict[str, Run]:
    gate_up = torch.randn(experts, 2 * width, k).to(dtype)
    down = torch.randn(experts, k, width).to(dtype)
    layers: dict[str, Run] = {
        "dense": lambda x, i, w: smelt.experts_dense(x, i, w, gate_up, down, "silu")
    }
    for format in ("int4", "int3", "int2", "int8", "fp8"):
        arguments = random_layer(format, experts, k, width).blocked()
        layers[format] = lambda x, i, w, a=arguments: smelt.experts_quantized_blocked(x, i, w, *a)
    return layers


@pytest.mark.parametrize(("k", "width"), [(144, 80), (160, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_does_not_depend_on_its_neighbours_or_on_threads(
    isa: str, dtype: torch.dtype, k: int, width: int
) -> None:
    torch.manual_seed(0)
    experts = 4
    x = torch.randn(150, k).to(dtype)
    index, share = random_routing(150, 2, experts)
    threads = torch.get_num_threads()
    for name, layer in _layers(experts, k, width, dtype).items():
        alone = torch.cat([layer(x[i, None], index[i, None], share[i, None]) for i in range(150)])
        try:
            # From MANY rows of an expert on, torch multiplies: its sums may depend on their number.
            most = (
                150 if dtype is torch.float32 or name not in MANY else 2 * min(MANY.values()) // 3
            )
            for count in (1, 3):
                torch.set_num_threads(count)
                for tokens in (2, 5, most):
                    got = layer(x[:tokens], index[:tokens], share[:tokens])
                    assert torch.equal(got, alone[:tokens]), (name, tokens, count)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [0, 16, 48])
@pytest.mark.parametrize("kind", list(MANY))
def test_experts_with_many_rows_beside_experts_with_few(
    isa: str, kind: str, group: int, dtype: torch.dtype
) -> None:
    """One expert has as many rows as it takes, one has one fewer, one has none."""
    torch.manual_seed(0)
    many, k, width = MANY[kind], 144, 96
    layer = random_layer("fp8", 5, k, width, group)
    gate_up, down = (w.to(dtype) for w in layer.dense())
    chosen = [0] * many + [1] * (many - 1) + [2] * (3 * many) + [4]
    order = torch.randperm(len(chosen))
    index = torch.tensor(chosen)[order][:, None]
    x, share = torch.randn(len(chosen), k).to(dtype), torch.rand(len(chosen), 1)

    def run(*rows: torch.Tensor) -> torch.Tensor:
        if kind == "dense":
            return smelt.experts_dense(*rows, gate_up, down, "silu")
        return smelt.experts_quantized_blocked(*rows, *layer.blocked())

    found = run(x, index, share)
    weights = (gate_up, down) if kind == "dense" else layer.dense()
    _close(found, _exact(x, index, share, *weights, kind="silu"))
    few = (index == 1).flatten()
    alone = [run(x[i, None], index[i, None], share[i, None]) for i in few.nonzero().flatten()]
    assert torch.equal(found[few], torch.cat(alone))


def test_more_tokens_than_the_buffers_hold(isa: str) -> None:
    """Tokens go through in several rounds: here one pair takes 3.6 MB of 128."""
    if isa != "baseline":
        pytest.skip("the rounds are the same for all sets")
    torch.manual_seed(0)
    k, width, tokens = 2, 100_000, 70
    gate_up, down = torch.randn(2, 2 * width, k), torch.randn(2, k, width)
    x = torch.randn(tokens, k)
    index, share = random_routing(tokens, 2, 2)
    want = _exact(x, index, share, gate_up, down, kind="relu")
    _close(smelt.experts_dense(x, index, share, gate_up, down, "relu"), want)


def test_strides_dtypes_of_weights_and_repeated_choices() -> None:
    torch.manual_seed(0)
    gate_up, down = torch.randn(3, 16, 8), torch.randn(3, 8, 8)
    x = torch.randn(8, 4).T
    index = torch.tensor([[1, 1], [0, 2], [2, 0], [1, 0]])
    share = torch.rand(2, 4).bfloat16().T
    want = _exact(x, index, share, gate_up, down, kind="silu")
    _close(smelt.experts_dense(x, index, share, gate_up, down, "silu"), want)


def test_wrong_arguments_are_refused() -> None:
    layer = random_layer("int4", 3, 32, 32, 16)
    x, (index, share) = torch.randn(2, 32), random_routing(2, 2, 3)
    arguments = layer.blocked()

    def run(*args: object) -> None:
        smelt.experts_quantized_blocked(*args)

    with pytest.raises(RuntimeError, match="chose expert 3 of 3"):
        run(x, torch.full_like(index, 3), share, *arguments)
    with pytest.raises(RuntimeError, match=r"2 tokens, but choices \[1, 2\]"):
        run(x, index[:1], share[:1], *arguments)
    with pytest.raises(RuntimeError, match="does not hold 192 x 48"):
        run(torch.randn(2, 48), index, share, *arguments)
    with pytest.raises(RuntimeError, match="must fill blocks of 16, not 64 and 40"):
        run(torch.randn(2, 40), index, share, *arguments)
    odd = random_layer("int4", 3, 48, 48, 12).blocked()
    with pytest.raises(RuntimeError, match="no experts' kernel for groups of 12"):
        run(torch.randn(2, 48), index, share, *odd)
    with pytest.raises(RuntimeError, match=r"weights .* do not fit x"):
        smelt.experts_dense(x, index, share, torch.ones(3, 8, 32), torch.ones(3, 32, 5), "silu")
