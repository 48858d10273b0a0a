"""SmoothQuant: outliers really move, folding is exact, and W8A8 stays close to the original."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.check_pass import check_pass
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
from helpers.tiny import Subject, Toy
from helpers.tiny import program_of as toy_program
from torch import nn

from smelt.compiler.weights import ModuleSource
from smelt.passes.base import PassResult
from smelt.passes.dialect import verify
from smelt.passes.program import Dialect, Program
from smelt.passes.quantize import QuantizeSmoothQuant, QuantSpec, SmoothQuantOptions
from smelt.passes.quantize.smooth_search import (
    Inputs,
    input_scale,
    largest_of_channels,
    output_error,
    search_alpha,
    smooth_factor,
    weight_largest,
)
from smelt.passes.quantize.w8a8 import product, quantize_w8a8
from smelt.runtime.errors import SmeltError, UserError

smelt = torch.ops.smelt
SAMPLES = random_ids(8, 32)
IDS = random_ids(8, 32, seed=9)


def smoothed(
    model: torch.nn.Module, samples: list[list[int]] = SAMPLES, **spec: Any
) -> tuple[Program, PassResult]:
    program = program_of(model)
    options = SmoothQuantOptions(QuantSpec("smoothquant", **spec), samples, ModuleSource(model))
    result = QuantizeSmoothQuant().run(program, options)
    program.dialect = Dialect.QUANTIZED
    verify(program)
    return program, result


def quality(
    model: torch.nn.Module, ids: list[list[int]], samples: list[list[int]] = SAMPLES, **spec: Any
) -> Score:
    source = ModuleSource(model)
    program, _ = smoothed(model, samples, **spec)
    reference = logits(program_of(model), source, ids)
    return score(logits(program, source, ids), reference, ids)


def layers(result: PassResult) -> dict[str, dict[str, Any]]:
    return {n["layer"]: n for n in result.notes if n.get("method") == "smoothquant"}


def plant_outliers(model: Any, channels: int = 3, size: float = 30.0) -> None:
    """Some channels of each norm grow and the linears' columns shrink as much, so that the function
    stays: what large models do to their activations by themselves."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        readers = {
            layer.input_layernorm: [layer.self_attn.q_proj, layer.self_attn.k_proj],
            layer.post_attention_layernorm: [layer.mlp.gate_proj, layer.mlp.up_proj],
        }
        readers[layer.input_layernorm].append(layer.self_attn.v_proj)
        for norm, linears in readers.items():
            chosen = torch.randperm(norm.weight.shape[0], generator=generator)[:channels]
            with torch.no_grad():
                norm.weight[chosen] *= size
                for linear in linears:
                    linear.weight[:, chosen] /= size


@pytest.fixture(scope="module")
def planted() -> torch.nn.Module:
    model = module("Llama", num_hidden_layers=1)
    plant_outliers(model)
    return model


@pytest.fixture(scope="module")
def searched(planted: torch.nn.Module) -> tuple[Program, PassResult]:
    return smoothed(planted)


