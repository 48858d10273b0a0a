"""AWQ: better than plain rounding where it should be, exact where it folds, and replayable."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.data import data_path
from helpers.quantized import (
    Score,
    checkpoint,
    logits,
    module,
    program_of,
    random_ids,
    score,
    text_ids,
    weights_of,
)

from smelt.compiler.weights import ModuleSource
from smelt.passes.base import PassResult
from smelt.passes.dialect import verify
from smelt.passes.program import Dialect, Program
from smelt.passes.quantize import AwqOptions, QuantizeAwq, QuantizeRtn, QuantSpec, RtnOptions
from smelt.passes.quantize.awq_search import (
    channel_sizes,
    factor_for,
    output_error,
    search_clip,
    search_scale,
)
from smelt.passes.quantize.formats import fake_quantize
from smelt.passes.quantize.spec import Scheme
from smelt.runtime.errors import SmeltError, UserError

SAMPLES = random_ids(8, 32)
Searched = tuple[Program, PassResult]


def awq(
    model: torch.nn.Module, samples: list[list[int]], size: int = 32, **options: Any
) -> tuple[Program, PassResult]:
    program = program_of(model)
    spec = QuantSpec("awq", "int4", size)
    result = QuantizeAwq().run(program, AwqOptions(spec, samples, ModuleSource(model), **options))
    program.dialect = Dialect.QUANTIZED
    verify(program)
    return program, result


def compare(
    model: torch.nn.Module, samples: list[list[int]], ids: list[list[int]], size: int
) -> tuple[Score, Score]:
    """(rtn, awq) on `ids`."""
    source = ModuleSource(model)
    reference = logits(program_of(model), source, ids)
    rounded = program_of(model)
    QuantizeRtn().run(rounded, RtnOptions(QuantSpec("rtn", "int4", size)))
    found, _ = awq(model, samples, size)
    return (
        score(logits(rounded, source, ids), reference, ids),
        score(logits(found, source, ids), reference, ids),
    )


def plant_outliers(model: Any, channels: int = 3, size: float = 10.0) -> None:
    """Some channels of each norm grow by `size` and the linears' columns shrink as much: the
    function stays, but the columns that matter most are now the ones rounded worst."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        readers = {
            layer.input_layernorm: ("q_proj", "k_proj", "v_proj"),
            layer.post_attention_layernorm: ("gate_proj", "up_proj"),
        }
        for norm, names in readers.items():
            chosen = torch.randperm(norm.weight.shape[0], generator=generator)[:channels]
            parent = layer.self_attn if "q_proj" in names else layer.mlp
            with torch.no_grad():
                norm.weight[chosen] *= size
                for name in names:
                    getattr(parent, name).weight[:, chosen] /= size


@pytest.fixture(scope="module")
def planted() -> torch.nn.Module:
    model = module("Llama", num_hidden_layers=1)
    plant_outliers(model)
    return model


@pytest.fixture(scope="module")
def searched(planted: torch.nn.Module) -> Searched:
    return awq(planted, SAMPLES, max_rows=10_000)


def test_planted_outliers_cost_awq_less_than_rtn(planted: torch.nn.Module) -> None:
    rtn, found = compare(planted, SAMPLES, random_ids(8, 32, seed=9), 32)
    assert found.kl < 0.6 * rtn.kl
    assert found.own < rtn.own


def test_verdicts_tell_every_layers_error(searched: Searched) -> None:
    program, result = searched
    layers = [note for note in result.notes if note.get("method") == "awq"]
    assert len(layers) == 4
    for note in layers:
        assert note["error"] <= note["error_rtn"], note
    fed_by_norm = [n for n in layers if "gate_proj" in n["layer"] or "q_proj" in n["layer"]]
    assert all(note["alpha"] > 0 for note in fed_by_norm)
    assert all(note["error"] < 0.8 * note["error_rtn"] for note in fed_by_norm)
    assert result.matched == QuantizeAwq().expect(program) == 8
    assert result.notes[-1]["linears_quantized"] == 4


