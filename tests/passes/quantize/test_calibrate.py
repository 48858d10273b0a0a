"""Calibration: statistics of the true inputs, error passed on, one piece's weights at a time."""

from __future__ import annotations

import pytest
import torch
from helpers.quantized import module, program_of, random_ids

from smelt.compiler.weights import ModuleSource
from smelt.passes.quantize.calibrate import Replacement, Statistics, calibrate
from smelt.passes.quantize.groups import Group, find_groups
from smelt.passes.quantize.linears import find_linears
from smelt.passes.quantize.spec import QuantSpec
from smelt.runtime.errors import SmeltError

SAMPLES = random_ids(3, 17) + random_ids(1, 9, seed=5)


def collect(model: torch.nn.Module, scale: float = 1.0, **options: object) -> dict[str, Statistics]:
    """Run calibration; every weight goes on multiplied by `scale`."""
    program = program_of(model)
    groups = find_groups(program, find_linears(program, QuantSpec("rtn", "int4", 32)))
    found: dict[str, Statistics] = {}

    def choose(
        group: Group, weights: list[torch.Tensor], statistics: Statistics
    ) -> list[torch.Tensor]:
        found[group.linears[0].layer] = statistics
        return [weight * scale for weight in weights]

    calibrate(program, groups, SAMPLES, ModuleSource(model), choose, **options)  # type: ignore[arg-type]
    return found


def inputs_of(model: torch.nn.Module, name: str) -> torch.Tensor:
    """What the module `name` reads over all samples, [tokens, K]."""
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().flatten(0, -2))
    )
    with torch.no_grad():
        for sample in SAMPLES:
            model(torch.tensor([sample]))
    hook.remove()
    return torch.cat(seen)


def test_statistics_are_those_of_the_models_own_run() -> None:
    model = module("Llama")
    found = collect(model)
    assert len(found) == 8
    for layer, name in (
        ("model.layers.0.self_attn.q_proj+k_proj+v_proj", "model.layers.0.self_attn.q_proj"),
        ("model.layers.1.self_attn.o_proj", "model.layers.1.self_attn.o_proj"),
        ("model.layers.1.mlp.down_proj", "model.layers.1.mlp.down_proj"),
    ):
        x, statistics = inputs_of(model, name), found[layer]
        assert statistics.tokens == len(x) == 60
        assert torch.allclose(statistics.mean, x.abs().mean(0), rtol=1e-3, atol=1e-5)
        assert torch.allclose(statistics.largest, x.abs().amax(0), rtol=1e-3)
        assert torch.allclose(statistics.rows, x, atol=1e-3)
        assert statistics.gram is not None
        first = x[:, : statistics.gram.shape[1]]
        assert torch.allclose(statistics.gram[0], first.T @ first, rtol=1e-3, atol=1e-2)


def test_later_layers_see_the_error_of_earlier_ones() -> None:
    model = module("Llama")
    plain, changed = collect(model), collect(model, scale=0.9)
    first, later = "model.layers.0.self_attn.q_proj+k_proj+v_proj", "model.layers.1.mlp.down_proj"
    assert torch.equal(plain[first].mean, changed[first].mean)
    assert not torch.allclose(plain[later].mean, changed[later].mean, rtol=1e-2)


def test_a_linear_may_go_on_with_a_function_of_its_input_and_bias() -> None:
    """Methods that quantize inputs, too, replace the whole product and not its weight."""
    model = module("Qwen2", num_hidden_layers=1)
    plain = collect(model)
    program = program_of(model)
    groups = find_groups(program, find_linears(program, QuantSpec("rtn", "int4", 32)))
    found: dict[str, Statistics] = {}
    biased: list[bool] = []

    def choose(
        group: Group, weights: list[torch.Tensor], statistics: Statistics
    ) -> list[Replacement]:
        found[group.linears[0].layer] = statistics

        def product(weight: torch.Tensor) -> Replacement:
            def apply(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
                biased.append(bias is not None)
                return torch.nn.functional.linear(x, weight, bias)

            return apply

        return [product(weight) for weight in weights]

    calibrate(program, groups, SAMPLES, ModuleSource(model), choose)
    assert True in biased and False in biased, "qkv has a bias, the others have none"
    for layer, statistics in plain.items():
        assert torch.equal(found[layer].rows, statistics.rows), layer


def test_kept_rows_are_bounded_seeded_and_the_same_for_all_groups() -> None:
    model = module("Llama")
    one, two = collect(model, max_rows=10, seed=3), collect(model, max_rows=10, seed=3)
    other = collect(model, max_rows=10, seed=4)
    for layer, statistics in one.items():
        assert statistics.rows.shape[0] == 10
        assert torch.equal(statistics.rows, two[layer].rows)
    assert any(not torch.equal(one[layer].rows, other[layer].rows) for layer in one)


def test_one_pieces_weights_are_made_at_a_time() -> None:
    model = module("Llama", num_hidden_layers=2)
    asked: list[str] = []

    class Watched(ModuleSource):
        def tensor(self, name: str) -> torch.Tensor:
            asked.append(name)
            return super().tensor(name)

    program = program_of(model)
    groups = find_groups(program, find_linears(program, QuantSpec("rtn", "int4", 32)))
    at: list[int] = []

    def choose(_: Group, weights: list[torch.Tensor], __: Statistics) -> list[torch.Tensor]:
        at.append(len(asked))
        return weights

    calibrate(program, groups, SAMPLES, Watched(model), choose)
    layer_of = [name.split(".")[2] for name in asked if ".layers." in name]
    assert layer_of == sorted(layer_of), "a layer was read before the one ahead of it was done"
    assert "lm_head.weight" not in asked, "nothing after the last group is run"
    assert at == sorted(at)


def test_progress_names_each_group() -> None:
    seen: list[tuple[str, int, int]] = []
    collect(module("Llama"), progress=lambda *step: seen.append(step))
    assert [done for _, done, _ in seen] == list(range(9))
    assert all(total == 8 for _, _, total in seen)
    assert "model.layers.0.self_attn.o_proj" in seen[1][0]


def test_activations_that_are_not_finite_name_the_layer() -> None:
    model = module("Llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = float("inf")
    with pytest.raises(SmeltError, match=r"layers\.1\.self_attn\.q_proj.*NaN or infinite"):
        collect(model)


def test_sequences_beyond_the_models_context_are_cut() -> None:
    model = module("GPT2", n_positions=32)
    program = program_of(model)
    groups = find_groups(program, find_linears(program, QuantSpec("rtn", "int4", 32)))
    seen: list[int] = []

    def choose(_: Group, weights: list[torch.Tensor], statistics: Statistics) -> list[torch.Tensor]:
        seen.append(statistics.tokens)
        return weights

    calibrate(program, groups, random_ids(2, 50), ModuleSource(model), choose)
    assert set(seen) == {64}
