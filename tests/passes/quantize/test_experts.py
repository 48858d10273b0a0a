"""Layers of experts: every method quantizes every expert, by the tokens that each one saw."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from helpers.check_pass import check_pass
from helpers.quantized import (
    BASE,
    logits,
    module,
    program_of,
    random_ids,
    score,
    weights_of,
)
from helpers.tiny import Subject

from smelt.compiler.quantization import METHODS, stage_for
from smelt.compiler.weights import ModuleSource
from smelt.passes.base import PassResult
from smelt.passes.dialect import verify
from smelt.passes.program import Dialect, Program
from smelt.passes.quantize import QuantizeGptq, QuantSpec
from smelt.passes.quantize.awq import EXPERTS_REMARK, Awq
from smelt.passes.quantize.calibrate import CalibrationOptions
from smelt.passes.quantize.expert_layers import ExpertLayers, least_tokens
from smelt.passes.quantize.experts import check_scales, find_experts
from smelt.passes.quantize.formats import fake_quantize
from smelt.passes.quantize.gptq import Gptq, GptqOptions
from smelt.passes.quantize.spec import Scheme
from smelt.runtime.errors import SmeltError

smelt = torch.ops.smelt
EXPERTS, TOP = 4, 2
LAYER = "model.layers.0.mlp.experts"
SPECS = {
    "rtn-int2": QuantSpec("rtn", "int2", 16),
    "rtn-int8": QuantSpec("rtn", "int8"),
    "rtn-fp8": QuantSpec("rtn", "fp8"),
    "awq-int4": QuantSpec("awq", "int4", 32),
    "gptq-int3": QuantSpec("gptq", "int3", 32),
    "mixed-int4": QuantSpec("mixed", bits=4.5),
    "mixed-int8": QuantSpec("mixed", bits=9.0),
    "smoothquant": QuantSpec("smoothquant"),
    "smoothquant-plain": QuantSpec("smoothquant", alpha=0.0),
    "fp8": QuantSpec("fp8"),
    "fp8-blocks": QuantSpec("fp8", group_size=128),
    "fp8-static": QuantSpec("fp8", activations="static"),
}
Model = torch.nn.Module


@functools.cache
def model(name: str = "Mixtral", layers: int = 1) -> Model:
    sizes = {"num_hidden_layers": layers, "num_experts_per_tok": TOP}
    if name == "Mixtral":
        return module(name, num_local_experts=EXPERTS, **sizes)
    return module(name, num_experts=EXPERTS, moe_intermediate_size=48, head_dim=16, **sizes)


def samples() -> list[list[int]]:
    return random_ids(8, 64, seed=3)


def quantize(program: Program, source: Any, spec: QuantSpec, **options: Any) -> PassResult:
    stage = stage_for(spec, samples() if spec.needs_calibration else (), source)
    given = type(stage.options)(**{**vars(stage.options), **options})
    result = stage.pass_.run(program, given)
    assert result is not None
    program.dialect = Dialect.QUANTIZED
    verify(program)
    return result


def note_of(result: PassResult, layer: str = LAYER) -> dict[str, Any]:
    (note,) = [note for note in result.notes if note.get("layer") == layer]
    return note


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
@pytest.mark.parametrize("name", list(SPECS))
def test_every_method_leaves_only_the_router(family: str, name: str) -> None:
    spec = SPECS[name]
    program, source = program_of(model(family)), ModuleSource(model(family))
    text = random_ids(3, 24)
    before = logits(program, source, text)
    result = quantize(program, source, spec)
    assert not program.calls(smelt.experts.default)
    (node,) = program.calls(smelt.experts_quantized.default)
    assert node.args[9:] == (
        "silu",
        name.split("-")[1] if spec.method == "mixed" else spec.format,
        EXPERTS,
        spec.group_size if name == "fp8-blocks" else 0,
    )
    summary = result.notes[-1]
    assert summary["experts_quantized"] == 1
    assert set(summary["left"]) == {"embeddings", "lm_head", "router", "norms and biases"}
    assert summary["parameters"] == sum(p.numel() for p in model(family).parameters())
    weights = weights_of(program, source)
    names = [program.weight_name(arg) for arg in node.args[3:9] if arg is not None]
    assert all(
        not weights[str(n)].dtype.is_floating_point or "fp8" in name or n.endswith("scales")
        for n in names
    )
    assert score(logits(program, source, text), before, text).kl < (0.5 if "int2" in name else 0.05)


def test_rounding_is_what_one_would_do_by_hand() -> None:
    mine = module("Mixtral", num_hidden_layers=1, num_local_experts=EXPERTS)
    program, source = program_of(mine), ModuleSource(mine)
    quantize(program, source, QuantSpec("rtn", "int4", 32))
    text = random_ids(2, 20)
    found = logits(program, source, text)
    scheme = Scheme("int4", 32)
    with torch.no_grad():
        for linear in mine.modules():
            if isinstance(linear, torch.nn.Linear) and linear is not mine.lm_head:
                linear.weight.copy_(fake_quantize(linear.weight, scheme))
        experts = mine.model.layers[0].mlp.experts
        for weight in [*experts.gate_up_proj, *experts.down_proj]:
            weight.copy_(fake_quantize(weight, scheme))
        for row, sequence in zip(found, text, strict=True):
            want = mine(torch.tensor([sequence])).logits[0]
            torch.testing.assert_close(row, want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
def test_the_pass_keeps_its_promises(method: str) -> None:
    ids = torch.tensor(random_ids(1, 24)[0])
    subject = Subject(program_of(model()), ModuleSource(model()), ids)
    options: dict[str, Any] = {"spec": QuantSpec(method, "int4", 32)}
    if method != "rtn":
        options |= {"samples": samples(), "source": subject.source}
    check_pass(
        subject,
        METHODS[method](),
        before={"smelt.experts": 1, "smelt.experts_quantized": 0},
        after={"smelt.experts": 0, "smelt.experts_quantized": 1},
        # q, k, v, o, router and head; the experts.
        matched=7,
        rewritten=5,
        declined=["router", "lm_head"],
        options=options,
        fewer=True,
        golden=f"quantize-{method}_experts",
    )


def routed_tokens(program: Program, source: Any) -> list[int]:
    """How many calibration tokens each expert of the first layer gets, before quantization."""
    node = program.calls(smelt.experts.default)[0]
    output = next(n for n in program.graph.nodes if n.op == "output")
    output.args = ((node.args[1],),)
    program.clean()
    weights = weights_of(program, source)
    counts = torch.zeros(EXPERTS, dtype=torch.int64)
    for sample in samples():
        ids = torch.tensor(sample)
        given = {"input_ids": ids, "position_ids": torch.arange(len(ids))}
        (index,) = program.run(given, weights)
        counts += torch.bincount(index.flatten(), minlength=EXPERTS)
    return counts.tolist()


def test_tokens_are_counted_and_few_of_them_mean_rounding() -> None:
    """fp8 moves attention's output too little for a token to change its expert."""
    source = ModuleSource(model())
    counts = routed_tokens(program_of(model()), source)
    assert sum(counts) == TOP * sum(map(len, samples())) and len(set(counts)) == EXPERTS
    found = note_of(quantize(program_of(model()), source, SPECS["fp8-static"]))["tokens_per_expert"]
    assert max(abs(a - b) for a, b in zip(found, counts, strict=True)) <= 4

    spec = QuantSpec("gptq", "int4", 32)
    counts = note_of(quantize(program_of(model()), source, spec))["tokens_per_expert"]
    few = sorted(counts)[1] + 1  # two experts have fewer
    program = program_of(model())
    note = note_of(quantize(program, source, spec, min_expert_tokens=few))
    rounded = [e for e, count in enumerate(counts) if count < few]
    assert note["experts_rounded"] == rounded and len(rounded) == 2
    listed = ", ".join(map(str, rounded))
    assert note["reason"] == f"experts {listed} saw fewer than {few} tokens: rounded to nearest"

    plain = program_of(model())
    quantize(plain, source, QuantSpec("rtn", "int4", 32))
    for field in ("gate_up_proj.qweight", "down_proj.qweight"):
        one = weights_of(program, source)[f"{LAYER}.{field}"].chunk(EXPERTS)
        other = weights_of(plain, source)[f"{LAYER}.{field}"].chunk(EXPERTS)
        same = [e for e in range(EXPERTS) if torch.equal(one[e], other[e])]
        assert same == rounded


