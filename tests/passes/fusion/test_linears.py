"""fuse-linears: siblings over one input become one product; unlike siblings are declined."""

from __future__ import annotations

import pytest
import torch
from helpers.check_pass import check_pass
from helpers.tiny import Toy, after, program_of, tiny_program
from torch import nn

from smelt.passes.canonical.remove_noops import RemoveNoops
from smelt.passes.fusion.linears import FuseLinears


class Attention(nn.Module):
    """Three projections of one input, as an attention layer has them."""

    def __init__(self, bias: tuple[bool, bool, bool] = (False, False, False)) -> None:
        super().__init__()
        self.q_proj = nn.Linear(16, 16, bias=bias[0])
        self.k_proj = nn.Linear(16, 8, bias=bias[1])
        self.v_proj = nn.Linear(16, 8, bias=bias[2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x) * torch.cat((self.k_proj(x), self.v_proj(x)), -1)


class Model(Toy):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.attention(x)


class OtherInputs(Attention):
    """Each projection reads another value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keys = torch.cat((self.k_proj(x.sin()), self.v_proj(x.cos())), -1)
        return self.q_proj(x) * keys


class Shared(nn.Module):
    """Two calls of one linear."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(16, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x) + self.q_proj(x).tanh()


class ComputedBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.b = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = nn.functional.linear(x, self.a.weight, self.a.bias * 2)
        return first + nn.functional.linear(x, self.b.weight, self.b.bias * 3)


class TwoModules(Toy):
    """Linears over one input that stand in two modules, as in a parallel residual."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(16, 16, bias=False))
        self.right = nn.Sequential(nn.Linear(16, 16, bias=False))

    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.left(x) + self.right(x)


def test_three_projections_become_one() -> None:
    found = check_pass(
        Model(Attention()),
        FuseLinears(),
        before={"aten.linear": 4, "aten.slice": 0},
        after={"aten.linear": 2, "aten.slice": 3},
        matched=1,
        rewritten=1,
        golden="fuse-linears_qkv",
    )
    name = "attention.q_k_v_proj.weight"
    assert name in found.program.used_weights()
    assert found.program.weights.specs[name].shape == (32, 16)
    assert found.program.weights.producers()[name].op == "cat"


def test_biases_are_joined_too() -> None:
    found = check_pass(
        Model(Attention((True, True, True))),
        FuseLinears(),
        before={"aten.linear": 4},
        after={"aten.linear": 2},
        rewritten=1,
    )
    assert found.program.weights.specs["attention.q_k_v_proj.bias"].shape == (32,)


def test_a_sibling_without_a_bias_is_declined() -> None:
    check_pass(
        Model(Attention((True, True, False))),
        FuseLinears(),
        before={"aten.linear": 4},
        after={"aten.linear": 4},
        matched=1,
        rewritten=0,
        declined=["some of the siblings have a bias"],
    )


@pytest.mark.parametrize(
    ("module", "reason"),
    [(Shared, "share one weight"), (ComputedBias, "computed in the graph")],
)
def test_siblings_that_cannot_be_joined_are_declined(module: type[nn.Module], reason: str) -> None:
    check_pass(
        Model(module()),
        FuseLinears(),
        before={"aten.linear": 3},
        after={"aten.linear": 3},
        matched=1,
        rewritten=0,
        declined=[reason],
        fewer=True,
    )


@pytest.mark.parametrize("module", [Model(OtherInputs()), TwoModules()])
def test_linears_that_are_no_siblings_are_left_alone(module: Toy) -> None:
    count = sum(isinstance(m, nn.Linear) for m in module.modules())
    check_pass(
        module,
        FuseLinears(),
        before={"aten.linear": count},
        after={"aten.linear": count},
        matched=0,
        fewer=True,
    )


def test_two_layers_get_weights_of_their_own() -> None:
    class Layers(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Attention(), Attention()])

        def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return self.layers[1](self.layers[0](x))

    found = check_pass(
        Layers(), FuseLinears(), before={"aten.linear": 7}, after={"aten.linear": 3}, matched=2
    )
    assert {f"layers.{i}.q_k_v_proj.weight" for i in (0, 1)} <= set(found.program.used_weights())


def test_in_bfloat16() -> None:
    subject = program_of(Model(Attention()), dtype=torch.bfloat16)
    check_pass(
        subject,
        FuseLinears(),
        before={"aten.linear": 4},
        after={"aten.linear": 2},
        tolerance=0.05,
    )


@pytest.mark.parametrize(("family", "families"), [("llama", 4), ("qwen2", 4), ("phi3", 0)])
def test_siblings_of_a_family(family: str, families: int) -> None:
    subject = after(tiny_program(family), RemoveNoops())
    layers = subject.program.facts.hidden_layers
    linears = len(subject.program.calls(torch.ops.aten.linear.default))
    check_pass(
        subject,
        FuseLinears(),
        before={"aten.linear": linears},
        after={"aten.linear": 4 * layers + 1},
        matched=families,
    )
