"""Parameters are validated with one clear line each."""

from __future__ import annotations

import pytest

from smelt.runtime.errors import UserError
from smelt.runtime.sampling_params import (
    MAX_BAD_WORD_LENGTH,
    MAX_BAD_WORDS,
    MAX_STOP_LENGTH,
    SamplingParams,
)


def test_defaults_are_greedy() -> None:
    assert SamplingParams().greedy
    assert not SamplingParams(temperature=0.7).greedy


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("top_k", 2.5),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("seed", -1),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("min_tokens", -1),
        ("stop", ["", "x"]),
        ("stop", ["x" * (MAX_STOP_LENGTH + 1)]),
        ("stop", ["x"] * 100),
        ("stop_token_ids", [-3]),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("frequency_penalty", None),
        ("logit_bias", [1, 2]),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {1: float("nan")}),
        ("bad_words", "word"),
        ("bad_words", [""]),
        ("bad_words", [" "]),
        ("bad_words", [[]]),
        ("bad_words", [[-1]]),
        ("bad_words", [3]),
        ("bad_words", ["x" * (MAX_BAD_WORD_LENGTH + 1)]),
        ("bad_words", ["x"] * (MAX_BAD_WORDS + 1)),
        ("allowed_token_ids", [-1]),
        ("allowed_token_ids", 7),
        ("allowed_token_ids", "7"),
        ("typical_p", 0),
        ("typical_p", 1.1),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", True),
        ("prompt_logprobs", 21),
        ("n", 0),
        ("n", 65),
        ("n", 2),  # greedy: all answers would be one
        ("best_of", 0),
        ("best_of", 3),
        ("structured", {"regex": "a"}),
    ],
)
def test_wrong_values_are_refused_in_one_line(name: str, value: object) -> None:
    with pytest.raises(UserError) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert name.split("_")[0] in message


def test_min_tokens_above_max_tokens_names_both() -> None:
    with pytest.raises(UserError, match=r"9.*5"):
        SamplingParams(min_tokens=9, max_tokens=5)


def test_a_single_stop_string_is_one_string() -> None:
    assert SamplingParams(stop="END").stop == ("END",)


def test_best_of_is_at_least_n() -> None:
    assert SamplingParams(temperature=1.0, n=2, best_of=3).best_of == 3
    with pytest.raises(UserError, match=r"best_of is 2.*n \(3\)"):
        SamplingParams(temperature=1.0, n=3, best_of=2)


def test_limits_themselves_are_taken() -> None:
    params = SamplingParams(
        presence_penalty=-2,
        frequency_penalty=2,
        logit_bias={0: -100, 5: 100.0},
        bad_words=["word", [1, 2]],
        allowed_token_ids=[3, 1],
        typical_p=1.0,
        logprobs=0,
        prompt_logprobs=20,
        temperature=1.0,
        n=64,
        best_of=64,
    )
    assert params.bad_words == ("word", (1, 2))
    assert params.allowed_token_ids == (3, 1)
    assert hash(params) == hash(params)


@pytest.mark.parametrize(
    "fields",
    [{"logit_bias": {9: 1.0}}, {"allowed_token_ids": [3, 9]}, {"bad_words": ["w", [1, 9]]}],
)
def test_ids_beyond_the_vocabulary_are_named(fields: dict[str, object]) -> None:
    params = SamplingParams(**fields)  # type: ignore[arg-type]
    params.check_vocabulary(10)
    with pytest.raises(UserError, match=rf"{next(iter(fields))} has token id 9.* 9 tokens"):
        params.check_vocabulary(9)