def test_the_fewest_tokens_grow_with_the_width() -> None:
    assert [least_tokens(k) for k in (16, 128, 2048, 4096)] == [32, 32, 512, 1024]
    program = program_of(model())
    note = note_of(quantize(program, ModuleSource(model()), QuantSpec("awq", "int4", 32)))
    assert min(note["tokens_per_expert"]) >= 32 and "experts_rounded" not in note


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_an_expert_without_a_token_is_rounded(method: str) -> None:
    program = program_of(model())
    search = Awq() if method == "awq" else Gptq()
    found = find_experts(program, QuantSpec(method, "int4", 32))
    options = CalibrationOptions(min_expert_tokens=0)
    layers = ExpertLayers(program, found, method, search, options)
    (experts,) = layers.found
    index = torch.zeros(50, 1, dtype=torch.int64)
    weights = [torch.randn(EXPERTS, 192, 64), torch.randn(EXPERTS, 64, 96)]

    def find(group: Any, given: Any, look: Any) -> Any:
        found = search.search(group, given, look())
        return found, search.go_on(group, given, found)

    gate_up, down = layers.search(experts, torch.randn(50, 64), index, weights, find)
    scheme = Scheme("int4", 32)
    for e in range(EXPERTS):
        plain = fake_quantize(weights[0][e], scheme)
        assert torch.equal(gate_up[e], plain) == (e != 0)
    assert torch.isfinite(down).all()
    verdict = layers.rewrite(experts)
    assert verdict.tokens_per_expert == [50, 0, 0, 0]
    assert verdict.experts_rounded == [1, 2, 3]


