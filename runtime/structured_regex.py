"""Which regular expressions a grammar library reads as Python's `re.fullmatch` does.

Both libraries accept expressions that they read differently: xgrammar lets `.` match a newline,
ignores anchors inside an expression and negates classes in ASCII; in llguidance (Rust's syntax)
`&&` and `[` are operators inside a class. Such an expression is rewritten or refused here.
"""

from __future__ import annotations

from .errors import UserError

_ESCAPED = {"xgrammar": set("dwsntrfvxu"), "llguidance": set("dDwWsSntrfvxu")}
_QUANTIFIERS = "*+?}"


def portable_regex(regex: str, backend: str) -> str:
    """The expression in the library's own terms; `UserError` where it would be read differently."""
    out: list[str] = []
    inside = False  # a class of characters
    place = 0
    while place < len(regex):
        character = regex[place]
        width = 1
        if character == "\\":
            width = 2
            _check_escape(regex[place + 1 : place + 2], backend)
        elif inside:
            character = _in_class(regex, place, backend)
            inside = regex[place] != "]"
        elif character == "[":
            inside = True
            start = place + 1 + regex.startswith("^", place + 1)
            width = start - place
            if regex.startswith("]", start):
                _refuse("a ] right after [, which needs a \\ before it", backend)
        elif (character == "^" and place > 0) or (character == "$" and place < len(regex) - 1):
            _refuse(f"{character} elsewhere than at its end", backend)
        elif character == "(" and regex.startswith("?", place + 1):
            if not regex.startswith("(?:", place):
                _refuse(f"the group {regex[place : place + 3]}...", backend)
            width = 3
        elif character in "*+" and place and regex[place - 1] in _QUANTIFIERS:
            if regex[place - 2 : place - 1] != "\\":
                _refuse(f"the quantifier {regex[place - 1 : place + 1]}", backend)
        elif character == "." and backend == "xgrammar":
            character = "[^\\n]"
        if ord(character[0]) < 32:
            character = f"\\x{ord(character):02x}"
        out.append(character if width == 1 else regex[place : place + width])
        place += width
    return "".join(out)


def _check_escape(letter: str, backend: str) -> None:
    known = not letter.isalnum() or letter in _ESCAPED[backend]
    if not letter or not letter.isascii() or not known:
        _refuse(f"\\{letter}", backend)


def _in_class(regex: str, place: int, backend: str) -> str:
    character = regex[place]
    if backend == "llguidance" and character in "[&~-":
        # Python has no operators in a class, Rust has; - keeps its meaning unless it is doubled.
        if character == "-":
            if regex[place + 1 : place + 2] == "-":
                _refuse("-- in a class", backend)
        else:
            return f"\\{character}"
    return character


def _refuse(what: str, backend: str) -> None:
    other = "llguidance" if backend == "xgrammar" else "xgrammar"
    raise UserError(f"it would not read {what} as Python does, {other} may")
