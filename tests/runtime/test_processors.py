"""What comes before the temperature equals transformers' processors, and follows a history."""

from __future__ import annotations

import pytest
import torch
from helpers.fake_step import one_thread  # noqa: F401  (autouse fixture)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from smelt.runtime.errors import UserError
from smelt.runtime.processors import BadWords, encode_bad_words, process
from smelt.runtime.sampler import Row, SamplerState
from smelt.runtime.sampling_params import SamplingParams

VOCAB, PROMPT = 31, 5  # few tokens, so that histories repeat them and complete bad words
ENDS = [7, 11]

TOKEN = st.integers(0, VOCAB - 1)
PARAMS = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 1.5, -0.25]),
    logit_bias=st.dictionaries(TOKEN, st.floats(-100, 100, width=32), max_size=3),
    bad_words=st.lists(st.lists(TOKEN, min_size=1, max_size=3), max_size=4),
    allowed_token_ids=st.one_of(st.just([]), st.lists(TOKEN, min_size=1, max_size=20)),
    min_tokens=st.sampled_from([0, 0, 3, 8]),
)


def reference(logits: torch.Tensor, params: SamplingParams, history: list[int]) -> torch.Tensor:
    """[V]: transformers' processors one after the other, and the two penalties' own formula."""
    ids = torch.tensor([history])
    first = LogitsProcessorList()
    if params.repetition_penalty != 1:
        first.append(RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    scores = first(ids, logits[None].clone())
    for token in range(VOCAB):
        count = history[PROMPT:].count(token)
        scores[0, token] -= params.frequency_penalty * count
        scores[0, token] -= params.presence_penalty * (count > 0)
    rest = LogitsProcessorList()
    if params.logit_bias:
        rest.append(SequenceBiasLogitsProcessor([[[t], b] for t, b in params.logit_bias.items()]))
    if params.bad_words:
        rest.append(NoBadWordsLogitsProcessor([list(word) for word in params.bad_words]))
    if params.allowed_token_ids:
        allowed = list(params.allowed_token_ids)
        rest.append(PrefixConstrainedLogitsProcessor(lambda _batch, _ids: allowed, 1))
    if params.min_tokens:
        rest.append(MinNewTokensLengthLogitsProcessor(PROMPT, params.min_tokens, ENDS))
    return rest(ids, scores)[0]


def row(params: SamplingParams, history: list[int], draft: tuple[int, ...] = ()) -> Row:
    return Row(SamplerState(params, PROMPT, ENDS), history, draft)


def random_case(seed: int, count: int) -> tuple[torch.Tensor, list[list[int]]]:
    make = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, VOCAB, generator=make) * 3
    lengths = torch.randint(PROMPT, PROMPT + 12, (count,), generator=make).tolist()
    return logits, [torch.randint(0, VOCAB, (n,), generator=make).tolist() for n in lengths]


@settings(max_examples=150, deadline=None)
@given(st.lists(PARAMS, min_size=1, max_size=6), st.integers(0, 10**6))
def test_scores_equal_transformers(params: list[SamplingParams], seed: int) -> None:
    logits, histories = random_case(seed, len(params))
    before = logits.clone()
    ours = process(logits, [row(p, h) for p, h in zip(params, histories, strict=True)])
    assert torch.equal(logits, before)
    for i, p in enumerate(params):
        if not ours[i].isfinite().any():
            # Whatever is allowed is forbidden, too: we report that, transformers takes a token.
            assert p.allowed_token_ids and (p.bad_words or p.min_tokens)
            continue
        expected = reference(logits[i], p, histories[i])
        torch.testing.assert_close(ours[i], expected, atol=1e-4, rtol=1e-5)


@settings(max_examples=80, deadline=None)
@given(PARAMS, st.lists(PARAMS, max_size=5), st.integers(0, 10**6))
def test_a_row_does_not_depend_on_the_others(
    mine: SamplingParams, others: list[SamplingParams], seed: int
) -> None:
    logits, histories = random_case(seed, len(others) + 1)
    place = seed % (len(others) + 1)
    params = [*others[:place], mine, *others[place:]]
    rows = [row(p, h) for p, h in zip(params, histories, strict=True)]
    alone = process(logits[place : place + 1], [row(mine, histories[place])])
    assert torch.equal(process(logits, rows)[place], alone[0])


