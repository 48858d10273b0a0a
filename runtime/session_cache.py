"""Caches kept between requests: a chat's next turn computes only its new tokens. No torch.

The scheduler asks it for tables when a request starts, gives them back when it ends, and makes it
drop the least recently used idle cache when blocks run out. A prefix cache shared between requests
fits behind the same three calls.
"""

from __future__ import annotations

from .blocks import BlockTable, PagedMemory
from .sequence import Sequence, Session


def common_prefix(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return next(i for i in range(length) if a[i] != b[i])


class SessionCache:
    """The idle caches, least recently used first."""

    def __init__(self, memory: PagedMemory) -> None:
        self.memory = memory
        self._idle: dict[Session, list[BlockTable]] = {}

    def restore(self, sequence: Sequence) -> None:
        """Give a starting request its tables, with what its session still holds of its tokens.

        At least one token is left to compute, since its logits are wanted.
        """
        session = sequence.session
        tables = self._idle.pop(session, None) if session else None
        sequence.computed = sequence.reused = 0
        if session is None or tables is None:
            sequence.tables = self.memory.new_tables()
            return
        common = min(common_prefix(session.tokens, sequence.tokens), len(sequence.tokens) - 1)
        session.tokens = []
        sequence.tables = tables
        if all(table.resumable(common) for table in tables):
            for table in tables:
                table.truncate(common)
            sequence.computed = sequence.reused = common
        else:  # a window's blocks before this point are gone
            for table in tables:
                table.clear()

    def keep(self, sequence: Sequence, keep: bool) -> None:
        """Take the tables of a request that stops running; its session's next one may use them."""
        tables, sequence.tables = sequence.tables, []
        if not tables:
            return
        session = sequence.session
        if session is not None and keep and sequence.computed:
            session.tokens = sequence.tokens[: sequence.computed]
            self._idle[session] = tables
        else:
            _clear(tables)
        sequence.computed = 0

    def reclaim(self) -> bool:
        """Drop the least recently used idle cache; False if there is none."""
        if not self._idle:
            return False
        self.drop(next(iter(self._idle)))
        return True

    def drop(self, session: Session) -> None:
        """Forget what a session holds; its next request computes everything."""
        tables = self._idle.pop(session, None)
        if tables is not None:
            _clear(tables)
            session.tokens = []

    def tables(self) -> list[list[BlockTable]]:
        """The tables of all idle caches, for integrity checks."""
        return list(self._idle.values())


def _clear(tables: list[BlockTable]) -> None:
    for table in tables:
        table.clear()
