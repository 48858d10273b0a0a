"""canonicalize-layer-norm: a spelled-out layer norm becomes one, its look-alikes do not."""

from __future__ import annotations

import pytest
import torch
from helpers.check_pass import check_pass
from helpers.tiny import Toy, after, program_of, tiny_program
from torch import nn

from smelt.passes.canonical.layer_norm import CanonicalizeLayerNorm
from smelt.passes.canonical.remove_noops import RemoveNoops

NONE = {"aten.layer_norm": 0, "aten.rsqrt": 1}
ONE = {"aten.layer_norm": 1, "aten.rsqrt": 0}


class SpelledLayerNorm(nn.Module):
    """Cohere's form, with places where a near miss can differ."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(16))

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(-1, keepdim=True)

    def variance(self, centred: torch.Tensor) -> torch.Tensor:
        return self.mean(centred.pow(2))

    def factor(self, x: torch.Tensor, centred: torch.Tensor) -> torch.Tensor:
        return centred

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        centred = wide - self.mean(wide)
        normed = self.factor(wide, centred) * torch.rsqrt(self.variance(centred) + 1e-5)
        return (self.weight.to(torch.float32) * normed).to(x.dtype)


class FourthPower(SpelledLayerNorm):
    def variance(self, centred: torch.Tensor) -> torch.Tensor:
        return self.mean(centred.pow(4))


class OverTokens(SpelledLayerNorm):
    def mean(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1, keepdim=True)


class Uncentred(SpelledLayerNorm):
    def factor(self, x: torch.Tensor, centred: torch.Tensor) -> torch.Tensor:
        return x


class NoWeight(SpelledLayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - self.mean(x)
        return torch.tanh(centred * torch.rsqrt(self.variance(centred) + 1e-5))


class PerHead(SpelledLayerNorm):
    """A weight of [H, D], as Cohere's query norms have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.view(1, -1, 4, 4)).flatten(-2)


class With(Toy):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def test_a_spelled_out_layer_norm_becomes_one() -> None:
    found = check_pass(
        after(program_of(With(SpelledLayerNorm())), RemoveNoops()),
        CanonicalizeLayerNorm(),
        before=NONE,
        after=ONE,
        matched=1,
        rewritten=1,
    )
    (node,) = found.program.calls(torch.ops.aten.layer_norm.default)
    assert node.args[1:] == ([16], node.args[2], None, 1e-5)
    assert found.program.weight_name(node.args[2]) == "norm.weight"


def test_in_bfloat16_the_conversions_go_too() -> None:
    subject = program_of(With(SpelledLayerNorm()), dtype=torch.bfloat16)
    check_pass(
        subject,
        CanonicalizeLayerNorm(),
        before={**NONE, "aten.to": 3},
        after={**ONE, "aten.to": 0},
        tolerance=0.05,
    )


def test_torchs_layer_norm_is_counted_and_kept() -> None:
    check_pass(
        With(nn.LayerNorm(16)),
        CanonicalizeLayerNorm(),
        before={"aten.layer_norm": 1},
        after={"aten.layer_norm": 1},
        matched=1,
        rewritten=0,
    )


@pytest.mark.parametrize(
    ("norm", "declined"),
    [
        (FourthPower(), []),
        (OverTokens(), []),
        (Uncentred(), ["something else than x - mean(x)"]),
        (NoWeight(), ["no product with a weight"]),
        (PerHead(), ["shape is not the normalised one"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_look_alikes_stay(norm: nn.Module, declined: list[str]) -> None:
    check_pass(
        With(norm),
        CanonicalizeLayerNorm(),
        before=NONE,
        after=NONE,
        matched=0,
        declined=declined,
        fewer=True,
    )


@pytest.mark.parametrize("family", ["gpt2", "cohere2"])
def test_every_layer_norm_module_of_a_family_is_there(family: str) -> None:
    subject = after(tiny_program(family), RemoveNoops())
    norms = subject.program.facts.module_counts["layer_norm"]
    check_pass(
        subject,
        CanonicalizeLayerNorm(),
        before={},
        after={"aten.layer_norm": norms, "aten.rsqrt": 0},
        matched=norms,
    )