class Layer(Toy):
    """A norm and the linears that read it, one with a bias, one behind a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.empty(16))
        self.gate = nn.Linear(16, 32)
        self.up = nn.Linear(16, 32, bias=False)
        self.down = nn.Linear(32, 16, bias=False)

    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        y = smelt.rms_norm(x, self.norm, 1e-6, 0.0)
        y = smelt.gated_activation(self.gate(y), self.up(y), "silu")
        return x + self.down(y)


def toy() -> tuple[Subject, dict[str, Any]]:
    subject = toy_program(Layer())
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(0, 37, (4, 24), generator=generator).tolist()
    return subject, {"samples": samples, "source": subject.source}


@pytest.mark.parametrize(("name", "settings"), [("searched", {}), ("static", {"alpha": 0.5})])
def test_what_becomes_of_a_layer(name: str, settings: dict[str, Any]) -> None:
    subject, options = toy()
    activations = "static" if name == "static" else "dynamic"
    options["spec"] = QuantSpec("smoothquant", activations=activations, **settings)
    found = check_pass(
        subject,
        QuantizeSmoothQuant(),
        before={"aten.linear": 4, "smelt.rms_norm": 1},
        after={
            "aten.linear": 1,
            "smelt.linear_w8a8": 3,
            "smelt.rms_norm": 1,
            "aten.mul": 0,
            "aten.div": 0,
        },
        matched=4,
        rewritten=3,
        declined=["lm_head"],
        options=options,
        golden=f"quantize-smoothquant_{name}",
    )
    notes = [n for n in found.record["notes"] if n.get("method") == "smoothquant"]
    assert {n["activations"] for n in notes} == {
        "int8, one scale" if name == "static" else "int8, a scale a token"
    }


def test_planted_outliers_ruin_plain_w8a8_and_not_smoothquant(planted: torch.nn.Module) -> None:
    naive, fixed = quality(planted, IDS, alpha=0.0), quality(planted, IDS, alpha=0.5)
    assert naive.kl > 1e-3
    assert fixed.kl < 0.1 * naive.kl


def test_a_searched_alpha_is_as_good(
    planted: torch.nn.Module, searched: tuple[Program, PassResult]
) -> None:
    source = ModuleSource(planted)
    reference = logits(program_of(planted), source, IDS)
    found = score(logits(searched[0], source, IDS), reference, IDS)
    assert found.kl < 0.1 * quality(planted, IDS, alpha=0.0).kl


def test_with_one_scale_for_all_tokens_too(planted: torch.nn.Module) -> None:
    naive = quality(planted, IDS, alpha=0.0, activations="static")
    searched = quality(planted, IDS, activations="static")
    assert searched.kl < 0.3 * naive.kl


def test_verdicts_tell_every_layers_error(searched: tuple[Program, PassResult]) -> None:
    program, result = searched
    found = layers(result)
    assert len(found) == 4
    for note in found.values():
        assert note["error"] <= note["error_rtn"] * (1 + 1e-6), note
        assert note["format"] == "int8" and note["weight"] in program.weights.specs
    for name, note in found.items():
        if "q_proj" in name or "gate_proj" in name:
            assert note["alpha"] > 0 and note["error"] < 0.1 * note["error_rtn"]
    assert result.matched == QuantizeSmoothQuant().expect(program) == 8
    assert result.notes[-1]["summary"].startswith("quantized")


def test_nothing_is_multiplied_at_run_time(
    planted: torch.nn.Module, searched: tuple[Program, PassResult]
) -> None:
    program, _ = searched
    assert len(program.calls(smelt.linear_w8a8.default)) == 4
    products = (torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor)
    assert len(program.calls(*products)) == len(program_of(planted).calls(*products))
    weights = weights_of(program, ModuleSource(planted))
    matrices = {n for n, w in weights.items() if w.dim() == 2 and "layers" in n}
    assert {weights[n].dtype for n in matrices} == {torch.int8}


def test_the_folded_norm_holds_the_planted_outliers_no_more(planted: Any) -> None:
    program, _ = smoothed(planted, alpha=0.5)
    weights = weights_of(program, ModuleSource(planted))
    (name,) = [n for n in weights if "input_layernorm" in n]
    before = planted.model.layers[0].input_layernorm.weight.detach().abs()
    after = weights[name].abs()
    spread = [float(w.max() / w.median()) for w in (before, after)]
    assert spread[1] < 0.3 * spread[0]


def test_replaying_the_plan_gives_the_same_bits(
    planted: torch.nn.Module, searched: tuple[Program, PassResult]
) -> None:
    first, second = searched[0], smoothed(planted)[0]
    assert first.weights.digest() == second.weights.digest()
    source = ModuleSource(planted)
    again = weights_of(second, source)
    assert all(torch.equal(v, again[n]) for n, v in weights_of(first, source).items())


def test_layers_without_a_producer_are_unsmoothed_and_say_why() -> None:
    _, result = smoothed(module("GPT2", n_layer=1), random_ids(4, 32))
    behind_gelu = layers(result)["transformer.h.0.mlp.c_proj"]
    assert "alpha" not in behind_gelu and behind_gelu["reason"]
    assert behind_gelu["error"] == behind_gelu["error_rtn"]
    assert any("no scale folded" in reason for _, reason in result.declined)


def test_plain_dynamic_w8a8_needs_no_text(planted: torch.nn.Module) -> None:
    program = program_of(planted)
    spec = QuantSpec("smoothquant", alpha=0.0)
    assert not spec.needs_calibration
    result = QuantizeSmoothQuant().run(program, SmoothQuantOptions(spec))
    assert result.rewritten == 7 and "error" not in result.notes[0]
    for needy in ({"alpha": 0.5}, {"alpha": 0.0, "activations": "static"}, {}):
        spec = QuantSpec("smoothquant", **needy)
        assert spec.needs_calibration
        with pytest.raises(UserError, match="needs calibration text"):
            QuantizeSmoothQuant().run(program_of(planted), SmoothQuantOptions(spec))


def test_a_linear_too_wide_for_integer_sums_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from smelt.passes.quantize import w8a8

    monkeypatch.setattr(w8a8, "MAX_K", 80)
    with pytest.raises(UserError, match=r"down_proj has 96 input features.*rtn with int8"):
        smoothed(module("Llama", num_hidden_layers=1))


def test_nan_in_a_weight_names_the_layer() -> None:
    model: Any = module("Llama", num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(SmeltError, match=r"layers\.0\.mlp\.gate_proj\+up_proj"):
        smoothed(model)


# The formulas, against the wrong ones that circulate.


def test_factors_are_the_papers() -> None:
    """s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), up to a constant."""
    activations, weights = torch.tensor([1.0, 50.0, 4.0]), torch.tensor([0.5, 0.1, 2.0])
    for alpha in (0.3, 0.5, 0.85):
        exact = activations**alpha / weights ** (1 - alpha)
        ratio = smooth_factor(activations, weights, alpha) / exact
        torch.testing.assert_close(ratio, ratio[:1].expand(3))
    assert torch.equal(smooth_factor(activations, weights, 0.0), torch.ones(3))


def test_difficulty_moves_from_activations_to_weights() -> None:
    """x / s and W s: the other way round makes outliers larger."""
    torch.manual_seed(0)
    weight, rows = torch.randn(32, 64), torch.randn(200, 64)
    rows[:, 7] *= 60
    s = smooth_factor(rows.abs().amax(0), weight_largest([weight]), 0.5)
    assert s[7] == s.max()
    largest = [x.abs().amax(0) for x in (rows, rows / s)]
    before, after = (float(x.max() / x.median()) for x in largest)
    assert after < 0.2 * before, "the outlier stands out less"
    inputs = Inputs(rows.abs().amax(0), rows, False)
    right, plain, wrong = (output_error([weight], inputs, f)[0] for f in (s, None, 1 / s))
    assert right < 0.2 * plain and plain < wrong


def test_at_alpha_half_both_sides_get_equal_largest_values() -> None:
    """What the paper's choice means: max|x_j| / s_j = max|w_j| s_j for every channel."""
    torch.manual_seed(0)
    weight, rows = torch.randn(48, 32) * torch.rand(32), torch.randn(99, 32) * torch.rand(32) * 9
    x, w = rows.abs().amax(0), weight_largest([weight])
    s = smooth_factor(x, w, 0.5)
    ratio = (x / s) / (w * s)
    torch.testing.assert_close(ratio, ratio[:1].expand(32))


