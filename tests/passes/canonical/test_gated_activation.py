"""canonicalize-gated-activation: an activation times its sibling, and nothing else."""

from __future__ import annotations

import pytest
import torch
from helpers.check_pass import check_pass
from helpers.tiny import Toy, after, program_of, tiny_program
from torch import nn
from torch.nn import functional as F

from smelt.passes.canonical.gated_activation import CanonicalizeGatedActivation
from smelt.passes.canonical.remove_noops import RemoveNoops


class Gated(Toy):
    """A gated layer; `gate` and `join` are what a near miss changes."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(16, 24, bias=False)
        self.up_proj = nn.Linear(16, 24, bias=False)
        self.down_proj = nn.Linear(24, 16, bias=False)

    def act(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x)

    def join(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.act(gate) * up

    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.join(self.gate_proj(x), self.up_proj(x)))


class Gelu(Gated):
    def act(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x)


class GeluTanh(Gated):
    def act(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate="tanh")


class Relu(Gated):
    def act(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x)


class UpFirst(Gated):
    def join(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return up * self.act(gate)


class ReadTwice(Gated):
    def join(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        active = self.act(gate)
        return active * up + active


class OneColumn(Gated):
    """A gate of one value a token scales all features."""

    def join(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.act(gate[..., :1]) * up


class WideGate(Gated):
    def join(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return (self.act(gate.double()) * up).float()


class Itself(Gated):
    def join(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        active = self.act(gate)
        return active * active + up


class TimesNumber(Gated):
    def join(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.act(gate) * 3.0 + up


class Sum(Gated):
    def join(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.act(gate) + up


ONE = {"smelt.gated_activation": 1, "aten.mul": 0}
NONE = {"smelt.gated_activation": 0}


@pytest.mark.parametrize(
    ("module", "kind"),
    [(Gated, "silu"), (Gelu, "gelu"), (GeluTanh, "gelu_tanh"), (Relu, "relu"), (UpFirst, "silu")],
)
def test_activations_and_their_product_become_one_node(module: type[Gated], kind: str) -> None:
    before = {"aten.mul": 1, **NONE}
    found = check_pass(
        module(), CanonicalizeGatedActivation(), before=before, after=ONE, matched=1, fewer=True
    )
    (node,) = found.program.calls(torch.ops.smelt.gated_activation.default)
    gate, up, found_kind = node.args
    assert found_kind == kind
    names = [found.program.weight_name(linear.args[1]) for linear in (gate, up)]
    assert names == ["gate_proj.weight", "up_proj.weight"]


@pytest.mark.parametrize(
    ("module", "declined"),
    [
        (ReadTwice, ["another reader"]),
        (OneColumn, ["differ in shape"]),
        (WideGate, ["differ in shape or dtype"]),
        (Itself, []),
        (TimesNumber, []),
        (Sum, []),
    ],
)
def test_near_misses_stay(module: type[Gated], declined: list[str]) -> None:
    check_pass(
        module(),
        CanonicalizeGatedActivation(),
        before=NONE,
        after=NONE,
        matched=0,
        declined=declined,
        fewer=True,
    )


def test_a_plain_feed_forward_layer_is_no_near_miss() -> None:
    check_pass(
        tiny_program("gpt2"), CanonicalizeGatedActivation(), before=NONE, after=NONE, matched=0
    )


def test_in_bfloat16() -> None:
    subject = program_of(Gated(), dtype=torch.bfloat16)
    check_pass(subject, CanonicalizeGatedActivation(), before=NONE, after=ONE, fewer=True)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_every_gated_layer_of_a_family_is_found(family: str) -> None:
    subject = after(tiny_program(family), RemoveNoops())
    layers = subject.program.facts.hidden_layers
    check_pass(
        subject,
        CanonicalizeGatedActivation(),
        before=NONE,
        after={"smelt.gated_activation": layers},
        matched=layers,
    )
