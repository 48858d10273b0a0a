"""Text from tokens while they arrive: never half a character, never the start of a stop string.

A character may span several tokens, a token several characters, and decoders join words by looking
at neighbours. So a token is decoded together with the tokens of the previous piece, and what that
adds is the new piece. Joining all pieces gives exactly the decoding of all tokens at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

UNFINISHED = "\ufffd"  # what decoders put for bytes that are no character (yet)


class Decoder(Protocol):
    """What the detokenizer needs of a tokenizer."""

    def decode(self, token_ids: list[int]) -> str:
        """Text of these tokens, special tokens left out."""

    def is_byte(self, token_id: int) -> bool:
        """Whether this token is a single byte that joins its neighbours to a character."""

    def is_special(self, token_id: int) -> bool:
        """Whether `decode` leaves this token out."""


class Detokenizer:
    """Turns one growing list of tokens into pieces of final text.

    Runs of byte tokens (SentencePiece's byte fallback) are held until they end, because one wrong
    byte changes how the whole run decodes.
    """

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []  # those of the last piece, then those not yet printed
        self._printed = 0  # how many of them belong to the last piece
        self._printed_text = ""  # what these decode to on their own

    def push(self, token_id: int) -> str:
        """The text that this token makes final; often empty."""
        tokenizer = self._tokenizer
        if tokenizer.is_special(token_id):
            return ""
        self._tokens.append(token_id)
        if tokenizer.is_byte(token_id):
            return ""
        text = tokenizer.decode(self._tokens)
        before = self._printed_text
        if len(text) <= len(before) or text[-1] == UNFINISHED or not text.startswith(before):
            return ""
        del self._tokens[: self._printed]
        self._printed = len(self._tokens)
        self._printed_text = tokenizer.decode(self._tokens)
        return text[len(before) :]

    def finish(self) -> str:
        """The text still held, when no more tokens come."""
        if len(self._tokens) == self._printed:
            return ""
        text = self._tokenizer.decode(self._tokens)[len(self._printed_text) :]
        self._tokens, self._printed, self._printed_text = [], 0, ""
        return text


class TextStream:
    """A request's text: pieces from the detokenizer, cut before the first stop string.

    Text that may be the start of a stop string is held back until it cannot be one any more.
    `armed` False (before `min_tokens`) lets stop strings pass.
    """

    def __init__(self, tokenizer: Decoder, stop: Sequence[str] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = tuple(stop)
        self._held = ""

    def push(self, token_id: int, armed: bool = True) -> tuple[str, bool]:
        """Text that is final now, and whether a stop string was found (then nothing follows)."""
        return self._filter(self._detokenizer.push(token_id), armed)

    def finish(self, armed: bool = True) -> tuple[str, bool]:
        """The rest of the text when the tokens end, and whether a stop string was in it."""
        piece, stopped = self._filter(self._detokenizer.finish(), armed)
        if not stopped:
            piece += self._held
        self._held = ""
        return piece, stopped

    def _filter(self, piece: str, armed: bool) -> tuple[str, bool]:
        if not self._stop or not armed:
            held, self._held = self._held, ""
            return held + piece, False
        if not piece:
            return "", False
        text = self._held + piece
        starts = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if starts:
            self._held = ""
            return text[: min(starts)], True
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, shorter than `stop`."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