def test_nothing_is_kept_at_16_bits(planted: torch.nn.Module, searched: Searched) -> None:
    """AWQ is no mixed precision: salient channels are scaled, every weight becomes int4."""
    program, _ = searched
    assert len(program.calls(torch.ops.smelt.linear_int4.default)) == 4
    products = (torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor)
    before = len(program_of(planted).calls(*products))
    assert len(program.calls(*products)) == before, "a scale is multiplied at run time"
    weights = weights_of(program, ModuleSource(planted))
    matrices = {n: w for n, w in weights.items() if w.dim() == 2 and w.is_floating_point()}
    assert {n.rsplit(".", 1)[-1] for n in matrices if "layers" in n} == {"scales"}


def test_replaying_the_plan_gives_the_same_bits(
    planted: torch.nn.Module, searched: Searched
) -> None:
    program, _ = searched
    again, _ = awq(planted, SAMPLES, max_rows=10_000)
    source = ModuleSource(planted)
    assert program.weights.digest() == again.weights.digest()
    first, second, third = (weights_of(p, source) for p in (program, program, again))
    for name, value in first.items():
        assert torch.equal(value, second[name]) and torch.equal(value, third[name])


def test_quantized_weights_are_what_calibration_went_on_with(
    planted: torch.nn.Module, searched: Searched
) -> None:
    """The verdict's error holds for the weights that the plan makes."""
    model: Any = planted
    program, result = searched
    notes = {note["layer"]: note for note in result.notes if "layer" in note}
    weights = weights_of(program, ModuleSource(model))
    name = "model.layers.0.self_attn.q_proj+k_proj+v_proj"
    (node,) = program.calls(torch.ops.smelt.linear_int4.default)[:1]
    packed = [weights[str(program.weight_name(arg))] for arg in node.args[1:4]]
    norm = weights[str(program.weight_name(node.args[0].args[1]))]  # type: ignore[union-attr]
    attention = model.model.layers[0]
    with torch.no_grad():
        x = model.model.embed_tokens(torch.tensor(SAMPLES)).flatten(0, 1)
        unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        original = torch.cat(
            [getattr(attention.self_attn, f"{n}_proj").weight for n in ("q", "k", "v")]
        )
        expected = unit * attention.input_layernorm.weight @ original.T
        found = torch.ops.smelt.linear_int4(unit * norm, *packed, None)
    # The v rows were divided for o_proj, which multiplies.
    step = program.weights.producers()[str(program.weight_name(node.args[1]))]
    rows = dict(zip(step.args["kinds"], step.inputs[1:], strict=True)).get("rows")
    if rows is not None:
        found = found * dict(program.weights.materialize([rows], ModuleSource(model)))[rows]
    error = float((found - expected).square().sum() / expected.square().sum())
    assert error == pytest.approx(notes[name]["error"], rel=0.05)


def test_half_precision_norms_fold_without_loss() -> None:
    """What bfloat16 rounds off the divided norm is multiplied into the linears instead."""
    model = module("Llama", num_hidden_layers=1).to(torch.bfloat16)
    plant_outliers(model)
    program, result = awq(model, random_ids(4, 32))
    alphas = [note["alpha"] for note in result.notes if note.get("method") == "awq"]
    assert max(alphas) > 0
    weights = weights_of(program, ModuleSource(model))
    folded = [name for name in weights if "layernorm.weight@" in name]
    assert folded and all(weights[name].dtype == torch.bfloat16 for name in folded)


def test_layers_without_a_producer_are_clipped_and_say_why() -> None:
    model = module("GPT2", n_layer=1)
    _, result = awq(model, random_ids(4, 32))
    notes = {note["layer"]: note for note in result.notes if "layer" in note}
    behind_gelu = notes["transformer.h.0.mlp.c_proj"]
    assert behind_gelu.get("alpha") is None and behind_gelu["reason"]
    assert behind_gelu["error"] < behind_gelu["error_rtn"]
    assert any("no scale folded" in reason for _, reason in result.declined)


def test_calibration_is_asked_for() -> None:
    with pytest.raises(UserError, match="use rtn without"):
        QuantizeAwq().run(program_of(module("Llama", num_hidden_layers=1)), AwqOptions())


def test_scales_that_are_not_finite_name_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    from smelt.passes.quantize import awq as awq_pass
    from smelt.passes.quantize.awq_search import Scale

    broken = lambda *args: Scale(0.5, torch.full((64,), float("inf")))  # noqa: E731
    monkeypatch.setattr(awq_pass, "search_scale", broken)
    with pytest.raises(SmeltError, match=r"layers\.0\.self_attn\.q_proj.*not finite"):
        awq(module("Llama", num_hidden_layers=1), random_ids(2, 16))


