"""Parameters are validated with one clear line each."""

from __future__ import annotations

import pytest

from smelt.runtime.errors import UserError
from smelt.runtime.sampling_params import MAX_STOP_LENGTH, SamplingParams


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
