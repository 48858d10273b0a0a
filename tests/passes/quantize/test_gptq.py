"""GPTQ: the published algorithm, better than rounding where it should be, and honest where not."""

from __future__ import annotations

import pytest
import torch
from helpers.data import data_path
from helpers.quantized import (
    checkpoint,
    logits,
    module,
    program_of,
    random_ids,
    score,
    text_ids,
    weights_of,
)

from smelt.compiler.origins import origins
from smelt.compiler.weights import ModuleSource
from smelt.passes.base import PassResult
from smelt.passes.dialect import verify
from smelt.passes.program import Dialect, Program
from smelt.passes.quantize import (
    AwqOptions,
    GptqOptions,
    QuantizeAwq,
    QuantizeGptq,
    QuantizeRtn,
    QuantSpec,
    RtnOptions,
)
from smelt.passes.quantize.drift import Drift, residual
from smelt.passes.quantize.formats import Quantized, grid, quantize_grouped
from smelt.passes.quantize.gptq_refine import refine
from smelt.passes.quantize.gptq_solve import errors_of, nearest, prepare, solve
from smelt.passes.quantize.groups import find_groups
from smelt.passes.quantize.linears import find_linears
from smelt.runtime.errors import SmeltError, UserError
from smelt.runtime.ops.packing import dequantize

SAMPLES = random_ids(8, 32)


def correlated(rows: int, k: int, seed: int = 0) -> torch.Tensor:
    """Activations with the strong correlations that GPTQ lives on."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, k // 4, generator=generator)
    mix = torch.randn(k // 4, k, generator=generator)
    return base @ mix + 0.3 * torch.randn(rows, k, generator=generator)


def gptq(
    model: torch.nn.Module, samples: list[list[int]], form: str = "int4", size: int = 32
) -> tuple[Program, PassResult]:
    program = program_of(model)
    spec = QuantSpec("gptq", form, size)
    result = QuantizeGptq().run(program, GptqOptions(spec, samples, ModuleSource(model)))
    program.dialect = Dialect.QUANTIZED
    verify(program)
    return program, result


def loss(found: Quantized, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(errors_of(found.dequantize() - weight, hessian).sum())


def by_the_paper(weight: torch.Tensor, hessian: torch.Tensor, bits: int) -> torch.Tensor:
    """One scale a row, columns in order, each step solved anew from the inverse of what is left of
    H (equations 2 and 3 of the paper) instead of from a Cholesky factor."""
    scales, zeros = grid(weight, 1, bits)
    scale, zero = scales.float()[:, 0], zeros[:, 0]
    h = hessian.double() + torch.eye(len(hessian)).double() * 0.01 * hessian.diagonal().mean()
    w = weight.double().clone()
    out = torch.empty_like(weight)
    for i in range(weight.shape[1]):
        inverse = torch.linalg.inv(h[i:, i:])
        value = (torch.round(w[:, i] / scale) + zero).clamp(0, 2**bits - 1)
        out[:, i] = (value - zero) * scale
        lost = (w[:, i] - out[:, i]) / inverse[0, 0]
        w[:, i:] -= lost[:, None] * inverse[0]
    return out


def test_solution_is_the_papers() -> None:
    x = correlated(200, 24)
    # Falling activations, so that the order by activation is the order of the columns.
    x = x * (2.0 - torch.arange(24) / 24) / x.norm(dim=0)
    hessian = x.T @ x
    weight = torch.randn(8, 24, generator=torch.Generator().manual_seed(1))
    found = solve(weight, prepare(hessian, "x"), 1, 4).dequantize()
    assert torch.equal(found, by_the_paper(weight, hessian, 4).float())


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("groups", [1, 6])
def test_errors_cancel_on_correlated_inputs(bits: int, groups: int) -> None:
    x = correlated(1000, 192)
    hessian, weight = x.T @ x, torch.randn(32, 192, generator=torch.Generator().manual_seed(2))
    found = loss(solve(weight, prepare(hessian, "x"), groups, bits), weight, hessian)
    rounded = loss(quantize_grouped(weight, groups, bits), weight, hessian)
    # Scales and zero points are those of rounding: only the whole numbers differ.
    assert found < 0.5 * rounded


def test_with_an_identity_hessian_it_is_rounding() -> None:
    """A widespread sample uses an identity Hessian, which compensates nothing."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(3))
    found = solve(weight, prepare(torch.eye(64), "x"), 2, 4)
    assert torch.equal(found.q, quantize_grouped(weight, 2, 4).q)