def test_alpha_is_searched_over_the_whole_group_with_inputs_quantized() -> None:
    torch.manual_seed(1)
    weights = [torch.randn(16, 32), torch.randn(24, 32) * 3]
    rows = torch.randn(100, 32) * torch.rand(32) * 4
    rows[:, 3] *= 40
    inputs = Inputs(rows.abs().amax(0), rows, False)
    columns = torch.arange(32)
    found = search_alpha(weights, inputs, columns, 32)

    def loss(s: torch.Tensor) -> float:
        return sum(
            float((product(w, s, None)(rows, None) - rows @ w.T).square().sum()) for w in weights
        )

    own = weight_largest(weights)
    others = [smooth_factor(inputs.largest, own, i / 10) for i in range(10)]
    assert found.alpha > 0
    assert loss(found.factor) <= 1.02 * min(loss(s) for s in others)
    assert loss(found.factor) < 0.5 * loss(torch.ones(32))
    fixed = search_alpha(weights, inputs, columns, 32, (0.5,))
    assert fixed.alpha == 0.5


def test_channels_shared_by_heads_take_the_largest() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 0.5])
    found = largest_of_channels(values, torch.tensor([4, 5, 4, 5]), 6)
    assert found.tolist() == [0, 0, 0, 0, 3.0, 2.0]


def test_static_scales_are_of_the_smoothed_input() -> None:
    largest, factor = torch.tensor([1.0, 127.0, 2.0]), torch.tensor([1.0, 63.5, 1.0])
    assert float(input_scale(largest, None)) == 1.0
    assert float(input_scale(largest, factor)) == pytest.approx(2 / 127)


def test_weights_are_symmetric_without_minus_128() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.0, 0.0], [3e-3, 1e-3, -3e-3]])
    q, scales = quantize_w8a8(weight)
    assert q.tolist() == [[64, -127, 0], [0, 0, 0], [127, 42, -127]]
    assert scales.dtype == torch.float32 and float(scales[1]) == 1


@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["stories260K", "babyllama361"])
def test_trained_checkpoints_stay_within_two_percent(name: str, activations: str) -> None:
    folder = data_path(f"models/{name}")
    samples = text_ids(folder, data_path("texts/tinystories_train.txt"), 16, 128)
    ids = text_ids(folder, data_path("texts/tinystories_valid.txt"), 12, 256)
    model = checkpoint(folder)
    source = ModuleSource(model)
    reference = logits(program_of(model), source, ids)
    original = score(reference, reference, ids)
    program, _ = smoothed(model, samples, activations=activations)
    found = score(logits(program, source, ids), reference, ids)
    assert found.perplexity < 1.02 * original.perplexity
    assert found.kl < 0.02
