"""Drafts from the text itself: what followed the last few tokens the last time they occurred.

Prompt lookup (Saxena 2023) over prompt and answer: summaries, edits and code repeat their input, so
a free draft is often right. It has no model and no state but an index that grows with the text.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

from ..sequence import Sequence
from .drafter import Proposal

LONGEST, SHORTEST = 4, 2


class _Index:
    """Where each run of n tokens was last seen: its end, for n from SHORTEST to LONGEST."""

    def __init__(self) -> None:
        self.ends: dict[tuple[int, ...], int] = {}
        self.done = 0

    def grow(self, tokens: list[int]) -> None:
        """Enter runs that end before the last token: the last has no successor yet."""
        if self.done > len(tokens):  # another sequence's tokens, or a shorter text
            self.__init__()  # type: ignore[misc]
        for end in range(self.done + 1, len(tokens)):
            for n in range(SHORTEST, min(LONGEST, end) + 1):
                self.ends[tuple(tokens[end - n : end])] = end
        self.done = max(self.done, len(tokens) - 1)


class NgramDrafter:
    """The tokens after the latest earlier occurrence of the longest matching suffix."""

    name = "ngram"

    def __init__(self) -> None:
        self._indexes: dict[Sequence, _Index] = {}

    def propose(self, sequences: Items[Sequence], counts: Items[int]) -> list[Proposal | None]:
        return [self._one(s, count) for s, count in zip(sequences, counts, strict=True)]

    def _one(self, sequence: Sequence, count: int) -> Proposal | None:
        tokens = sequence.tokens
        index = self._indexes.setdefault(sequence, _Index())
        index.grow(tokens)
        for n in range(min(LONGEST, len(tokens) - 1), SHORTEST - 1, -1):
            at = index.ends.get(tuple(tokens[-n:]))
            if at is not None:
                found = tokens[at : at + count]
                # A period shorter than the draft goes on repeating.
                while len(found) < count:
                    found += found[: count - len(found)]
                return Proposal(found)
        return None

    def observe(self, sequence: Sequence, position: int, features: Any) -> None: ...

    def drop(self, sequence: Sequence) -> None:
        self._indexes.pop(sequence, None)