def test_features_that_were_never_active_are_rounded() -> None:
    x = correlated(300, 64)
    x[:, 10:20] = 0
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(4))
    found, rounded = solve(weight, prepare(x.T @ x, "x"), 2, 4), quantize_grouped(weight, 2, 4)
    assert torch.equal(found.q[:, 10:20], rounded.q[:, 10:20])
    assert not torch.equal(found.q, rounded.q)
    assert torch.equal(solve(weight, prepare(torch.zeros(64, 64), "x"), 2, 4).q, rounded.q)


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("groups", [1, 6])
def test_refining_lowers_the_error_of_every_row(bits: int, groups: int) -> None:
    x = correlated(1000, 192)
    x[:, 50] = 0
    hessian, weight = x.T @ x, torch.randn(32, 192, generator=torch.Generator().manual_seed(5))
    prepared = prepare(hessian, "x")
    for start in (quantize_grouped(weight, groups, bits), solve(weight, prepared, groups, bits)):
        lost = [
            errors_of(found.dequantize() - weight, hessian, prepared.added)
            for found in (start, refine(start, weight, hessian, prepared, bits))
        ]
        assert (lost[1] <= lost[0] * (1 + 1e-4)).all() and lost[1].sum() < 0.95 * lost[0].sum()


def test_refining_finds_the_scale_that_was_hidden() -> None:
    """Whole numbers of another scale: least squares brings it back, and then nothing is lost."""
    generator = torch.Generator().manual_seed(6)
    x, q = (
        torch.randn(400, 32, generator=generator),
        torch.randint(0, 16, (8, 32), generator=generator),
    )
    made = Quantized(
        q.to(torch.uint8),
        torch.full((8, 1), 0.25).bfloat16(),
        torch.full((8, 1), 7, dtype=torch.uint8),
    )
    off = made._replace(scales=torch.full((8, 1), 0.28).bfloat16())
    hessian = x.T @ x
    found = refine(off, made.dequantize(), hessian, prepare(hessian, "x"), 4)
    assert torch.equal(found.dequantize(), made.dequantize())


def test_the_nearest_weight_makes_up_for_changed_inputs() -> None:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(4000, 24, generator=generator)
    now = x @ (torch.eye(24) + 0.1 * torch.randn(24, 24, generator=generator))
    stream = torch.randn(24, 8, generator=generator)
    weight = torch.randn(8, 24, generator=generator)
    lost = Drift((x - now).T @ now, (now @ stream).T @ now)
    change = nearest(lost(weight, slice(0, 8)), prepare(now.T @ now, "x", 1e-6), len(x))
    wanted = x @ weight.T + now @ stream  # what the stream has lost is wanted, too
    left = (wanted - now @ (weight + change).T).norm() / (wanted - now @ weight.T).norm()
    assert left < 0.02
    few = nearest(lost(weight, slice(0, 8)), prepare(now.T @ now, "x", 1e-6), 24)
    assert torch.allclose(few, change * (4024 / 4000) / 2, rtol=1e-4)


def test_linears_that_add_to_the_residual_stream_are_known() -> None:
    program = program_of(module("Llama", num_hidden_layers=1))
    groups = find_groups(program, find_linears(program, QuantSpec("gptq", "int4", 32)))
    adding = [group.name.split(".")[-1] for group in groups if residual(group) is not None]
    assert adding == ["o_proj", "down_proj"]


