"""Calibration: statistics of the true inputs, error passed on, one piece's weights at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers.quantized import module, program_of, random_ids

from smelt.compiler.weights import ModuleSource
from smelt.passes.quantize.calibrate import (
    CalibrationOptions,
    Statistics,
    calibrate,
)
from smelt.passes.quantize.graph_run import Replacement
from smelt.passes.quantize.groups import Group, find_groups
from smelt.passes.quantize.linears import find_linears
from smelt.passes.quantize.spec import QuantSpec
from smelt.runtime.errors import SmeltError

SAMPLES = random_ids(3, 17) + random_ids(1, 9, seed=5)


@dataclass(frozen=True)
class Kept:
    """What `Plain` finds: nothing but the order in which it was asked."""

    number: int


class Plain:
    """A method that keeps the statistics it is shown; linears go on with their weight x scale."""

    found = Kept
    whole_gram = False
    original = False

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.seen: dict[str, Statistics] = {}

    def __repr__(self) -> str:
        return f"Plain({self.scale})"

    def search(
        self, group: Group, weights: Sequence[torch.Tensor], statistics: Statistics
    ) -> list[Kept]:
        self.seen[group.linears[0].layer] = statistics
        return [Kept(len(self.seen)) for _ in weights]

    def go_on(
        self, group: Group, weights: Sequence[torch.Tensor], found: Sequence[Kept]
    ) -> Sequence[Replacement]:
        return [weight * self.scale for weight in weights]


def calibrated(
    model: torch.nn.Module, method: Plain, source: ModuleSource | None = None, **options: Any
) -> dict[str, Kept]:
    program = program_of(model)
    groups = find_groups(program, find_linears(program, QuantSpec("rtn", "int4", 32)))
    given = {"samples": SAMPLES, "source": source or ModuleSource(model)} | options
    return calibrate(program, groups, method, CalibrationOptions(**given))


def collect(model: torch.nn.Module, scale: float = 1.0, **options: Any) -> dict[str, Statistics]:
    """Run calibration; every weight goes on multiplied by `scale`."""
    method = Plain(scale)
    calibrated(model, method, **options)
    return method.seen


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
    biased: list[bool] = []

    def product(weight: torch.Tensor) -> Replacement:
        def apply(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            biased.append(bias is not None)
            return torch.nn.functional.linear(x, weight, bias)

        return apply

    class Products(Plain):
        def go_on(
            self, group: Group, weights: Sequence[torch.Tensor], found: Sequence[Kept]
        ) -> list[Replacement]:
            return [product(weight) for weight in weights]

    method = Products()
    calibrated(model, method)
    assert True in biased and False in biased, "qkv has a bias, the others have none"
    for layer, statistics in plain.items():
        assert torch.equal(method.seen[layer].rows, statistics.rows), layer


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

    at: list[int] = []

    class Noting(Plain):
        def search(
            self, group: Group, weights: Sequence[torch.Tensor], statistics: Statistics
        ) -> list[Kept]:
            at.append(len(asked))
            return super().search(group, weights, statistics)

    calibrated(model, Noting(), Watched(model))
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
    found = collect(module("GPT2", n_positions=32), samples=random_ids(2, 50))
    assert {statistics.tokens for statistics in found.values()} == {64}


def test_an_interrupted_calibration_goes_on_where_it_was() -> None:
    model = module("Llama")
    journals: dict[str, dict[str, Any]] = {}

    def opened(digest: str) -> dict[str, Any]:
        return journals.setdefault(digest, {})

    class Interrupted(Plain):
        def search(
            self, group: Group, weights: Sequence[torch.Tensor], statistics: Statistics
        ) -> list[Kept]:
            if len(self.seen) == 3:
                raise KeyboardInterrupt
            return super().search(group, weights, statistics)

    with pytest.raises(KeyboardInterrupt):
        calibrated(model, Interrupted(0.9), journal=opened)
    (journal,) = journals.values()
    assert len(journal) == 3
    whole, rest = Plain(0.9), Plain(0.9)
    calibrated(model, whole)
    found = calibrated(model, rest, journal=opened)
    assert list(rest.seen) == list(whole.seen)[3:], "only what was missing is searched"
    for layer, statistics in rest.seen.items():
        assert torch.equal(statistics.rows, whole.seen[layer].rows), "it saw other activations"
    assert [each.number for each in found.values()] == [1, 2, 3, 1, 2, 3, 4, 5]
    assert len(journal) == 8 and len(journals) == 1
    again = Plain(0.9)
    assert calibrated(model, again, journal=opened) == found and not again.seen


def test_a_journal_belongs_to_one_program_samples_and_settings() -> None:
    model, keys = module("Llama"), []

    def opened(digest: str) -> dict[str, Any]:
        keys.append(digest)
        return {}

    calibrated(model, Plain(0.9), journal=opened)
    calibrated(model, Plain(0.9), journal=opened)
    assert keys[0] == keys[1]
    calibrated(model, Plain(0.8), journal=opened)
    calibrated(model, Plain(0.9), journal=opened, samples=SAMPLES[:-1])
    calibrated(model, Plain(0.9), journal=opened, seed=1)
    calibrated(module("Llama", rms_norm_eps=1e-3), Plain(0.9), journal=opened)
    assert len(set(keys)) == 5
