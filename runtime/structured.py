"""What a request's text has to match: a JSON schema, a regular expression, a grammar, or a list.

Only the description and its checks, without torch or a grammar library: `structured_compiler`
turns it into masks over the vocabulary, and imports a library when the first request asks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import UserError

BACKENDS = ("auto", "xgrammar", "llguidance")
KINDS = ("json_schema", "regex", "grammar", "choice", "json_object")

# Longer descriptions are refused before any library reads them.
MAX_TEXT = 1 << 20  # characters
MAX_NESTING = 64  # levels of a schema, or of brackets in a regex or grammar
MAX_CHOICES = 10_000


@dataclass(frozen=True)
class Structured:
    """Exactly one of the five kinds, checked here; `UserError` with one line where it is wrong.

    json_schema: a JSON schema, as a dict or as text; the answer is a JSON value that validates.
    regex: a regular expression that the whole answer matches (`re.fullmatch`); no lookaround, no
    back references.
    grammar: EBNF of llama.cpp's GBNF form, with a rule `root`.
    choice: strings, the answer is one of them.
    json_object: True asks for any JSON object.
    backend: "xgrammar" (Dong et al. 2024), "llguidance", or "auto": xgrammar where it honours every
    keyword of the schema, llguidance otherwise.

    `kind` and `text` are what is left after the checks: the name of the kind and its description
    as text (of a schema, its JSON; of choices, a JSON list).
    """

    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: Sequence[str] | None = None
    json_object: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            found = ", ".join(given) if given else "none"
            raise UserError(f"structured has {found}: give exactly one of {', '.join(KINDS)}")
        if self.backend not in BACKENDS:
            raise UserError(
                f"structured backend is {self.backend!r}: give one of {', '.join(BACKENDS)}"
            )
        kind = given[0]
        text = getattr(self, f"_{kind}")()
        if len(text) > MAX_TEXT:
            raise UserError(f"structured {kind} has {len(text)} characters, at most {MAX_TEXT}")
        object.__setattr__(self, "_text", text)
        object.__setattr__(self, "_kind", kind)
        # The text says it all, and a dict would make this unhashable.
        if kind == "json_schema":
            object.__setattr__(self, "json_schema", text)

    @property
    def kind(self) -> str:
        return str(self.__dict__["_kind"])

    @property
    def text(self) -> str:
        return str(self.__dict__["_text"])

    def _json_schema(self) -> str:
        schema = self.json_schema
        if isinstance(schema, str):
            if len(schema) > MAX_TEXT:
                return schema
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"structured json_schema is not JSON ({error}): give a schema as JSON or dict"
                ) from error
        if not isinstance(schema, (Mapping, bool)):
            raise UserError(
                f"structured json_schema is a {type(schema).__name__}: give a JSON object"
            )
        if _depth(schema) > MAX_NESTING:
            raise UserError(
                f"structured json_schema nests deeper than {MAX_NESTING} levels: "
                "give a flatter schema, or name parts of it in $defs"
            )
        try:
            return json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"structured json_schema is not JSON ({error}): give JSON values only"
            ) from error

    def _regex(self) -> str:
        return _bracketed("regex", self.regex)

    def _grammar(self) -> str:
        return _bracketed("grammar", self.grammar)

    def _choice(self) -> str:
        choice = self.choice
        fits = isinstance(choice, Sequence) and not isinstance(choice, (str, bytes))
        if not fits or not choice or not all(isinstance(c, str) and c for c in choice):
            raise UserError("structured choice: give a list of one or more strings, none empty")
        if len(choice) > MAX_CHOICES:
            raise UserError(f"structured choice has {len(choice)} strings, at most {MAX_CHOICES}")
        object.__setattr__(self, "choice", tuple(dict.fromkeys(choice)))
        return json.dumps(self.choice)

    def _json_object(self) -> str:
        if self.json_object is not True:
            raise UserError(f"structured json_object is {self.json_object!r}: give True, or leave")
        return '{"type": "object"}'


def _depth(value: Any) -> int:
    """Levels of mappings and lists, without recursion; stops counting behind the limit."""
    level, depth = [value], 0
    while level and depth <= MAX_NESTING:
        below: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                below += item.values()
            elif isinstance(item, (list, tuple)):
                below += item
        level, depth = below, depth + 1
    return depth


def _bracketed(kind: str, text: Any) -> str:
    """A regex or grammar as it is, unless empty or nested too deeply."""
    if not isinstance(text, str) or not text:
        raise UserError(f"structured {kind} is {text!r}: give a string of one character or more")
    if "\0" in text:
        raise UserError(f"structured {kind} holds a NUL character: leave it out")
    depth = most = 0
    for character in text[: MAX_TEXT + 1]:
        depth += (character in "([{") - (character in ")]}")
        most = max(most, depth)
    if most > MAX_NESTING:
        raise UserError(f"structured {kind} nests deeper than {MAX_NESTING} brackets: flatten it")
    return text
