"""What xgrammar does not enforce is found before it compiles something weaker."""

from __future__ import annotations

import re
from typing import Any

import pytest

from smelt.runtime.structured_schema import for_xgrammar, nested_id, unenforced

PERSON = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Person",
    "x-order": 1,
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "age": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}], "default": None},
        "kind": {"type": "string", "enum": ["a", "b"]},
        "not": {"type": "boolean"},
        "parts": {"type": "array", "items": {"$ref": "#/$defs/Part"}, "maxItems": 3},
        "code": {"type": "string", "pattern": "^[A-Z]{2}-\\d+(a|b)$"},
    },
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"Part": {"type": ["integer", "string"], "description": "one"}},
}


@pytest.mark.parametrize("schema", [True, {}, {"title": "x"}, PERSON, {"const": [1]}])
def test_schemas_that_are_enforced_in_full(schema: Any) -> None:
    assert unenforced(schema) is None


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (False, "the schema false"),
        ({"not": {"type": "integer"}}, "not without a type"),
        ({"type": "integer", "not": {"const": 3}}, "not of type integer"),
        ({"if": {}, "then": {}}, "if without a type"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {}}, "contains"),
        ({"type": "array", "items": [{}]}, "items that is a list"),
        ({"type": "array", "prefixItems": [{}], "minItems": 3}, "prefixItems beside"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": {}}, "beside prop"),
        ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, "required"),
        ({"type": "object", "properties": {"a": {"not": {}}}}, "not without"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"properties": {"a": {}}}, "properties without a type"),
        ({"minimum": 2}, "minimum without a type"),
        ({"type": "integer", "multipleOf": 3}, "multipleOf"),
        ({"type": "integer", "minLength": 3}, "minLength of type integer"),
        ({"type": ["integer", "string"], "minimum": 3}, "minimum beside several types"),
        ({"type": "whole"}, "type 'whole'"),
        ({"type": "string", "enum": [1]}, "another type"),
        ({"enum": [1], "minimum": 0}, "enum beside minimum"),
        ({"anyOf": [{"type": "integer"}], "type": "integer"}, "anyOf beside type"),
        ({"oneOf": [{}]}, "oneOf without a type"),
        ({"$ref": "http://example.org/x"}, "\\$ref 'http"),
        ({"$ref": "#/$defs/a", "minimum": 2}, "\\$ref beside minimum"),
        ({"$defs": {"a": {"not": {}}}}, "not without"),
        ({"type": "string", "format": "date"}, "format 'date'"),
        ({"type": "string", "pattern": "a"}, "without \\^ and \\$"),
        ({"type": "string", "pattern": "^a|b$"}, "the pattern"),
        ({"type": "string", "pattern": "^[^a]$"}, "the pattern"),
        ({"type": "string", "pattern": "^.$"}, "the pattern"),
        ({"type": "string", "pattern": "^a\\Wb$"}, "the pattern"),
        ({"type": "string", "pattern": "^a$", "maxLength": 3}, "pattern beside"),
        ({"type": "string", "minLength": 1.0}, "a length"),
        ({"properties": []}, "properties that is no object"),
        ({"anyOf": {}}, "anyOf that is no list"),
        ({"type": "array", "items": 3}, "a schema that is 3"),
    ],
)
def test_what_is_not_enforced_is_named(schema: Any, reason: str) -> None:
    found = unenforced(schema)
    assert found is not None
    assert re.search(reason, found)


def test_lengths_become_patterns_and_data_stays() -> None:
    schema = {
        "properties": {"minLength": {"type": "string", "minLength": 2}},
        "items": {"type": "string", "maxLength": 3},
        "enum": [{"type": "string", "minLength": 2}],
    }
    found = for_xgrammar(schema)
    assert found["properties"]["minLength"]["pattern"].endswith("){2,}$")
    assert found["items"]["pattern"].endswith("){0,3}$")
    assert found["enum"] == schema["enum"]


def test_identities_below_the_top() -> None:
    assert nested_id({"$defs": {"a": {"$id": "x"}}})
    assert nested_id({"anyOf": [{"id": "x"}]})
    assert not nested_id({"$id": "x", "properties": {"id": {"type": "string"}}})
    assert not nested_id({"items": {"default": {"id": "x"}, "enum": [{"$id": "y"}]}})
