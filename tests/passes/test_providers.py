"""choose-providers: every operator gets a kernel, with a reason, and weights get its layout."""

from __future__ import annotations

import pytest
import torch
from helpers.check_pass import check_pass
from helpers.quantized import module
from helpers.quantized import program_of as program_to_quantize
from helpers.tiny import (
    Subject,
    Toy,
    after,
    program_of,
    tiny_lowered,
    tiny_program,
)
from torch import nn

from smelt.compiler.manager import PassManager, Stage
from smelt.compiler.pipeline import PipelineConfig, pipeline, portable_stages
from smelt.compiler.quantization import METHODS, stage_for
from smelt.compiler.weights import ModuleSource
from smelt.passes.attention.kv_cache import InsertKvCache
from smelt.passes.attention.logits_rows import KeepLogitsRows
from smelt.passes.layouts import INVERSES
from smelt.passes.program import Dialect
from smelt.passes.providers import ChooseProviders
from smelt.passes.quantize import (
    Fp8Options,
    QuantizeFp8,
    QuantizeRtn,
    QuantizeSmoothQuant,
    RtnOptions,
    SmoothQuantOptions,
)
from smelt.passes.quantize.spec import QuantSpec
from smelt.passes.weights import OPERATIONS
from smelt.runtime.errors import UserError


