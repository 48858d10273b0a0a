"""remove-noops: what gives back its input goes, what changes anything stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.check_pass import check_pass
from helpers.tiny import Toy, program_of, tiny_program
from torch import nn

from smelt.passes.canonical.remove_noops import RemoveNoops

Body = Callable[[torch.Tensor], torch.Tensor]


class Apply(Toy):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self._body = body

    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self._body(x)


IDENTITIES: dict[str, tuple[str, Body]] = {
    "dropout": ("aten.dropout", lambda x: nn.functional.dropout(x, 0.5, training=False)),
    "same dtype": ("aten.to", lambda x: x.to(torch.float32)),
    "times one": ("aten.mul", lambda x: x * 1.0),
    "whole slice": ("aten.slice", lambda x: x[:, :, 0:]),
    "cat with nothing": ("aten.cat", lambda x: torch.cat((x[..., :0], x), -1)),
    "cat with a bare [0]": ("aten.cat", lambda x: torch.cat((x.new_zeros(0), x), -1)),
    "same view": ("aten.view", lambda x: x.view(1, -1, 16)),
    "same reshape": ("aten.reshape", lambda x: x.reshape(x.shape)),
    "detach": ("aten.detach", lambda x: x.detach()),
}

KEPT: dict[str, tuple[str, Body]] = {
    "another dtype": ("aten.to", lambda x: x.to(torch.float64).add(1e-9).float()),
    "times two": ("aten.mul", lambda x: x * 2.0),
    "part of a slice": ("aten.slice", lambda x: nn.functional.pad(x[..., 1:], (1, 0))),
    "every second feature": (
        "aten.slice",
        lambda x: torch.repeat_interleave(x[..., ::2], 2, -1),
    ),
    "cat of two": ("aten.cat", lambda x: torch.cat((x[..., :8], x[..., 8:]), -1)),
    "another view": ("aten.view", lambda x: x.view(1, -1, 4, 4).flatten(-2)),
}


@pytest.mark.parametrize("kind", IDENTITIES)
def test_an_identity_goes(kind: str) -> None:
    operator, body = IDENTITIES[kind]
    subject = program_of(Apply(body))
    check_pass(subject, RemoveNoops(), before={operator: 1}, after={operator: 0})


@pytest.mark.parametrize("kind", KEPT)
def test_what_changes_its_input_stays(kind: str) -> None:
    operator, body = KEPT[kind]
    subject = program_of(Apply(body))
    count = sum(operator in str(node.target) for node in subject.program.calls())
    assert count
    check_pass(subject, RemoveNoops(), before={operator: count}, after={operator: count})


def test_a_product_with_one_that_changes_the_dtype_stays() -> None:
    class Positions(Toy):
        def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return x + (positions * 1.0)[..., None]

    check_pass(Positions(), RemoveNoops(), before={"aten.mul": 1}, after={"aten.mul": 1}, matched=0)


def test_a_cat_with_nothing_of_a_wider_dtype_stays() -> None:
    body: Body = lambda x: torch.cat((x.new_zeros(1, 0, 16, dtype=torch.float64), x), 1).float()  # noqa: E731
    check_pass(Apply(body), RemoveNoops(), before={"aten.cat": 1}, after={"aten.cat": 1})


def test_chains_of_identities_go_in_one_run() -> None:
    def body(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x.float() * 1.0, 0.1, training=False)[:, :, 0:] + 1

    check_pass(
        Apply(body),
        RemoveNoops(),
        before={"aten.dropout": 1, "aten.mul": 1, "aten.to": 1, "aten.slice": 1},
        after={"aten.dropout": 0, "aten.mul": 0, "aten.to": 0, "aten.slice": 0},
        matched=4,
        golden="remove-noops_chain",
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_families_lose_their_dropouts_and_keep_their_logits(family: str) -> None:
    subject = tiny_program(family)
    before = sum("dropout" in str(n.target) for n in subject.program.calls())
    found = check_pass(
        subject, RemoveNoops(), before={"aten.dropout": before}, after={"aten.dropout": 0}
    )
    assert found.record["rewritten"] > 0