@settings(max_examples=80, deadline=None)
@given(PARAMS, st.lists(TOKEN, max_size=5), st.integers(0, 10**6))
def test_rows_behind_drafts_see_them_as_history(
    params: SamplingParams, draft: list[int], seed: int
) -> None:
    """And leave nothing behind: the same state serves the shorter draft afterwards."""
    logits, (history,) = random_case(seed, 1)
    state = SamplerState(params, PROMPT, ENDS)
    for length in (len(draft), 0, len(draft) // 2):
        rows = [Row(state, history, tuple(draft[:n])) for n in range(length + 1)]
        scores = process(logits.expand(length + 1, -1), rows)
        for n in range(length + 1):
            expected = process(logits, [row(params, history + draft[:n])])
            torch.testing.assert_close(scores[n], expected[0])


@settings(max_examples=40, deadline=None)
@given(PARAMS, st.lists(st.lists(TOKEN, max_size=3), min_size=2, max_size=5), st.integers(0, 99))
def test_a_state_follows_its_growing_history(
    params: SamplingParams, steps: list[list[int]], seed: int
) -> None:
    logits, (history,) = random_case(seed, 1)
    state = SamplerState(params, PROMPT, ENDS)
    for new in steps:
        history.extend(new)
        ours = process(logits, [Row(state, history)])
        torch.testing.assert_close(ours, process(logits, [row(params, list(history))]))


def test_kept_rows_are_not_made_again() -> None:
    """A step looks at its new tokens only: the old ones could be anything by then."""
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=1.0)
    state = SamplerState(params, 2)
    logits = torch.ones(1, 10)
    process(logits, [Row(state, [1, 2, 3, 3])])
    scores = process(logits, [Row(state, [9, 9, 9, 9, 4])])
    assert scores[0].tolist() == [1, 0.5, 0.5, -1.5, -0.5, 1, 1, 1, 1, 1]


def test_nothing_is_copied_where_nothing_changes() -> None:
    logits = torch.randn(2, VOCAB)
    rows = [row(SamplingParams(temperature=t), [1] * PROMPT) for t in (0.0, 1.0)]
    assert process(logits, rows) is logits


def test_half_precision_is_processed_in_float32() -> None:
    logits = torch.randn(1, VOCAB).bfloat16()
    params = SamplingParams(logit_bias={3: 0.001})
    scores = process(logits, [row(params, [1] * PROMPT)])
    assert scores.dtype == torch.float32
    assert scores[0, 3] == logits[0, 3].float() + torch.tensor(0.001)


class Words:
    """A tokenizer of whole words; one with a space before it has the next id."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = {"bad": 10, "apple": 20, " apple": 21}
        if text in ids:
            return [ids[text]]
        return [30, 10] if text == " bad" else []


def test_strings_are_encoded_with_and_without_a_space() -> None:
    assert encode_bad_words(["apple"], Words()) == [[20], [21]]
    assert encode_bad_words([" apple", "bad", (1, 2)], Words()) == [
        [20],
        [21],
        [10],
        [30, 10],
        [1, 2],
    ]


@pytest.mark.parametrize(
    ("words", "tokenizer", "message"),
    [
        (["apple"], None, "'apple': give a tokenizer"),
        (["apple"], Words(), "token id 20.* has 15"),
        (["unknown"], Words(), "no tokens"),
    ],
)
def test_words_that_cannot_be_encoded_are_named(
    words: list[str], tokenizer: object, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        encode_bad_words(words, tokenizer, 15)


def test_a_word_is_found_across_history_and_draft() -> None:
    words = BadWords([[1, 2, 3], [2, 4], [5]])
    assert words.next([1], [2]) == [3, 4]
    assert words.next([0, 2], []) == [4]
    assert words.next([1, 2], [0]) == []
    assert words.next([], []) == []
