"""keep-logits-rows: only the wanted rows reach the last norm and the output layer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.check_pass import check_pass
from helpers.tiny import Subject, Toy, after, program_of, tiny_program
from torch import nn

from smelt.compiler.numerics import step_values
from smelt.passes.attention.logits_rows import KeepLogitsRows
from smelt.passes.canonical.remove_noops import RemoveNoops
from smelt.passes.program import Program

ONE = {"aten.index_select": 1}
NONE = {"aten.index_select": 0}


def logits_at(program: Program, subject: Subject, rows: list[int]) -> torch.Tensor:
    weights = dict(program.weights.materialize(program.used_weights(), subject.source))
    values = {**step_values(program, subject.ids), "logits_rows": torch.tensor(rows, dtype=int)}
    return program.run(values, weights)[0]


class Plain(Toy):
    """x + tanh(x), layer norm, output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.norm(x + torch.sin(x))


class Capped(Plain):
    """Logits go through a soft cap."""

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool = False
    ) -> SimpleNamespace:
        logits = super().forward(input_ids, position_ids).logits
        return SimpleNamespace(logits=torch.tanh(logits / 5.0) * 5.0)


class WeightFirst(Plain):
    """The last norm is a product with the weight on the left."""

    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.norm.weight * (x + torch.sin(x))


class HeadsBeforeOutput(Plain):
    """What the tail reads has tokens first and heads second."""

    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        heads = torch.sin(x[0].view(-1, 4, 4))
        return heads.view(1, -1, 16)


class DroppedTokens(Plain):
    """A slice of the tokens stands between: rows before it have other numbers."""

    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return torch.cat((torch.sin(x), torch.cos(x)), 1)[:, positions.shape[1] :]


class AddedTail(Plain):
    """The logits come from a sum of two moving values: nothing at the end is row by row."""

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool = False
    ) -> SimpleNamespace:
        logits = super().forward(input_ids, position_ids).logits
        return SimpleNamespace(logits=logits + torch.sin(logits))


@pytest.mark.parametrize("module", [Plain, Capped, WeightFirst, HeadsBeforeOutput])
def test_wanted_rows_equal_those_of_the_whole(module: type[Plain]) -> None:
    subject = program_of(module())
    found = check_pass(subject, KeepLogitsRows(), before=NONE, after=ONE, matched=1, rewritten=1)
    for rows in ([10], [0, 3, 3, 7]):
        picked = logits_at(found.program, subject, rows)
        torch.testing.assert_close(picked, found.logits[rows], atol=1e-6, rtol=1e-5)
    assert logits_at(found.program, subject, []).shape == (0, found.logits.shape[1])


def test_the_selection_stands_before_the_last_norm() -> None:
    found = check_pass(
        Plain(), KeepLogitsRows(), before=NONE, after=ONE, golden="keep-logits-rows_norm"
    )
    (norm,) = found.program.calls(torch.ops.aten.layer_norm.default)
    assert norm.args[0].target is torch.ops.aten.index_select.default


def test_a_slice_of_tokens_stays_before_the_selection() -> None:
    subject = program_of(DroppedTokens())
    found = check_pass(subject, KeepLogitsRows(), before=NONE, after=ONE, matched=1)
    (selected,) = found.program.calls(torch.ops.aten.index_select.default)
    assert selected.args[0].target is torch.ops.aten.slice.Tensor
    picked = logits_at(found.program, subject, [2])
    torch.testing.assert_close(picked, found.logits[[2]], atol=1e-6, rtol=1e-5)


def test_without_an_output_layer_at_the_end_it_is_declined() -> None:
    check_pass(
        AddedTail(),
        KeepLogitsRows(),
        before=NONE,
        after=NONE,
        matched=0,
        declined=["no output layer"],
        fewer=True,
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere2", "gpt2", "granite"])
def test_families(family: str) -> None:
    subject = after(tiny_program(family), RemoveNoops())
    found = check_pass(subject, KeepLogitsRows(), before=NONE, after=ONE, matched=1)
    rows = [28, 5]
    torch.testing.assert_close(
        logits_at(found.program, subject, rows), subject.logits[rows], atol=1e-5, rtol=1e-4
    )
