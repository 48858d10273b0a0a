"""Masks say what a grammar allows behind drafts too, and leave its state as it was."""

from __future__ import annotations

import pytest
import torch
from helpers.fake_step import one_thread  # noqa: F401  (autouse fixture)
from helpers.grammars import BACKENDS, DEMO, DEMO_END, DEMO_SIZE, demo_compiler

from smelt.runtime.bitmask import set_bits
from smelt.runtime.masks import NOTHING, prepare, unpack
from smelt.runtime.processors import process
from smelt.runtime.sampler import Row, SamplerState, sample
from smelt.runtime.sampling_params import SamplingParams
from smelt.runtime.structured import Structured
from smelt.runtime.tokenizer import Tokenizer

CPU = torch.device("cpu")
TOKENIZER = Tokenizer(DEMO)


def row(spec: Structured, draft: tuple[int, ...] = (), params: SamplingParams | None = None) -> Row:
    matcher = demo_compiler().compile(spec).matcher()
    return Row(SamplerState(params or SamplingParams(), 1, [DEMO_END], matcher=matcher), [0], draft)


def allowed(row: Row) -> set[int]:
    scores = process(torch.zeros(1, DEMO_SIZE), [row])
    return set(scores[0].isfinite().nonzero().flatten().tolist())


def characters(text: str) -> list[int]:
    """Ids of the single characters."""
    ids = [TOKENIZER.encode(c, add_special_tokens=False) for c in text]
    assert all(len(i) == 1 for i in ids)
    return [i[0] for i in ids]


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_may_follow_is_allowed(backend: str) -> None:
    pytest.importorskip(backend)
    a, b, c = characters("abc")
    one = row(Structured(regex="a(b|c)?", backend=backend))
    assert allowed(one) & {a, b, c, DEMO_END} == {a}
    assert all(token < TOKENIZER.vocab_size for token in allowed(one))
    one.state.accept([a])
    assert allowed(one) == {b, c, DEMO_END}
    one.state.accept([b])
    assert allowed(one) == {DEMO_END}
    assert not one.state.finished
    one.state.accept([DEMO_END])
    assert one.state.finished


@pytest.mark.parametrize("backend", BACKENDS)
def test_special_tokens_are_never_allowed(backend: str) -> None:
    pytest.importorskip(backend)
    found = allowed(row(Structured(regex=r"[^\n]*", backend=backend)))
    assert len(found) > 900
    assert found.isdisjoint(set(range(5)) - {DEMO_END})
    assert max(found) < TOKENIZER.vocab_size


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_behind_drafts_equal_those_after_accepting(backend: str) -> None:
    pytest.importorskip(backend)
    spec = Structured(json_schema={"type": "array", "items": {"type": "integer"}}, backend=backend)
    draft = tuple(characters("[12,3]"))
    state = row(spec).state
    rows = [Row(state, [0], draft[:n]) for n in range(len(draft) + 1)]
    for _ in range(2):  # the first time leaves the state as it was
        prepared = prepare(rows, DEMO_SIZE, CPU)
        scores = process(torch.zeros(len(rows), DEMO_SIZE), rows, prepared)
        step = row(spec)
        for n in range(len(rows)):
            assert set(scores[n].isfinite().nonzero().flatten().tolist()) == allowed(step)
            if n < len(draft):
                step.state.accept([draft[n]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_drafts_that_do_not_match_are_harmless(backend: str) -> None:
    pytest.importorskip(backend)
    a, b, c = characters("abc")
    state = row(Structured(regex="ab", backend=backend)).state
    drafts: list[tuple[int, ...]] = [(), (a,), (a, c), (a, c, b), (a, b, DEMO_END), (a, b)]
    rows = [Row(state, [0], draft) for draft in drafts]
    logits = torch.zeros(len(rows), DEMO_SIZE)
    logits[:, c] = 1.0
    tokens = sample(logits, rows)
    assert (tokens[0] != c, tokens[1], tokens[5]) == (True, b, DEMO_END)
    assert None not in tokens  # the rows of wrong drafts are not used, and are no error
    state.accept([a, b, DEMO_END])
    assert state.finished
    assert state.matcher is not None
    assert state.matcher.error is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_min_tokens_holds_the_end_back_while_something_else_is_left(backend: str) -> None:
    pytest.importorskip(backend)
    a, b = characters("ab")
    params = SamplingParams(min_tokens=5)
    more = row(Structured(regex="a*", backend=backend), (), params)
    assert DEMO_END not in allowed(more)
    assert DEMO_END in allowed(row(Structured(regex="a*", backend=backend)))
    behind = Row(more.state, [0], (a,) * 5)
    assert DEMO_END in allowed(behind)
    over = row(Structured(regex="ab", backend=backend), (a, b), params)
    assert allowed(over) == {DEMO_END}


def test_rows_without_a_grammar_are_left_alone() -> None:
    plain = Row(SamplerState(SamplingParams()), [0])
    assert prepare([plain], DEMO_SIZE, CPU) is NOTHING
    one = row(Structured(choice=["a"]))
    logits = torch.randn(3, DEMO_SIZE)
    scores = process(logits, [plain, one, plain], prepare([plain, one, plain], DEMO_SIZE, CPU))
    assert torch.equal(scores[[0, 2]], logits[[0, 2]])
    assert scores[1].isfinite().sum() == 1


@pytest.mark.parametrize("size", [1, 31, 32, 33, 1056])
def test_bits_are_unpacked_in_order(size: int) -> None:
    wanted = torch.rand(4, size, generator=torch.Generator().manual_seed(size)) < 0.5
    masks = torch.zeros(4, (size + 31) // 32, dtype=torch.int32)
    for mask, bits in zip(masks, wanted, strict=True):
        set_bits(mask, bits.nonzero().flatten().tolist(), True)
    assert torch.equal(unpack(masks, size), wanted)
    for mask in masks:
        set_bits(mask, range(size + 64), False)
    assert not masks.any()
