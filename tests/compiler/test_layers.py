"""What `smelt plan` says of layers is what compiling does with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.mixtures import mixture
from helpers.quantized import module, program_of

from smelt.compiler.layers import kinds, layers
from smelt.compiler.manager import PassManager
from smelt.compiler.pipeline import PipelineConfig, pipeline
from smelt.compiler.quantization import stage_for
from smelt.models.quantized import Inputs, Quantization, Rule, WeightForm
from smelt.passes.quantize import QuantSpec

NONE = QuantSpec()


def planned(model: Any, spec: QuantSpec, stored: Quantization | None = None) -> list[Any]:
    return kinds(layers(model, spec, stored), "cpu")


@pytest.mark.parametrize(
    "spec",
    [
        NONE,
        QuantSpec("rtn", "int4", 32),
        QuantSpec("rtn", "int3", 64),
        QuantSpec("rtn", "fp8"),
        QuantSpec("smoothquant", alpha=0.0),
        QuantSpec("fp8", group_size=128),
    ],
    ids=QuantSpec.label,
)
def test_the_plan_and_the_compiler_name_the_same_kernels(spec: QuantSpec) -> None:
    model = module("Llama")
    program = program_of(model)
    stage = stage_for(spec) if spec.method != "none" else None
    stages = pipeline(PipelineConfig(quantize=stage))
    names = [s.pass_.name for s in stages]
    PassManager(stages[names.index("keep-logits-rows") - (stage is not None) :]).run(program)
    notes = [n for n in program.notes("choose-providers") if n["operator"].startswith("linear")]
    said = ("operator", "provider", "reason", "limit")
    chosen = {tuple(note.get(key) for key in said) for note in notes}
    assert {tuple(getattr(kind, key) for key in said) for kind in planned(model, spec)} == chosen


def test_layers_that_are_alike_are_one_line() -> None:
    attention, ends, down, _ = planned(module("Llama"), QuantSpec("awq", "int4", 64))
    assert (attention.layers, attention.count, attention.format) == (
        "model.layers.*.self_attn.q_proj+k_proj+v_proj+o_proj",
        8,
        "int4 g64",
    )
    assert ends.layers == "model.layers.*.mlp.gate_proj+up_proj" and ends.note is None
    assert down.layers == "model.layers.*.mlp.down_proj"
    assert down.note == "K = 96 is not divisible by 64: one group a row"


def test_what_stays_at_16_bits_says_why() -> None:
    *_, head = planned(module("Llama"), QuantSpec("rtn", "int8"))
    assert (head.layers, head.format, head.note) == ("lm_head", "16 bit", "lm_head")


def test_experts_and_mixed_formats_are_told() -> None:
    *_, experts = planned(module("Mixtral"), QuantSpec("smoothquant"))
    assert (experts.operator, experts.provider, experts.count) == ("experts_quantized", "cpu", 4)
    assert experts.format == "int8", "their inputs stay as they are"
    first = planned(module("Llama"), QuantSpec("mixed", bits=3.5))[0]
    assert first.format == "mixed" and "3.5 bits a weight" in (first.note or "")
    found = layers(module("Llama"), QuantSpec("mixed", bits=4.0))
    quantized = [layer for layer in found if layer.scheme]
    assert sum(x.packed_bytes for x in quantized) * 8 == sum(x.bytes for x in quantized)


def test_a_quantized_checkpoint_says_what_is_kept() -> None:
    form = WeightForm("plain", 8, "float", rows=16, group=32, symmetric=True)
    stored = Quantization("compressed-tensors", (Rule(("Linear",), form),), ("lm_head",))
    first = planned(module("Llama"), NONE, stored)[0]
    assert first.format == "16 bit"
    assert first.note == "no operator yet for float8 with scales of 16 x 32 weights: dequantized"
    form = WeightForm("plain", 8, "float", rows=32, group=32, symmetric=True)
    stored = Quantization("compressed-tensors", (Rule(("Linear",), form),), ("lm_head",))
    model = module("Llama")
    found = layers(model, NONE, stored)
    assert {layer.scheme.label() for layer in found if layer.scheme} == {"fp8 32 x 32"}
    weight = torch.nn.Linear(64, 96).weight
    up = next(layer for layer in found if layer.name == "model.layers.0.mlp.up_proj")
    assert up.saved == weight.numel() * 4 - (96 * 64 + 4 * 3 * 2)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_kept_experts_are_told_with_their_format(family: str) -> None:
    form = WeightForm("awq", 4, group=32)
    stored = Quantization("awq", (Rule(("Linear",), form),))
    *_, experts = planned(mixture(family), NONE, stored)
    assert (experts.layers, experts.count) == (
        "model.layers.*.mlp.experts",
        2,
    )
    assert (experts.format, experts.operator) == ("int4 g32", "experts_quantized")
    assert (experts.provider, experts.note) == ("cpu", None)
    inputs = Inputs("int", 8, True, "token")
    form = WeightForm("plain", 8, symmetric=True, inputs=inputs)
    *_, experts = planned(mixture(family), NONE, Quantization("x", (Rule(("Linear",), form),)))
    assert experts.format == "int8"
    assert (experts.note or "").endswith("the operator of experts rounds none")


@pytest.mark.parametrize(
    ("form", "told"),
    [
        (WeightForm("block", 8, "float", 128, 128, symmetric=True), "fp8 32 x 32"),
        (WeightForm("block", 8, "float", 8, 8, symmetric=True), "a block of 8 scales reaches"),
        (WeightForm("gptq", 8, group=32), "no operator yet for 8 bits with zero points"),
        (WeightForm("gptq", 4, group=64), "its groups have different sizes"),
        (WeightForm("gptq", 4, group=8), "kernels read features 16 at a time"),
    ],
)
def test_experts_that_need_another_form(form: WeightForm, told: str) -> None:
    stored = Quantization("x", (Rule(("Linear",), form),))
    *_, experts = planned(mixture(), NONE, stored)
    if told.startswith("fp8"):
        assert (experts.format, experts.note) == (told, None)
    else:
        assert experts.format == "16 bit"
        assert (experts.note or "").startswith(told)
        assert (experts.note or "").endswith(": dequantized")


def test_matrices_of_experts_in_different_formats_are_told() -> None:
    rules = (
        Rule(("re:.*w2$",), WeightForm("packed", 8, symmetric=True)),
        Rule(("Linear",), WeightForm("packed", 4, group=32)),
    )
    *_, experts = planned(mixture(), NONE, Quantization("x", rules))
    assert experts.note == "its matrices are stored in different formats: dequantized"
    rules = (Rule(("re:.*w3$",), rules[0].form), rules[1])
    *_, experts = planned(mixture(), NONE, Quantization("x", rules))
    assert experts.note == "the checkpoint announces no one form for its experts: dequantized"
