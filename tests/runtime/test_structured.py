"""A description of structured output is checked before any grammar library sees it."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from smelt.runtime.errors import UserError
from smelt.runtime.structured import MAX_CHOICES, MAX_NESTING, MAX_TEXT, Structured


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "none: give exactly one"),
        ({"regex": "a", "choice": ["a"]}, "regex, choice: give exactly one"),
        ({"regex": "a", "backend": "outlines"}, "backend is 'outlines'"),
        ({"json_schema": "{"}, "not JSON"),
        ({"json_schema": "[" * 100_000}, "not JSON"),
        ({"json_schema": "[]"}, "is a list"),
        ({"json_schema": {"const": float("nan")}}, "not JSON"),
        ({"json_schema": {"const": object()}}, "not JSON"),
        ({"json_schema": nested(MAX_NESTING)}, "deeper than"),
        ({"json_schema": nested(5000)}, "deeper than"),
        ({"json_schema": json.dumps({"title": "x" * MAX_TEXT})}, "characters"),
        ({"json_schema": {"title": "x" * MAX_TEXT}}, "characters"),
        ({"regex": ""}, "one character or more"),
        ({"regex": 5}, "one character or more"),
        ({"regex": "a\0"}, "NUL"),
        ({"regex": "(" * 100 + ")" * 100}, "deeper than"),
        ({"regex": "x" * (MAX_TEXT + 1)}, "characters"),
        ({"grammar": "root ::= " + "(" * 100 + '"a"' + ")" * 100}, "deeper than"),
        ({"choice": []}, "one or more strings"),
        ({"choice": "abc"}, "one or more strings"),
        ({"choice": ["a", ""]}, "one or more strings"),
        ({"choice": ["a", 3]}, "one or more strings"),
        ({"choice": [str(i) for i in range(MAX_CHOICES + 1)]}, "at most"),
        ({"json_object": 1}, "json_object is 1"),
    ],
)
def test_wrong_descriptions_are_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Structured(**fields)
    assert "\n" not in str(caught.value)
    assert "structured" in str(caught.value)


def test_a_schema_is_the_same_as_text_and_as_dict() -> None:
    one = Structured(json_schema={"type": "integer"})
    two = Structured(json_schema='{ "type" : "integer" }')
    assert one == two
    assert hash(one) == hash(two)
    assert (one.kind, one.text) == ("json_schema", '{"type": "integer"}')
    assert copy.replace(one) == one if hasattr(copy, "replace") else copy.copy(one) == one


def test_choices_are_kept_once_each() -> None:
    assert json.loads(Structured(choice=["b", "a", "b"]).text) == ["b", "a"]
