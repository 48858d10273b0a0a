"""simplify-views: only views that undo each other go."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.check_pass import check_pass
from helpers.tiny import Toy, after, tiny_program

from smelt.passes.canonical.remove_noops import RemoveNoops
from smelt.passes.canonical.rope import CanonicalizeRope
from smelt.passes.canonical.simplify_views import SimplifyViews


class Apply(Toy):
    def __init__(self, body: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._body = body

    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self._body(x)


def test_a_transpose_there_and_back_goes() -> None:
    check_pass(
        Apply(lambda x: x.transpose(1, 2).transpose(2, 1)),
        SimplifyViews(),
        before={"aten.transpose": 2},
        after={"aten.transpose": 0},
        matched=1,
    )


def test_views_in_views_go_in_one_run() -> None:
    def body(x: torch.Tensor) -> torch.Tensor:
        turned = x.transpose(1, 2).unsqueeze(0)[0].transpose(1, 2)
        return turned.unsqueeze(0)[0]

    check_pass(
        Apply(body),
        SimplifyViews(),
        before={"aten.transpose": 2, "aten.unsqueeze": 3},
        after={"aten.transpose": 0, "aten.select": 1, "aten.unsqueeze": 1},
        matched=3,
    )


@pytest.mark.parametrize(
    ("body", "operator", "count"),
    [
        (lambda x: x[None].transpose(0, 1).transpose(0, 2)[:, 0].transpose(0, 1), "transpose", 3),
        (lambda x: x.expand(2, -1, -1).unsqueeze(1)[1], "unsqueeze", 2),
        (lambda x: torch.cat((x, x))[None].transpose(0, 1)[1], "transpose", 1),
    ],
    ids=["another pair of dimensions", "another row", "row of what was there"],
)
def test_views_that_do_not_undo_each_other_stay(
    body: Callable[[torch.Tensor], torch.Tensor], operator: str, count: int
) -> None:
    name = f"aten.{operator}"
    check_pass(Apply(body), SimplifyViews(), before={name: count}, after={name: count}, matched=0)


def test_the_value_between_keeps_its_other_reader() -> None:
    def body(x: torch.Tensor) -> torch.Tensor:
        turned = x.transpose(1, 2)
        return turned.transpose(1, 2) + turned.sum()

    check_pass(
        Apply(body),
        SimplifyViews(),
        before={"aten.transpose": 2},
        after={"aten.transpose": 1},
        matched=1,
    )


def test_between_rotation_and_attention_no_layout_change_is_left() -> None:
    subject = after(tiny_program("llama"), RemoveNoops(), CanonicalizeRope())
    found = check_pass(subject, SimplifyViews(), before={"smelt.rope": 4}, after={"smelt.rope": 4})
    for node in found.program.calls(torch.ops.smelt.attention.default):
        assert [x.target for x in node.args[:2]] == [torch.ops.smelt.rope.default] * 2