# The formulas, against the wrong ones that circulate.


def test_factor_grows_with_the_activation_and_is_normalised() -> None:
    sizes = torch.tensor([0.1, 1.0, 10.0, 0.0])
    factor = factor_for(sizes, 0.5)
    assert factor[2] > factor[1] > factor[0], "larger activations get larger weight scales"
    assert torch.allclose(factor[2] / factor[0], torch.tensor(10.0))
    assert torch.allclose(factor[:3].max() * factor[:3].min(), torch.tensor(1.0))
    assert factor[3] == 1
    assert torch.equal(factor_for(sizes, 0.0), torch.ones(4))
    heavy = factor_for(torch.ones(3), 0.5, torch.tensor([1.0, 1.0, 4.0]))
    assert heavy[2] < heavy[0], "columns that are large by themselves need less"


def test_channels_shared_by_heads_share_their_size() -> None:
    mean = torch.tensor([1.0, 2.0, 3.0, 4.0])
    sizes = channel_sizes(mean, torch.tensor([4, 5, 4, 5]), 6)
    assert sizes.tolist() == [0, 0, 0, 0, 2.0, 3.0]


def test_weights_are_multiplied_and_inputs_divided() -> None:
    """Q(W s)(x / s): with one huge input channel the reverse would round its column to nothing."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(32, 32, generator=generator)
    rows = torch.randn(200, 32, generator=generator)
    rows[:, 7] *= 50
    weight[:, 7] /= 50
    scheme = Scheme("int4", 32)
    columns = torch.arange(32)
    scale = search_scale([weight], [scheme], rows.abs().mean(0), rows, columns, 32)
    assert scale.alpha > 0 and scale.factor[7] == scale.factor.max()
    right = fake_quantize(weight * scale.factor, scheme) / scale.factor - weight
    wrong = fake_quantize(weight / scale.factor, scheme) * scale.factor - weight
    plain = fake_quantize(weight, scheme) - weight
    errors = [float(output_error(rows, d).sum()) for d in (right, plain, wrong)]
    assert errors[0] < 0.3 * errors[1] and errors[1] < errors[2]


def test_alpha_is_searched_against_the_whole_group() -> None:
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(16, 32, generator=generator) * size for size in (1.0, 3.0)]
    rows = torch.randn(100, 32, generator=generator) * torch.rand(32, generator=generator) * 4
    scheme = Scheme("int4", 16)
    columns = torch.arange(32)
    mean = rows.abs().mean(0)
    scale = search_scale(weights, [scheme, scheme], mean, rows, columns, 32)

    def loss(s: torch.Tensor) -> float:
        return sum(
            float(output_error(rows, fake_quantize(w * s, scheme) / s - w).sum()) for w in weights
        )

    assert loss(scale.factor) <= min(loss(factor_for(mean, i / 20)) for i in range(20))


@pytest.mark.parametrize("with_gram", [True, False])
def test_clipping_never_makes_a_row_worse(with_gram: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(40, 64, generator=generator)
    weight[::3, 5] *= 8
    rows = torch.randn(80, 64, generator=generator)
    scheme = Scheme("int4", 32)
    blocks = rows.unflatten(1, (2, -1)).transpose(0, 1)
    gram = blocks.transpose(1, 2) @ blocks if with_gram else None
    clip = search_clip(weight, scheme, rows, gram)
    plain = output_error(rows, fake_quantize(weight, scheme) - weight)
    clipped = output_error(rows, fake_quantize(weight, scheme, clip) - weight)
    assert (clipped <= plain * (1 + 1e-5)).all()
    assert clipped.sum() < 0.95 * plain.sum()


@pytest.mark.parametrize(("name", "size"), [("stories260K", 32), ("babyllama361", 64)])
def test_trained_checkpoints_lose_less_by_awq(name: str, size: int) -> None:
    folder = data_path(f"models/{name}")
    samples = text_ids(folder, data_path("texts/tinystories_train.txt"), 32, 192)
    ids = text_ids(folder, data_path("texts/tinystories_valid.txt"), 48, 256)
    rtn, found = compare(checkpoint(folder), samples, ids, size)
    assert found.kl < 0.9 * rtn.kl
    assert found.perplexity < rtn.perplexity