class Layer(Toy):
    """One layer of each inlined kind, and linears with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.empty(16))
        self.gate = nn.Linear(16, 48)
        self.up = nn.Linear(16, 48, bias=False)
        self.down = nn.Linear(48, 16, bias=False)

    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        y = torch.ops.smelt.rms_norm(x, self.norm, 1e-6, 0.0)
        y = torch.ops.smelt.gated_activation(self.gate(y), self.up(y), "silu")
        return x + self.down(y)


def notes_of(subject: Subject, **overrides: str) -> dict[str, set[str]]:
    options = {"overrides": tuple(overrides.items())}
    record = check_pass(subject, ChooseProviders(), before={}, after={}, options=options).record
    found: dict[str, set[str]] = {}
    for note in record["notes"]:
        assert note["reason"]
        found.setdefault(note["operator"], set()).add(note["provider"])
    return found


def test_on_the_cpu_linears_get_the_kernel_and_elementwise_operators_are_inlined() -> None:
    found = check_pass(
        Layer(),
        ChooseProviders(),
        before={"aten.linear": 4, "smelt.rms_norm": 1, "smelt.gated_activation": 1},
        after={
            "aten.linear": 0,
            "smelt.linear": 4,
            "smelt.rms_norm": 0,
            "smelt.gated_activation": 0,
            "rms_norm": 1,
            "gated_activation": 1,
        },
        matched=6,
        rewritten=6,
        golden="choose-providers_layer",
    )
    assert found.program.dialect is Dialect.LOWERED
    wheres = {note["where"] for note in found.record["notes"]}
    assert {"gate", "up", "down", "head"} <= wheres


def test_a_product_of_two_activations_stays_with_aten() -> None:
    class Activations(Toy):
        def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x[0], x[0])[None] @ x

    found = check_pass(
        Activations(),
        ChooseProviders(),
        before={"aten.linear": 2},
        after={"aten.linear": 1, "smelt.linear": 1},
        matched=2,
    )
    assert found.record["notes"][0]["provider"] == "aten"


def test_on_another_device_nothing_of_the_cpu_is_chosen() -> None:
    subject = program_of(Layer())
    subject.program.target = "cuda"
    found = notes_of(subject)
    assert found == {"linear": {"aten"}, "rms_norm": {"inductor"}, "gated_activation": {"inductor"}}


def test_an_override_is_taken_and_says_so() -> None:
    subject = program_of(Layer())
    assert notes_of(subject, linear="reference")["linear"] == {"reference"}
    assert notes_of(subject, rms_norm="reference")["rms_norm"] == {"reference"}


@pytest.mark.parametrize(
    ("operator", "provider", "known"),
    [("linear", "gpu", "aten, cpu, reference"), ("liner", "cpu", "linear")],
)
def test_an_unknown_override_is_the_users_mistake(operator: str, provider: str, known: str) -> None:
    program = program_of(Layer()).program
    options = ChooseProviders.options({"overrides": ((operator, provider),)})
    with pytest.raises(UserError, match=known):
        ChooseProviders().run(program, options)


STAGES: dict[str, Stage] = {
    "int4": Stage(QuantizeRtn(), RtnOptions(QuantSpec("rtn", "int4", 16))),
    "int8": Stage(QuantizeRtn(), RtnOptions(QuantSpec("rtn", "int8", 16))),
    "w8a8": Stage(QuantizeSmoothQuant(), SmoothQuantOptions(QuantSpec("smoothquant", alpha=0.0))),
    "fp8": Stage(QuantizeFp8(), Fp8Options(QuantSpec("fp8", group_size=128))),
}


def quantized(format_: str) -> Subject:
    subject = tiny_program("llama")
    stages = portable_stages(pipeline(PipelineConfig("O2", STAGES[format_])))[0]
    PassManager(stages).run(subject.program)
    return subject


@pytest.mark.parametrize("format_", list(STAGES))
def test_quantized_linears_get_blocked_weights_that_can_be_turned_back(format_: str) -> None:
    subject = quantized(format_)
    name = f"smelt.linear_{format_}"
    count = len(subject.program.calls(getattr(torch.ops.smelt, f"linear_{format_}").default))
    assert count
    found = check_pass(
        subject,
        ChooseProviders(),
        before={name: count},
        after={name: 0, f"{name}_blocked": count},
    )
    plan = found.program.weights
    layout = [step for step in plan.steps if step.op in INVERSES]
    assert len(layout) == count
    step = layout[0]
    needed = [*step.inputs, *step.outputs]
    values = dict(plan.materialize(needed, subject.source))
    back = INVERSES[step.op](*(values[name] for name in step.outputs), **step.args)
    for original, restored in zip(step.inputs, back, strict=True):
        assert torch.equal(values[original], restored)
    again = OPERATIONS[step.op](*back, **step.args)
    for laid_out, value in zip(step.outputs, again, strict=True):
        assert torch.equal(values[laid_out], value)


def test_experts_get_a_kernel() -> None:
    program = tiny_lowered("mixtral").program
    experts = [note for note in program.notes("choose-providers") if note["operator"] == "experts"]
    assert [note["provider"] for note in experts] == ["cpu", "cpu"]
    assert all("rows each expert got" in note["reason"] for note in experts)
    assert len(program.calls(torch.ops.smelt.experts_dense.default)) == 2


EXPERT_SPECS = {
    "int4": QuantSpec("rtn", "int4", 16),
    "int3": QuantSpec("rtn", "int3", 0),
    "int2": QuantSpec("rtn", "int2", 16),
    "int8": QuantSpec("rtn", "int8"),
    "fp8": QuantSpec("rtn", "fp8"),
}


def with_quantized_experts(spec: QuantSpec, family: str = "Mixtral", **sizes: int) -> Subject:
    model = module(family, num_hidden_layers=1, num_local_experts=3, **sizes)
    subject = Subject(program_to_quantize(model), ModuleSource(model), torch.arange(11))
    pass_ = METHODS[spec.method]()
    pass_.run(subject.program, stage_for(spec).options)
    return after(subject, KeepLogitsRows(), InsertKvCache())


@pytest.mark.parametrize("format_", list(EXPERT_SPECS))
def test_quantized_experts_get_blocked_weights_that_can_be_turned_back(format_: str) -> None:
    subject = with_quantized_experts(EXPERT_SPECS[format_])
    found = check_pass(
        subject,
        ChooseProviders(),
        before={"smelt.experts_quantized": 1},
        after={"smelt.experts_quantized": 0, "smelt.experts_quantized_blocked": 1},
    )
    plan = found.program.weights
    steps = [s for s in plan.steps if s.op == f"block_{format_}" and "experts" in s.inputs[0]]
    assert len(steps) == 2
    for step in steps:
        values = dict(plan.materialize([*step.inputs, *step.outputs], subject.source))
        back = INVERSES[step.op](*(values[name] for name in step.outputs), **step.args)
        for original, restored in zip(step.inputs, back, strict=True):
            assert torch.equal(values[original], restored)


@pytest.mark.parametrize(
    ("spec", "sizes", "reason"),
    [
        (QuantSpec("rtn", "int4", 16), {"intermediate_size": 44}, "88 rows, which fill no blocks"),
        (QuantSpec("rtn", "int4", 24), {"hidden_size": 96}, "groups of 24 features end inside"),
        (QuantSpec("fp8", group_size=128), {}, "192 rows end inside a block of 128 x 128 scales"),
    ],
)
def test_experts_that_no_kernel_takes_go_to_the_reference(
    spec: QuantSpec, sizes: dict[str, int], reason: str
) -> None:
    subject = with_quantized_experts(spec, **sizes)
    found = check_pass(
        subject,
        ChooseProviders(),
        before={"smelt.experts_quantized": 1},
        after={"smelt.experts_quantized": 1},
    )
    (note,) = [n for n in found.record["notes"] if n["operator"] == "experts_quantized"]
    assert note["provider"] == "reference" and reason in note["reason"]


class MadeExperts(Toy):
    """Experts whose matrices are computed."""

    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        index = (positions[0] % 2)[:, None]
        weight = torch.ones_like(index, dtype=torch.float32)
        gate_up = self.head.weight[None, :16].repeat(2, 1, 1)
        down = self.head.weight[None, :16, :8].repeat(2, 1, 1)
        return torch.ops.smelt.experts(x[0], index, weight, gate_up, down, "silu")[None]


def test_computed_experts_go_to_the_reference() -> None:
    found = check_pass(
        MadeExperts(), ChooseProviders(), before={"smelt.experts": 1}, after={"smelt.experts": 1}
    )
    notes = {note["operator"]: note for note in found.record["notes"]}
    assert notes["experts"]["provider"] == "reference"
    assert notes["experts"]["reason"] == "an expert's matrix is not a weight"
