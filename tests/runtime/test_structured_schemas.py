"""Whatever is sampled under a JSON schema validates, for hundreds of schemas and both libraries."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.fake_step import one_thread  # noqa: F401  (autouse fixture)
from helpers.grammars import (
    BACKENDS,
    demo_answers,
    random_schema,
    referring,
    suite_schemas,
    typed,
)

from smelt.runtime.errors import UserError
from smelt.runtime.structured import Structured

jsonschema = pytest.importorskip("jsonschema")


def check(cases: Iterator[tuple[str, Any]], backend: str) -> Counter[str]:
    """Answer each schema twice and validate; counts of what happened."""
    pytest.importorskip(backend)
    counts: Counter[str] = Counter()
    wrong = []
    for name, schema in cases:
        try:
            texts = demo_answers(Structured(json_schema=schema, backend=backend), count=2)
        except UserError as error:
            assert "\n" not in str(error)
            counts["refused"] += 1
            continue
        counts["compiled"] += 1
        for text in texts:
            counts["open" if text is None else "complete"] += 1
            if text is None:
                continue
            try:
                jsonschema.Draft202012Validator(schema).validate(json.loads(text))
            except (ValueError, jsonschema.ValidationError) as error:
                wrong.append((name, schema, text, str(error).split("\n")[0]))
    assert wrong == []
    return counts


@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_validate_against_the_test_suite(backend: str) -> None:
    # The validator reads patterns with Python's `re`, which has no \p.
    suite = [(name, s) for name, s in suite_schemas("draft2020-12") if "\\p" not in str(s)]
    counts = check(((name, typed(schema)) for name, schema in suite), backend)
    assert counts["compiled"] > {"xgrammar": 60, "llguidance": 120}[backend]
    assert counts["refused"] > 100  # the suite is mostly of keywords that few libraries enforce
    assert counts["complete"] > 0.95 * (counts["complete"] + counts["open"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_validate_against_schemas_of_applications(backend: str) -> None:
    rng = random.Random(0)
    cases = [(f"random {i}", random_schema(rng)) for i in range(120)]
    cases += [(f"referring {i}", referring(rng)) for i in range(30)]
    counts = check(iter(cases), backend)
    assert counts["refused"] < 10
    assert counts["complete"] > 0.95 * (counts["complete"] + counts["open"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_object(backend: str) -> None:
    pytest.importorskip(backend)
    texts = demo_answers(Structured(json_object=True, backend=backend), count=12)
    complete = [text for text in texts if text is not None]
    assert len(complete) > 8
    assert all(isinstance(json.loads(text), dict) for text in complete)
    assert len(set(complete)) > 1


def test_a_schema_that_only_one_library_enforces_goes_to_it() -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "patternProperties": {"^[ab]{2}$": {"type": "integer", "multipleOf": 7}},
        "additionalProperties": False,
    }
    with pytest.raises(UserError, match="patternProperties"):
        demo_answers(Structured(json_schema=schema, backend="xgrammar"))
    for text in demo_answers(Structured(json_schema=schema), count=6):
        assert text is not None
        for key, value in json.loads(text).items():
            assert key in ("aa", "ab", "ba", "bb")
            assert value % 7 == 0
