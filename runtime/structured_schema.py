"""Which JSON schemas xgrammar honours in full.

xgrammar compiles more than it enforces: `not`, `if`, `dependentRequired` and others are ignored
without a word, and of keywords that meet in one schema sometimes only one counts. So a schema goes
to it only if it consists of what this file knows to be enforced. (llguidance refuses by itself.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from .errors import UserError
from .structured_regex import portable_regex

_BY_TYPE = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties", "maxProperties"},
    "boolean": set[str](),
    "null": set[str](),
}
# Every keyword that says something; others are annotations, which a validator ignores too.
_OTHERS = """$ref $dynamicRef $recursiveRef $id $anchor $dynamicAnchor $recursiveAnchor id type enum
    const allOf anyOf oneOf not if then else dependentSchemas dependentRequired dependencies
    contains minContains maxContains uniqueItems propertyNames patternProperties minProperties
    unevaluatedItems unevaluatedProperties additionalItems multipleOf extends disallow
    divisibleBy"""
_MEANING = frozenset(_OTHERS.split()).union(*_BY_TYPE.values())

_PLAIN_ESCAPE = re.compile(r"\\[dw.\-+*?()\[\]{}^$|]")
_BRACKETS = re.compile(r"\(.*\)", re.DOTALL)
# One character of a JSON string, as it is written: itself, or escaped.
_CHARACTER = r'([^"\\\x00-\x1f]|\\["\\/bfnrt])'


def for_xgrammar(schema: Any) -> Any:
    """The schema with lengths of strings written as patterns; it must have passed `unenforced`.

    xgrammar lets strings of a bounded length have control characters, which are not JSON.
    """
    if isinstance(schema, list):
        return [for_xgrammar(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for name, value in schema.items():
        if name in ("properties", "$defs", "definitions"):
            found[name] = {key: for_xgrammar(part) for key, part in value.items()}
        else:
            found[name] = value if name in ("enum", "const") else for_xgrammar(value)
    if schema.get("type") == "string" and {"minLength", "maxLength"} & schema.keys():
        least, most = found.pop("minLength", 0), found.pop("maxLength", "")
        found["pattern"] = f"^{_CHARACTER}{{{least},{most}}}$"
    return found


def nested_id(schema: Any) -> bool:
    """Whether a part of the schema has an identity of its own, which changes what $ref means."""
    pending, root = [schema], True
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            if not root and isinstance(part.get("$id", part.get("id")), str):
                return True
            data = ("enum", "const", "default", "examples")
            pending += [value for name, value in part.items() if name not in data]
        elif isinstance(part, list):
            pending += part
        root = False
    return False


def unenforced(schema: Any) -> str | None:
    """What of the schema xgrammar would not enforce, in a few words; None if it enforces all."""
    pending = [schema]
    while pending:
        part = pending.pop()
        if part is True:
            continue
        if not isinstance(part, dict):
            return "the schema false" if part is False else f"a schema that is {part!r:.40}"
        if reason := _one(part):
            return reason
        pending += _below(part)
    return None


def _below(schema: dict[str, Any]) -> Iterator[Any]:
    for name in ("$defs", "definitions", "properties"):
        yield from schema.get(name, {}).values()
    for name in ("anyOf", "prefixItems"):
        yield from schema.get(name, ())
    for name in ("items", "additionalProperties"):
        if schema.get(name, False) is not False:
            yield schema[name]


def _one(schema: dict[str, Any]) -> str | None:
    """The same of one schema, without those below it."""
    for name in ("$defs", "definitions", "properties"):
        if not isinstance(schema.get(name, {}), dict):
            return f"{name} that is no object"
    words = {word for word in schema if word in _MEANING}
    for name in ("$ref", "anyOf", "enum", "const"):
        if name in words and len(words - ({"type"} if name in ("enum", "const") else set())) > 1:
            return f"{name} beside {', '.join(sorted(words - {name}))}"
    if "$ref" in words:
        fits = isinstance(schema["$ref"], str) and schema["$ref"].startswith("#")
        plain = fits and not {"%", "~"} & set(schema["$ref"])
        return None if plain else f"$ref {schema['$ref']!r:.60}"
    if "anyOf" in words:
        fits = isinstance(schema["anyOf"], list) and bool(schema["anyOf"])
        return None if fits else "anyOf that is no list"
    if "enum" in words or "const" in words:
        values = schema["enum"] if "enum" in words else [schema["const"]]
        fits = isinstance(values, list) and "type" in words
        if "type" in words and not (fits and all(_is(v, schema["type"]) for v in values)):
            return "enum or const with values of another type"
        return None
    return _typed(schema, words)


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of exactly this one type."""
    types = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
    return types.get(type(value)) == kind


def _typed(schema: dict[str, Any], words: set[str]) -> str | None:
    if "type" not in words:
        return f"{min(words)} without a type" if words else None
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not types or not all(isinstance(t, str) and t in _BY_TYPE for t in types):
        return f"type {schema['type']!r:.60}"
    if len(types) > 1 and words != {"type"}:
        return f"{min(words - {'type'})} beside several types"
    if wrong := words - {"type"} - set().union(*(_BY_TYPE[t] for t in types)):
        return f"{min(wrong)} of type {types[0]}"
    return {"string": _string, "array": _array, "object": _object}.get(types[0], _nothing)(schema)


def _nothing(schema: dict[str, Any]) -> str | None:
    return None


def _string(schema: dict[str, Any]) -> str | None:
    words = schema.keys() & _BY_TYPE["string"]
    if "format" in words:
        return f"format {schema['format']!r:.60}"
    lengths = [schema[name] for name in ("minLength", "maxLength") if name in words]
    if any(type(length) is not int or length < 0 for length in lengths):
        return "a length that is no whole number"
    if "pattern" not in words:
        return None
    if len(words) > 1:
        return "pattern beside a length"
    pattern = schema["pattern"]
    if not isinstance(pattern, str) or not (pattern.startswith("^") and pattern.endswith("$")):
        return "a pattern without ^ and $ at its ends"
    # A class that excludes would match characters that need an escape in JSON, and alternatives
    # outside brackets would take the anchors apart.
    bare = _PLAIN_ESCAPE.sub("x", pattern)
    outside = _BRACKETS.sub("", bare)
    if any(part in bare for part in (".", "[^", "\\", '"')) or "|" in outside:
        return f"the pattern {pattern!r:.60}"
    try:
        portable_regex(pattern, "xgrammar")
    except UserError:
        return f"the pattern {pattern!r:.60}"
    return None


def _array(schema: dict[str, Any]) -> str | None:
    if isinstance(schema.get("items"), list):
        return "items that is a list"
    if not isinstance(schema.get("prefixItems", []), list):
        return "prefixItems that is no list"
    if "prefixItems" in schema and schema.keys() & {"minItems", "maxItems"}:
        return "prefixItems beside a number of items"
    return None


def _object(schema: dict[str, Any]) -> str | None:
    named = schema.get("properties", {})
    more = schema.get("additionalProperties", False)
    required = schema.get("required", [])
    if named and more is not False:
        # A property that was left out could come back as an additional one, of any type.
        return "additionalProperties beside properties"
    if not isinstance(required, list) or not set(required) <= set(named):
        return "required properties that are not among its properties"
    if "maxProperties" in schema and named:
        return "maxProperties beside properties"
    return None