@pytest.mark.parametrize("name", ["awq-int4", "gptq-int3"])
def test_searching_loses_less_than_rounding(name: str) -> None:
    spec, source = SPECS[name], ModuleSource(model())
    note = note_of(quantize(program_of(model()), source, spec))
    assert 0 < note["error"] < 0.9 * note["error_rtn"]


def test_awq_folds_the_scale_of_down_into_the_rows_of_up() -> None:
    mine = module("Mixtral", num_hidden_layers=1, num_local_experts=EXPERTS)
    with torch.no_grad():
        mine.model.layers[0].mlp.experts.gate_up_proj[:, 96:99] *= 20  # three loud hidden features
    program, source = program_of(mine), ModuleSource(mine)
    result = quantize(program, source, QuantSpec("awq", "int4", 32))
    assert note_of(result)["reason"] == EXPERTS_REMARK
    rows = program.weights.computed[f"{LAYER}.gate_up_proj.rows"]
    columns = program.weights.computed[f"{LAYER}.down_proj.columns"]
    assert (rows[:, :96] == 1).all(), "the gate is not linear"
    assert torch.equal(rows[:, 96:], columns)
    assert (columns[:, :3].amin(1) > columns[:, 3:].median(1).values).all()


@pytest.mark.parametrize("name", ["awq-int4", "gptq-int3", "fp8-static"])
def test_later_layers_see_what_earlier_experts_lost(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a layer was searched on is what the quantized program computes there."""
    seen: dict[str, torch.Tensor] = {}
    search = ExpertLayers.search

    def spy(self: Any, experts: Any, x: torch.Tensor, *rest: Any) -> Any:
        seen[experts.layer] = x
        return search(self, experts, x, *rest)

    monkeypatch.setattr(ExpertLayers, "search", spy)
    program, source = program_of(model(layers=2)), ModuleSource(model(layers=2))
    quantize(program, source, SPECS[name])
    plain = inputs_of(program_of(model(layers=2)), source, smelt.experts.default)
    mine = inputs_of(program, source, smelt.experts_quantized.default)
    want = seen["model.layers.1.mlp.experts"]
    # AWQ divides up's rows once more than the calibration did, and rounds the scales again.
    assert (mine - want).norm() < (0.4 if "awq" in name else 0.02) * (plain - want).norm()


def inputs_of(program: Program, source: Any, operator: Any) -> torch.Tensor:
    """What the second layer of experts reads, over all samples."""
    output = next(n for n in program.graph.nodes if n.op == "output")
    output.args = ((program.calls(operator)[1].args[0],),)
    program.clean()
    weights = weights_of(program, source)
    found = []
    for sample in samples():
        ids = torch.tensor(sample)
        given = {"input_ids": ids, "position_ids": torch.arange(len(ids))}
        found.append(program.run(given, weights)[0])
    return torch.cat(found)


def test_results_are_recalled_from_the_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    source, spec = ModuleSource(model()), QuantSpec("gptq", "int4", 32)
    kept: dict[str, dict[str, Any]] = {}
    options = {"journal": lambda _: kept, "min_expert_tokens": 130}
    first = program_of(model())
    quantize(first, source, spec, **options)
    assert f"{LAYER}.1.down" in kept
    monkeypatch.setattr(Gptq, "search", None)  # would fail
    second = program_of(model())
    quantize(second, source, spec, **options)
    assert first.weights.digest() == second.weights.digest()


def broken(matrix: str, value: float) -> Model:
    mine = module("Mixtral", num_hidden_layers=1, num_local_experts=EXPERTS)
    with torch.no_grad():
        getattr(mine.model.layers[0].mlp.experts, matrix)[2, 3, 4] = value
    return mine


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("matrix", ["gate_up_proj", "down_proj"])
def test_a_weight_that_is_not_finite_names_layer_and_expert(matrix: str, value: float) -> None:
    mine = broken(matrix, value)
    program, source = program_of(mine), ModuleSource(mine)
    quantize(program, source, QuantSpec("rtn", "int4", 32))
    name = f"{LAYER}.2.{matrix.removesuffix('_proj')}"
    with pytest.raises(SmeltError, match=rf"{name}: 1 of its \d+ weights are NaN or infinite"):
        weights_of(program, source)


@pytest.mark.parametrize("name", ["awq-int4", "gptq-int3", "fp8-static", "smoothquant"])
def test_calibration_stops_at_the_expert(name: str) -> None:
    mine = broken("down_proj", float("nan"))
    with pytest.raises(SmeltError, match=rf"{LAYER}\.2\.down: 1 of its"):
        quantize(program_of(mine), ModuleSource(mine), SPECS[name])


def test_a_scale_that_is_not_finite_names_layer_and_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (float("nan"), float("inf"), 0.0):
        scales = torch.ones(4, 2)
        scales[1, 1] = value
        with pytest.raises(SmeltError, match=r"experts\.7\.down: 1 of its 8 scales are NaN"):
            check_scales(scales, "experts.7.down")
    search = Gptq.search

    def spoiled(self: Gptq, group: Any, *rest: Any) -> Any:
        found = search(self, group, *rest)
        if group.linears[0].layer == f"{LAYER}.1.gate_up":
            found[0].scales[0, 0] = float("inf")
        return found

    monkeypatch.setattr(Gptq, "search", spoiled)
    with pytest.raises(SmeltError, match=rf"{LAYER}\.1\.gate_up: a scale found for it is NaN"):
        quantize(program_of(model()), ModuleSource(model()), QuantSpec("gptq", "int4", 32))


def test_activations_that_are_not_finite_name_the_layer() -> None:
    mine = module("Mixtral", num_hidden_layers=1, num_local_experts=EXPERTS)
    with torch.no_grad():
        mine.model.layers[0].post_attention_layernorm.weight[:] = float("nan")
    with pytest.raises(SmeltError, match=rf"{LAYER}: calibration activations are NaN"):
        quantize(program_of(mine), ModuleSource(mine), QuantSpec("gptq", "int4", 32))


def test_what_is_left_says_why() -> None:
    program = program_of(model())
    result = quantize(program, ModuleSource(model()), QuantSpec("rtn", "int4", 32, min_features=80))
    assert note_of(result)["reason"] == "too small (192 x 64)"
    assert "experts (too small (192 x 64))" in result.notes[-1]["summary"]
    assert result.notes[-1]["experts_quantized"] == 0
    assert (LAYER, "too small (192 x 64)") in result.declined

    node = program.calls(smelt.experts.default)[0]
    with program.graph.inserting_after(node):
        program.call(torch.ops.aten.neg.default, (node.args[3],), like=node)
    (experts,) = find_experts(program, QuantSpec("rtn"))
    assert experts.reason == "its weights are read in several places"
    assert experts.parameters == 3 * EXPERTS * BASE["hidden_size"] * BASE["intermediate_size"]


def test_groups_that_do_not_fit_are_whole_rows_and_said_so() -> None:
    mine = module("Mixtral", num_hidden_layers=1, num_local_experts=EXPERTS, intermediate_size=88)
    program, source = program_of(mine), ModuleSource(mine)
    result = quantize(program, source, QuantSpec("rtn", "int4", 32))
    want = "down has K = 88, not divisible by 32: one group a row"
    assert note_of(result)["reason"] == want
    assert weights_of(program, source)[f"{LAYER}.down_proj.scales"].shape == (EXPERTS * 64, 1)


def test_gptq_counts_experts_among_what_it_expects() -> None:
    program = program_of(model("Qwen3Moe"))
    counts = program.facts.module_counts
    assert QuantizeGptq().expect(program) == counts["linear"] + 1
    assert isinstance(GptqOptions().min_expert_tokens, type(None))
