"""The needles of `smelt eval --needle` that any text can hide (`smelt.runtime.needle` asks them).

- `passkey`: a sentence says a random number of five digits, and the question asks for it
  (Mohtashami and Jaggi 2023, arXiv:2305.16300). Where the model has a chat template, text and
  question are a user's turn and the answer's first words are given.
- `repeat`: a sentence of the text is hidden, and its first half said again at the end; the answer
  is the second half. It asks for no more than copying, so it also measures models that cannot
  answer questions; other sentences of the text begin alike, so compare its gain.
"""

from __future__ import annotations

import re
from random import Random

from .chat_template import ChatTemplate
from .errors import UserError
from .needle import Haystack, Needle

_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+|\n+")
# Longer runs without a sentence end are cut, so that depths can be met.
_LONGEST = 400
# A sentence to repeat has so many words; one in so many is kept out of the haystack for it.
_WORDS = range(8, 17)
_KEPT_OUT = 10
_HIDDEN = "A pass key is hidden in the following text. Remember it.\n\n"
_QUESTION = "\nWhat is the pass key?"
_LEAD = "The pass key is"
# Stands for the user's text while a template is rendered.
_MARK = "\ue000"


def passkey(text: str, template: ChatTemplate | None = None) -> Haystack:
    """The pass key haystack. Raises UserError for an empty text and a template without its turn."""
    before, after = "", "\n"
    if template is not None:
        before, mark, after = template.render([{"role": "user", "content": _MARK}]).partition(_MARK)
        if not mark:
            raise UserError("the chat template leaves the user's text out: ask --needle repeat")

    def draw(rng: Random) -> Needle:
        key = f"{rng.randrange(10_000, 100_000)}"
        fact = f"The pass key is {key}. Remember it: {key} is the pass key. "
        return Needle(fact, f"{_QUESTION}{after}{_LEAD}", f" {key}")

    pieces = tuple(f"{sentence} " for sentence in _sentences(text))
    return Haystack("passkey", pieces, draw, before + _HIDDEN, special=template is None)


def repeat(text: str) -> Haystack:
    """The copying haystack. Raises UserError where the text has too few sentences for it."""
    sentences = _sentences(text)
    asked = [s for s in dict.fromkeys(sentences) if len(s.split()) in _WORDS][::_KEPT_OUT]
    pieces = tuple(f"{sentence} " for sentence in sentences if sentence not in set(asked))
    if not asked or not pieces:
        raise UserError(
            f"the text has {len(sentences)} sentences, none of {_WORDS[0]} to {_WORDS[-1]} words "
            "to hide: give a longer --text"
        )

    def draw(rng: Random) -> Needle:
        sentence = rng.choice(asked)
        words = sentence.split()
        half = len(words) // 2
        return Needle(f"{sentence} ", " ".join(words[:half]), " " + " ".join(words[half:]))

    return Haystack("repeat", pieces, draw)


def _sentences(text: str) -> list[str]:
    """The text's sentences, long ones cut, without what stands between them."""
    sentences = [
        sentence[at : at + _LONGEST]
        for sentence in _SENTENCE_END.split(text)
        for at in range(0, len(sentence), _LONGEST)
        if sentence.strip()
    ]
    if not sentences:
        raise UserError("the text is empty: give one with --text to hide needles in")
    return sentences
