"""Tokens depend on nothing but seed and logits, with drafts as without, in any batch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from helpers.fake_step import one_thread  # noqa: F401  (autouse fixture)
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.runtime.errors import SmeltError, UserError
from smelt.runtime.processors import process
from smelt.runtime.sampler import ACCEPT, DRAFT, DRAW, Row, SamplerState, distributions, sample
from smelt.runtime.sampling_params import SamplingParams

VOCAB = 211


def rows_of(params: Sequence[SamplingParams]) -> list[Row]:
    return [Row(SamplerState(p, 1), [1]) for p in params]


def test_greedy_is_the_exact_argmax() -> None:
    logits = torch.randn(5, VOCAB)
    rows = rows_of([SamplingParams()] * 5)
    assert sample(logits, rows) == logits.argmax(-1).tolist()
    assert sample(logits.bfloat16(), rows) == logits.bfloat16().argmax(-1).tolist()


def test_plain_greedy_makes_no_float_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, VOCAB).bfloat16()
    monkeypatch.setattr(torch.Tensor, "float", None)
    monkeypatch.setattr(torch.Tensor, "to", None)
    assert sample(logits, rows_of([SamplingParams()] * 3)) == logits.argmax(-1).tolist()


OTHERS = [
    SamplingParams(),
    SamplingParams(temperature=2.0, min_p=0.1, logit_bias={3: 5.0}),
    SamplingParams(temperature=1.0, repetition_penalty=1.2, top_p=0.3),
    SamplingParams(presence_penalty=1.0, bad_words=[[1, 2], [3]]),
]


@pytest.mark.parametrize("others", [0, 1, 6])
def test_same_seed_same_tokens_in_any_batch(others: int) -> None:
    mine = SamplingParams(temperature=0.9, top_p=0.95, top_k=50, frequency_penalty=0.5, seed=3)
    make = torch.Generator().manual_seed(0)
    steps = [torch.randn(1, VOCAB, generator=make) * 2 for _ in range(20)]
    expected = answer(steps, [mine], 0)
    params = [OTHERS[i % len(OTHERS)] for i in range(others)]
    params.insert(others // 2, mine)
    assert answer(steps, params, others // 2) == expected
    assert len(set(expected)) > 3


def answer(steps: list[torch.Tensor], params: list[SamplingParams], place: int) -> list[int]:
    """The tokens of the row at `place`, whose logits are those of `steps`."""
    rows = rows_of(params)
    for logits in steps:
        batch = torch.randn(len(rows), VOCAB)
        batch[place] = logits[0]
        for row, token in zip(rows, sample(batch, rows), strict=True):
            row.history.append(token)
            row.state.accept([token])
    return rows[place].history[1:]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([0.0, 1.0]),
    st.lists(st.integers(0, 4), min_size=1, max_size=8),
    st.integers(0, 10**6),
)
def test_verifying_drafts_gives_the_tokens_of_plain_decoding(
    temperature: float, right: list[int], seed: int
) -> None:
    """One-hot drafts, of which the first few of each step are what plain decoding would choose."""
    params = SamplingParams(
        temperature=temperature,
        top_p=0.9,
        repetition_penalty=1.3,
        frequency_penalty=0.5,
        bad_words=[[1, 2], [4]],
        min_tokens=4,
        seed=seed,
    )
    table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2
    plain = Row(SamplerState(params, 1, [5]), [1])
    for _ in range(5 * len(right)):
        token = sample(table[plain.history[-1]][None], [plain])[0]
        plain.history.append(token)
        plain.state.accept([token])
    state, history = SamplerState(params, 1, [5]), [1]
    for count in right:
        known = plain.history[len(history) : len(history) + count]
        draft = [*known, (plain.history[len(history) + count] + 1) % VOCAB]
        before = [history[-1], *draft]
        rows = [Row(state, history, tuple(draft[:n])) for n in range(len(draft) + 1)]
        found = sample(table[before], rows)
        taken = found[: count + 1]  # the drafts that were right, and the token behind them
        assert taken[:count] == known
        history += taken
        state.accept(taken)
        assert taken[-1] != draft[-1]
    assert history == plain.history[: len(history)]


def test_peeking_consumes_nothing() -> None:
    state = SamplerState(SamplingParams(temperature=1.0, seed=1))
    numbers = [state.peek(i) for i in range(6)]
    assert [state.peek(i) for i in (5, 0, 3)] == [numbers[5], numbers[0], numbers[3]]
    state.advance(2)
    assert state.peek() == numbers[2]
    state.advance(3)
    assert state.peek() == numbers[5]
    assert len(set(numbers)) == 6


def test_uses_have_numbers_of_their_own_that_move_together() -> None:
    params = SamplingParams(temperature=1.0, seed=1)
    state, other = SamplerState(params), SamplerState(params)
    expected = {use: [other.peek(i, use) for i in range(4)] for use in (DRAW, ACCEPT, DRAFT)}
    assert len({n for numbers in expected.values() for n in numbers}) == 12
    state.advance(3)  # before the stream of any other use exists
    assert all(state.peek(0, use) == numbers[3] for use, numbers in expected.items())


def test_answers_of_one_request_have_other_numbers() -> None:
    params = SamplingParams(temperature=1.0, seed=1, n=3)
    first = [SamplerState(params, index=i).peek() for i in (0, 1, 2, 0, 1)]
    assert len(set(first)) == 3
    assert first[:2] == first[3:]
    assert first[0] == SamplerState(SamplingParams(temperature=1.0, seed=1)).peek()


def test_distributions_are_what_is_sampled_from() -> None:
    params = [
        SamplingParams(),
        SamplingParams(temperature=0.7, top_k=3),
        SamplingParams(logit_bias={9: 100.0}),
        SamplingParams(temperature=1.0, top_p=0.5, typical_p=0.9),
    ]
    rows = rows_of(params)
    scores = process(torch.randn(4, VOCAB), rows)
    probs = distributions(scores, rows)
    torch.testing.assert_close(probs.sum(-1), torch.ones(4))
    assert probs[0].nonzero().flatten().tolist() == [int(scores[0].argmax())]
    assert probs[2].nonzero().flatten().tolist() == [9]
    assert probs[1].count_nonzero() == 3
    alone = distributions(scores[3:], rows[3:])
    torch.testing.assert_close(probs[3], alone[0])
    assert probs[2, 9] == 1


def test_distributions_of_nothing_are_nan() -> None:
    rows = rows_of([SamplingParams(), SamplingParams(temperature=1.0), SamplingParams()])
    scores = torch.randn(3, VOCAB)
    scores[0] = float("-inf")
    scores[1, 4] = float("nan")
    probs = distributions(scores, rows)
    assert probs[:2].isnan().all()
    assert probs[2].sum() == 1


def test_rows_of_nan_are_reported_and_others_are_not() -> None:
    logits = torch.randn(3, VOCAB)
    logits[1, 5] = float("nan")
    for params in (
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=1.0, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.1),
        SamplingParams(temperature=1.0, typical_p=0.9, frequency_penalty=1.0),
        SamplingParams(logit_bias={1: 1.0}),
    ):
        picked = sample(logits, rows_of([params] * 3))
        assert picked[1] is None
        assert picked[0] is not None
        assert picked[2] is not None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_allowed_is_reported(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, allowed_token_ids=[3], bad_words=[[3]])
    assert sample(torch.randn(1, 10), rows_of([params])) == [None]


def test_strings_to_avoid_need_their_token_ids() -> None:
    with pytest.raises(UserError, match="tokenizer"):
        SamplerState(SamplingParams(bad_words=["word"]))
    state = SamplerState(SamplingParams(bad_words=["word"]), bad_words=[[2]])
    assert sample(torch.tensor([[0.0, 1.0, 2.0]]), [Row(state, [0])]) == [1]


class Refusing:
    error = "token 3 is not expected"
    finished = False

    def fill(self, mask: torch.Tensor, draft: Sequence[int] = ()) -> bool:
        return False

    def accept(self, tokens: Sequence[int]) -> bool:
        return False


def test_a_matcher_in_error_allows_nothing_and_says_why() -> None:
    state = SamplerState(SamplingParams(), matcher=Refusing())
    rows = [Row(state, [1]), Row(SamplerState(SamplingParams()), [1])]
    assert sample(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), rows) == [None, 1]
    with pytest.raises(SmeltError, match="token 3 is not expected"):
        state.accept([3])
