"""insert-rope-lengths: the one sequence's length becomes an input with a length for each token."""

from __future__ import annotations

import pytest
import torch
from helpers.check_pass import check_pass
from helpers.rotary import rotary_subject
from helpers.tiny import Subject, Toy, after, program_of, tiny_program

from smelt.passes.attention.kv_cache import InsertKvCache
from smelt.passes.attention.logits_rows import KeepLogitsRows
from smelt.passes.attention.rope_lengths import InsertRopeLengths
from smelt.passes.canonical.remove_noops import RemoveNoops
from smelt.passes.dialect import DialectError, verify
from smelt.passes.program import Dialect
from smelt.runtime.batch import LengthScaling, step_input_names


class Turning(Toy):
    """A layer of attention over features scaled by the length, asked for once for each limit."""

    def __init__(self, *limits: int, kind: str = "longrope") -> None:
        super().__init__(layers=1)
        self.limits = limits
        self.kind = kind

    def body(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        for limit in self.limits:
            lengths = torch.ops.smelt.sequence_length(positions[0], self.kind, limit)
            x = x * torch.where(lengths > limit, 0.5, 2.0)[None, :, None]
        q = x[0].view(-1, 4, 4)
        out = torch.ops.smelt.attention(q, q, q, 0.5, 0, 0.0, None)
        return x + out.reshape(1, -1, 16)


def cached(*limits: int, kind: str = "longrope") -> Subject:
    return after(program_of(Turning(*limits, kind=kind)), KeepLogitsRows(), InsertKvCache())


def test_the_length_becomes_an_input() -> None:
    found = check_pass(
        cached(4),
        InsertRopeLengths(),
        before={"smelt.sequence_length": 1},
        after={"smelt.sequence_length": 0},
        matched=1,
        rewritten=1,
        fewer=True,
        golden="insert-rope-lengths_one",
    )
    spec = found.program.caches
    assert spec is not None and spec.rope == LengthScaling("longrope", 4)
    assert step_input_names(spec)[5] == "rope_lens"
    lengths = found.program.input("rope_lens").meta["val"]
    assert lengths.dtype == torch.int64
    assert lengths.shape == found.program.input("input_ids").meta["val"].shape


def test_all_that_ask_read_one_input() -> None:
    found = check_pass(
        cached(4, 4),
        InsertRopeLengths(),
        before={"smelt.sequence_length": 2},
        after={"smelt.sequence_length": 0},
        matched=2,
        rewritten=2,
        fewer=True,
    )
    assert len(found.program.input("rope_lens").users) == 2


def test_another_limit_is_declined_and_nothing_lowers() -> None:
    found = check_pass(
        cached(4, 6),
        InsertRopeLengths(),
        before={"smelt.sequence_length": 2},
        after={"smelt.sequence_length": 1},
        matched=2,
        rewritten=1,
        declined=["limit=4), found LengthScaling(kind='longrope', limit=6)"],
        fewer=True,
    )
    found.program.dialect = Dialect.LOWERED
    with pytest.raises(DialectError, match="sequence_length is not part of LOWERED"):
        verify(found.program)


def test_other_models_keep_their_contract() -> None:
    subject = after(tiny_program("llama"), RemoveNoops(), KeepLogitsRows(), InsertKvCache())
    found = check_pass(
        subject, InsertRopeLengths(), before={"smelt.sequence_length": 0}, after={}, matched=0
    )
    spec = found.program.caches
    assert spec is not None and spec.rope is None and "rope" not in spec.to_json()
    assert "rope_lens" not in step_input_names(spec)


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "dynamic"), ("llama", "longrope"), ("phi3", "longrope")]
)
def test_models(family: str, kind: str) -> None:
    subject = rotary_subject(kind, family)
    after(subject, RemoveNoops(), KeepLogitsRows(), InsertKvCache())
    check_pass(
        subject,
        InsertRopeLengths(),
        before={"smelt.sequence_length": 1},
        after={"smelt.sequence_length": 0},
        matched=1,
        rewritten=1,
    )
