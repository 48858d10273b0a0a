"""canonicalize-linear: one form of a linear layer, whatever the model wrote."""

from __future__ import annotations

import torch
from helpers.check_pass import check_pass
from helpers.tiny import Toy, tiny_program
from torch import nn

from smelt.passes.canonical.linear import CanonicalizeLinear


class Products(Toy):
    """Weights stored [K, N], used by `body`."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(16, 16))
        self.b = nn.Parameter(torch.empty(16))
        self.table = nn.Parameter(torch.empty(1, 16))


class Conv1D(Products):
    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.b, x.view(-1, 16), self.w).view(1, -1, 16)


class Matmul(Products):
    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return x @ self.w


class SplitAfterwards(Products):
    """The view after the product cuts features: it does not undo the one before."""

    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        heads = x.view(-1, 4, 4)
        return torch.mm(heads.view(-1, 16), self.w).view(-1, 4, 4).view(1, -1, 16)


class TwoReaders(Products):
    """The flat product is read twice, so its view cannot go with it."""

    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        flat = torch.addmm(self.b, x.view(-1, 16), self.w)
        return flat.view(1, -1, 16) + flat.sum()


class ComputedTerm(Products):
    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.b * 2, x.view(-1, 16), self.w).view(1, -1, 16)


class TableTerm(Products):
    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.table, x.view(-1, 16), self.w).view(1, -1, 16)


class Scaled(Products):
    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.b, x.view(-1, 16), self.w, beta=2, alpha=3).view(1, -1, 16)


class Activations(Products):
    """A product of two activations is no linear layer."""

    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return x @ (x.transpose(1, 2) @ x)


def test_conv1d_becomes_a_linear_and_loses_its_views() -> None:
    found = check_pass(
        Conv1D(),
        CanonicalizeLinear(),
        before={"aten.addmm": 1, "aten.linear": 1, "aten.view": 2},
        after={"aten.addmm": 0, "aten.linear": 2, "aten.view": 0},
        matched=1,
        rewritten=1,
        golden="canonicalize-linear_conv1d",
    )
    assert "w.t" in found.program.used_weights()
    assert "w" not in found.program.used_weights()
    assert found.program.dialect.name == "SEMANTIC"


def test_a_bare_product_with_a_weight_becomes_a_linear() -> None:
    check_pass(
        Matmul(),
        CanonicalizeLinear(),
        before={"aten.matmul": 1},
        after={"aten.matmul": 0, "aten.linear": 2},
        matched=1,
    )


def test_a_view_that_cuts_features_stays() -> None:
    check_pass(
        SplitAfterwards(),
        CanonicalizeLinear(),
        before={"aten.mm": 1},
        after={"aten.mm": 0, "aten.linear": 2},
        rewritten=1,
    )


def test_a_flat_product_with_two_readers_keeps_its_view() -> None:
    check_pass(
        TwoReaders(),
        CanonicalizeLinear(),
        before={"aten.addmm": 1, "aten.view": 2},
        after={"aten.addmm": 0, "aten.linear": 2, "aten.view": 2},
        rewritten=1,
    )


def test_an_added_term_that_is_no_bias_is_declined() -> None:
    for module in (ComputedTerm(), TableTerm()):
        check_pass(
            module,
            CanonicalizeLinear(),
            before={"aten.addmm": 1},
            after={"aten.addmm": 1},
            matched=1,
            rewritten=0,
            declined=["not a bias"],
        )


def test_a_scaled_product_is_declined() -> None:
    check_pass(
        Scaled(),
        CanonicalizeLinear(),
        before={"aten.addmm": 1},
        after={"aten.addmm": 1},
        rewritten=0,
        declined=["scaled by"],
    )


def test_a_product_of_activations_is_left_alone() -> None:
    check_pass(
        Activations(),
        CanonicalizeLinear(),
        before={"aten.matmul": 2},
        after={"aten.matmul": 2},
        matched=0,
    )


def test_gpt2_has_one_linear_for_each_conv1d() -> None:
    check_pass(
        tiny_program("gpt2"),
        CanonicalizeLinear(),
        before={"aten.addmm": 8, "aten.linear": 1},
        after={"aten.addmm": 0, "aten.linear": 9},
        matched=8,
    )