def test_an_unusable_hessian_names_the_layer() -> None:
    hessian = -torch.eye(8)
    hessian[0, 0] = 1.0
    hessian[1:, 0] = hessian[0, 1:] = 5.0
    with pytest.raises(SmeltError, match=r"layers\.3\.up_proj: .*--calib-samples"):
        prepare(hessian.abs() * 2, "layers.3.up_proj")


@pytest.mark.parametrize("form", ["int4", "int3"])
def test_loses_less_than_rounding(form: str) -> None:
    model = module("Llama", num_hidden_layers=1)
    source, ids = ModuleSource(model), random_ids(8, 32, seed=9)
    reference = logits(program_of(model), source, ids)
    rounded = program_of(model)
    QuantizeRtn().run(rounded, RtnOptions(QuantSpec("rtn", form, 32)))
    found, result = gptq(model, SAMPLES, form)
    kl = score(logits(found, source, ids), reference, ids).kl
    assert kl < 0.9 * score(logits(rounded, source, ids), reference, ids).kl
    layers = [note for note in result.notes if note.get("method") == "gptq"]
    assert len(layers) == 4 and result.matched == QuantizeGptq().expect(found)
    assert all(note["error"] < note["error_rtn"] for note in layers)


def test_planned_weights_are_the_ones_that_were_measured() -> None:
    model = module("Llama", num_hidden_layers=1)
    program, result = gptq(model, SAMPLES)
    weights = weights_of(program, ModuleSource(model))
    name = "model.layers.0.self_attn.q_proj+k_proj+v_proj"
    (note,) = [n for n in result.notes if n.get("layer") == name]
    first = program.calls(torch.ops.smelt.linear_int4.default)[0]
    packed = [weights[program.weight_name(arg) or ""] for arg in first.args[1:4]]
    attention = model.model.layers[0].self_attn
    whole = torch.cat([getattr(attention, f"{x}_proj").weight for x in "qkv"])
    difference = dequantize(*packed, bits=4, k=64) - whole.detach()
    assert 0 < difference.norm() / whole.norm() < 0.2
    again, _ = gptq(model, SAMPLES)
    for key, value in weights_of(again, ModuleSource(model)).items():
        assert torch.equal(value, weights[key])
    assert note["error"] < note["error_rtn"]


def test_weights_say_which_parameters_they_stand_for() -> None:
    """What `smelt export` reads, though no formula makes these weights from the checkpoint."""
    model = module("Llama", num_hidden_layers=1)
    program, _ = gptq(model, SAMPLES)
    found = origins(program, {name for name, _ in model.named_parameters()})
    packed = [origin for origin in found.values() if origin.field == "qweight"]
    assert sorted(len(origin.parts) for origin in packed) == [1, 1, 2, 3]


def test_without_text_it_says_what_to_do() -> None:
    model = module("Llama", num_hidden_layers=1)
    with pytest.raises(UserError, match="use rtn without them"):
        QuantizeGptq().run(program_of(model), GptqOptions())


@pytest.mark.parametrize("form", ["int4", "int3"])
def test_on_trained_weights_gptq_beats_rounding(form: str) -> None:
    folder = data_path("models/stories260K")
    model = checkpoint(folder)
    train, valid = (data_path(f"texts/tinystories_{part}.txt") for part in ("train", "valid"))
    samples, ids = text_ids(folder, train, 16, 128), text_ids(folder, valid, 8, 128)
    source = ModuleSource(model)
    reference = logits(program_of(model), source, ids)
    rounded, awq = program_of(model), program_of(model)
    QuantizeRtn().run(rounded, RtnOptions(QuantSpec("rtn", form, 32)))
    QuantizeAwq().run(awq, AwqOptions(QuantSpec("awq", form, 32), samples, source))
    found, _ = gptq(model, samples, form)
    scores = [score(logits(p, source, ids), reference, ids) for p in (rounded, awq, found)]
    assert scores[2].kl < scores[0].kl and scores[2].perplexity < scores[0].perplexity
    assert scores[1].kl < scores[0].kl
