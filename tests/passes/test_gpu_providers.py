"""choose-providers for CUDA: Triton kernels, run here by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from helpers.check_pass import check_pass
from helpers.quantized import module, program_of
from helpers.tiny import Subject, after, tiny_program

from smelt.compiler.manager import PassManager
from smelt.compiler.pipeline import PipelineConfig, pipeline, portable_stages
from smelt.compiler.quantization import METHODS, stage_for
from smelt.compiler.weights import ModuleSource
from smelt.passes.attention.kv_cache import InsertKvCache
from smelt.passes.attention.logits_rows import KeepLogitsRows
from smelt.passes.layouts import INVERSES
from smelt.passes.providers import ChooseProviders
from smelt.passes.quantize.spec import QuantSpec
from smelt.runtime.errors import UserError

SPECS = {
    "int4": QuantSpec("rtn", "int4", 32),
    "int8": QuantSpec("rtn", "int8"),
    "w8a8": QuantSpec("smoothquant", alpha=0.0),
    "fp8": QuantSpec("fp8"),
    "fp8-blocks": QuantSpec("fp8", group_size=128),
    "fp8-weights": QuantSpec("rtn", "fp8"),
}
OPERATORS = {
    "int4": "linear_int4",
    "int8": "linear_int8",
    "w8a8": "linear_w8a8",
    "fp8": "linear_fp8",
    "fp8-blocks": "linear_fp8",
    "fp8-weights": "linear_fp8",
}


def quantized(name: str, kv_cache: str = "auto") -> Subject:
    """The tiny Llama up to its provider, for CUDA."""
    subject = tiny_program("llama")
    stage = stage_for(SPECS[name]) if name != "none" else None
    stages = portable_stages(pipeline(PipelineConfig("O2", stage, kv_cache=kv_cache)))[0]
    PassManager(stages).run(subject.program)
    subject.program.target = "cuda"
    return subject


@pytest.mark.parametrize("name", list(SPECS))
def test_quantized_linears_become_triton_kernels(name: str) -> None:
    subject = quantized(name)
    operator = OPERATORS[name]
    count = len(subject.program.calls(getattr(torch.ops.smelt, operator).default))
    assert count
    kernel = "linear_fp8_weight_triton" if name == "fp8-weights" else f"{operator}_triton"
    found = check_pass(
        subject,
        ChooseProviders(),
        before={f"smelt.{operator}": count},
        after={f"smelt.{operator}": 0, f"smelt.{kernel}": count},
        tolerance=2e-3,
    )
    notes = [note for note in found.record["notes"] if note["operator"] == operator]
    assert {note["provider"] for note in notes} == {"triton"}


def test_linears_over_one_input_quantize_it_once() -> None:
    program = check_pass(
        quantized("w8a8"), ChooseProviders(), before={}, after={}, tolerance=2e-3
    ).program
    assert len(program.calls(torch.ops.smelt.quantize_int8_triton.default)) == len(
        {node.args[0] for node in program.calls(torch.ops.smelt.linear_w8a8_triton.default)}
    )


def test_the_tiled_layout_can_be_turned_back() -> None:
    subject = quantized("int4")
    found = check_pass(subject, ChooseProviders(), before={}, after={}, tolerance=2e-3)
    plan = found.program.weights
    steps = [step for step in plan.steps if step.op == "lay_out_int4"]
    assert steps
    values = dict(plan.materialize([*steps[0].inputs, *steps[0].outputs], subject.source))
    back = INVERSES["lay_out_int4"](*(values[n] for n in steps[0].outputs), **steps[0].args)
    for original, restored in zip(steps[0].inputs, back, strict=True):
        assert torch.equal(values[original], restored)


@pytest.mark.parametrize("kv_cache", ["auto", "int8", "int4", "fp8"])
def test_attention_writes_and_attends_in_two_kernels(kv_cache: str) -> None:
    name = "cached_attention" if kv_cache == "auto" else "cached_attention_quantized"
    found = check_pass(
        quantized("none", kv_cache),
        ChooseProviders(),
        before={f"smelt.{name}": 2},
        after={
            f"smelt.{name}": 0,
            "smelt.rope_write_triton": 2,
            "smelt.paged_attention_triton": 2,
        },
        # A last bit of a key may round to the next of 16 values.
        tolerance=1e-2 if kv_cache == "int4" else 2e-3,
    )
    (note, *_) = [n for n in found.record["notes"] if n["operator"] == name]
    assert note["provider"] == "triton" and "flash-decoding" in note["reason"]


def mixture(spec: QuantSpec | None) -> Subject:
    model = module("Mixtral", num_hidden_layers=1, num_local_experts=3)
    subject = Subject(program_of(model), ModuleSource(model), torch.arange(11))
    if spec is not None:
        METHODS[spec.method]().run(subject.program, stage_for(spec).options)
    subject = after(subject, KeepLogitsRows(), InsertKvCache())
    subject.program.target = "cuda"
    return subject


@pytest.mark.parametrize(
    ("spec", "kernel"),
    [(None, "experts_triton"), (QuantSpec("rtn", "int4", 32), "experts_int4_triton")],
)
def test_experts_become_grouped_products(spec: QuantSpec | None, kernel: str) -> None:
    check_pass(
        mixture(spec),
        ChooseProviders(),
        before={},
        after={f"smelt.{kernel}": 1, "smelt.experts": 0, "smelt.experts_quantized": 0},
        tolerance=2e-3,
    )


def test_experts_without_a_kernel_go_to_the_reference() -> None:
    subject = mixture(QuantSpec("rtn", "int8"))
    result = ChooseProviders().run(subject.program, ChooseProviders.options({}))
    (note,) = [n for n in result.notes if n["operator"] == "experts_quantized"]
    assert note["provider"] == "reference" and "int8 have no Triton kernel" in note["reason"]


def test_groups_that_no_kernel_has_are_dequantized_in_the_graph() -> None:
    subject = tiny_program("llama")
    stages = pipeline(PipelineConfig("O2", stage_for(QuantSpec("rtn", "int4", 16))))
    PassManager(portable_stages(stages)[0]).run(subject.program)
    subject.program.target = "cuda"
    count = len(subject.program.calls(torch.ops.smelt.linear_int4.default))
    found = check_pass(
        subject,
        ChooseProviders(),
        before={"smelt.linear_int4": count},
        after={"smelt.linear_int4": 0, "linear_grouped": count},
        tolerance=2e-3,
    )
    (note, *_) = [n for n in found.record["notes"] if n["operator"] == "linear_int4"]
    assert note["provider"] == "inductor" and "groups of 16 features" in note["reason"]


def test_what_no_kernel_takes_is_not_overridden_in_silence() -> None:
    subject = mixture(QuantSpec("rtn", "int8"))
    options = ChooseProviders.options({"overrides": (("experts_quantized", "triton"),)})
    with pytest.raises(UserError, match="experts of int8 have no Triton kernel"):
        ChooseProviders().run(subject.program, options)


def test_norms_and_gates_are_triton_where_they_are_asked_to_be() -> None:
    subject = quantized("none")
    overrides = (("rms_norm", "triton"), ("gated_activation", "triton"))
    norms = len(subject.program.calls(torch.ops.smelt.rms_norm.default))
    check_pass(
        subject,
        ChooseProviders(),
        before={"smelt.rms_norm": norms, "smelt.gated_activation": 2},
        after={"smelt.add_rms_norm_triton": norms, "smelt.gated_activation_triton": 2},
        options={"overrides": overrides},
        tolerance=2e-3,
    )


def test_on_the_cpu_a_triton_kernel_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    from smelt.runtime.kernels.gpu import operators

    subject = quantized("none")
    subject.program.target = "cpu"
    monkeypatch.setattr(operators, "INTERPRETED", False)
    options = ChooseProviders.options({"overrides": (("rms_norm", "triton"),)})
    with pytest.raises(UserError, match="is for --device cuda"):
        ChooseProviders().run(subject.program, options)
