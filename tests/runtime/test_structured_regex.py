"""Expressions mean what Python's `re.fullmatch` says, or are refused."""

from __future__ import annotations

import re

import pytest
from helpers.fake_step import one_thread  # noqa: F401  (autouse fixture)
from helpers.grammars import BACKENDS, demo_answers

from smelt.runtime.errors import UserError
from smelt.runtime.structured import Structured
from smelt.runtime.structured_regex import portable_regex

REGEXES = [
    "[a-c]{2,5}d?",
    "^(yes|no)$",
    r"\d{3}-\d{4}",
    r"[A-Z][a-z]+( [A-Z][a-z]+)*",
    "(a|bc)*",
    "a.c.",
    "[^a-z\n]{3}",
    r"\w{1,9}@\w{1,9}\.(com|org)",
    r"[\w.-]{1,8}\s[A-Z]",
    "é+[ü-ÿ]",
    r"\{\"x\": [0-9]+\}",
    "a+?b*?c??",
    "(?:ab){2}|x",
    r"[\]\[\\^-]{4}",
    "",
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("regex", [r for r in REGEXES if r])
def test_answers_match_in_full(regex: str, backend: str) -> None:
    pytest.importorskip(backend)
    texts = demo_answers(Structured(regex=regex, backend=backend), count=6, most=200)
    complete = [text for text in texts if text is not None]
    assert len(complete) >= 5
    assert [text for text in complete if not re.fullmatch(regex, text)] == []


@pytest.mark.parametrize(
    ("regex", "backends"),
    [
        ("x^y", BACKENDS),
        ("a$b", BACKENDS),
        ("(^a|b)", BACKENDS),
        (r"\Aab\Z", BACKENDS),
        (r"a\b", BACKENDS),
        (r"(a)\1", BACKENDS),
        (r"\0", BACKENDS),
        (r"\p{L}", BACKENDS),
        ("a\\", BACKENDS),
        ("a++", BACKENDS),
        ("a**", BACKENDS),
        ("a{2}+", BACKENDS),
        ("[]a]", BACKENDS),
        ("[^]a]", BACKENDS),
        ("(?=a)b", BACKENDS),
        ("(?P<n>a)", BACKENDS),
        ("(?x)a b", BACKENDS),
        (r"\W", ["xgrammar"]),
        (r"a\S", ["xgrammar"]),
        (r"[\D]", ["xgrammar"]),
        ("[a--b]", ["llguidance"]),
    ],
)
def test_what_would_be_read_differently_is_refused(regex: str, backends: list[str]) -> None:
    for backend in BACKENDS:
        if backend in backends:
            with pytest.raises(UserError, match="as Python does"):
                portable_regex(regex, backend)
        else:
            assert portable_regex(regex, backend) == regex


def test_what_has_another_spelling_is_rewritten() -> None:
    assert portable_regex(r"a.\.[.]", "xgrammar") == r"a[^\n]\.[.]"
    assert portable_regex("[\n]\t", "xgrammar") == r"[\x0a]\x09"
    assert portable_regex("a.", "llguidance") == "a."
    assert portable_regex("[a&&b[~]", "llguidance") == r"[a\&\&b\[\~]"
    assert portable_regex("[a&&b]", "xgrammar") == "[a&&b]"
    assert portable_regex(r"\++", "xgrammar") == r"\++"
