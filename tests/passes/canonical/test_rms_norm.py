"""canonicalize-rms-norm: the spellings of RMSNorm it knows, and what only looks like one."""

from __future__ import annotations

import pytest
import torch
from helpers.check_pass import check_pass
from helpers.tiny import Toy, after, program_of, tiny_program
from torch import nn

from smelt.passes.canonical.remove_noops import RemoveNoops
from smelt.passes.canonical.rms_norm import CanonicalizeRmsNorm

NONE = {"smelt.rms_norm": 0, "aten.rsqrt": 1}
ONE = {"smelt.rms_norm": 1, "aten.rsqrt": 0}


class Rms(nn.Module):
    """Named so that the model is expected to have one match."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        return x.pow(2).mean(-1, keepdim=True)


class LlamaRMSNorm(Rms):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        normed = wide * torch.rsqrt(self.mean(wide) + 1e-6)
        return self.weight * normed.to(x.dtype)


class GemmaRMSNorm(Rms):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(self.mean(wide) + 1e-5)
        return (normed * (1.0 + self.weight.float())).type_as(x)


class SquareRMSNorm(Rms):
    """x * x in place of x ** 2, and the product the other way round."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * x * self.weight


class BareRMSNorm(Rms):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x * torch.rsqrt(self.mean(x) + 1e-6))


class ReadTwiceRMSNorm(Rms):
    """The normalised value has a reader beside the product with the weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = x * torch.rsqrt(self.mean(x) + 1e-6)
        return normed * self.weight + normed


class PerHeadWeightRMSNorm(Rms):
    """A weight of [H, D] is no norm weight: the product stays outside."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.view(1, -1, 4, 4)
        normed = heads * torch.rsqrt(self.mean(heads) + 1e-6)
        return (normed * self.weight).flatten(-2)


class OverTokens(Rms):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6))


class AnotherFactor(Rms):
    """The inverse root of x scales something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (torch.tanh(x) * torch.rsqrt(self.mean(x) + 1e-6))


class RootReadTwice(Rms):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        root = torch.rsqrt(self.mean(x) + 1e-6)
        return self.weight * (x * root) + root


class Cubes(Rms):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + 1e-6))


class Variance(Rms):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return self.weight * (centred * torch.rsqrt(self.mean(centred) + 1e-6))


class SumNotMean(Rms):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6))


class With(Toy):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


@pytest.mark.parametrize(
    ("norm", "eps", "offset", "weighted"),
    [
        (LlamaRMSNorm(), 1e-6, 0.0, True),
        (GemmaRMSNorm(), 1e-5, 1.0, True),
        (SquareRMSNorm(), 1e-6, 0.0, True),
        (BareRMSNorm(), 1e-6, 0.0, False),
        (ReadTwiceRMSNorm(), 1e-6, 0.0, False),
        (PerHeadWeightRMSNorm(), 1e-6, 0.0, False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_spellings_of_the_norm(norm: nn.Module, eps: float, offset: float, weighted: bool) -> None:
    subject = after(program_of(With(norm)), RemoveNoops())
    found = check_pass(subject, CanonicalizeRmsNorm(), before=NONE, after=ONE, matched=1)
    (node,) = found.program.calls(torch.ops.smelt.rms_norm.default)
    assert node.args[2:] == (eps, offset)
    assert (found.program.weight_name(node.args[1]) == "norm.weight") == weighted


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (OverTokens(), "not the last"),
        (AnotherFactor(), "something else than the normalised value"),
        (RootReadTwice(), "another reader"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_near_misses_are_declined_with_a_reason(norm: nn.Module, reason: str) -> None:
    check_pass(
        With(norm),
        CanonicalizeRmsNorm(),
        before=NONE,
        after=NONE,
        matched=0,
        declined=[reason],
    )


@pytest.mark.parametrize(
    "norm", [Cubes(), Variance(), SumNotMean()], ids=lambda norm: type(norm).__name__
)
def test_other_normalisations_are_left_alone(norm: nn.Module) -> None:
    check_pass(With(norm), CanonicalizeRmsNorm(), before=NONE, after=NONE, matched=0)


def test_torchs_own_rms_norm() -> None:
    check_pass(
        With(nn.RMSNorm(16, eps=1e-4)),
        CanonicalizeRmsNorm(),
        before={"aten.rms_norm": 1},
        after={"aten.rms_norm": 0, "smelt.rms_norm": 1},
        matched=1,
    )


def test_torchs_rms_norm_over_two_dimensions_is_declined() -> None:
    class Planes(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(4, 4))

        def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            planes = x.view(1, -1, 4, 4)
            return nn.functional.rms_norm(planes, (4, 4), self.weight, 1e-5).flatten(-2)

    check_pass(
        Planes(),
        CanonicalizeRmsNorm(),
        before={"aten.rms_norm": 1},
        after={"aten.rms_norm": 1, "smelt.rms_norm": 0},
        declined=["over 2 dimensions"],
    )


@pytest.mark.parametrize("norm", [LlamaRMSNorm(), GemmaRMSNorm()], ids=["llama", "gemma"])
def test_in_bfloat16_the_result_keeps_the_models_dtype(norm: nn.Module) -> None:
    subject = after(program_of(With(norm), dtype=torch.bfloat16), RemoveNoops())
    found = check_pass(subject, CanonicalizeRmsNorm(), before=NONE, after=ONE, tolerance=0.05)
    (node,) = found.program.calls(torch.ops.smelt.rms_norm.default)
    assert node.meta["val"].dtype == torch.bfloat16


def test_a_norm_that_leaves_float32_gets_a_conversion_back() -> None:
    class WideRMSNorm(Rms):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = x.float()
            return wide * torch.rsqrt(self.mean(wide) + 1e-6)

    class Mixed(With):
        def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return self.norm(x).sin().to(x.dtype)

    subject = program_of(Mixed(WideRMSNorm()), dtype=torch.bfloat16)
    found = check_pass(
        subject, CanonicalizeRmsNorm(), before=NONE, after=ONE, matched=1, tolerance=0.05
    )
    (node,) = found.program.calls(torch.ops.aten.sin.default)
    assert node.meta["val"].dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_every_norm_module_of_a_family_is_found(family: str) -> None:
    subject = after(tiny_program(family), RemoveNoops())
    norms = subject.program.facts.module_counts.get("rms_norm", 0)
    check_pass(
        subject,
        CanonicalizeRmsNorm(),
        before={"smelt.rms_norm": 0},
        after={"smelt.rms_norm": norms},
        matched=norms,
    )
