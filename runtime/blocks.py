"""The paged cache's bookkeeping: which block holds which tokens. Plain Python, no tensors.

A pool counts the users of each block; a `BlockTable` lists the blocks of one sequence in one cache
group. Blocks are counted and not merely owned, because several sequences may read one block (a
shared prompt). A group with a window gives back the blocks its layers no longer see.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


class OutOfBlocks(Exception):
    """The pool has no free block; the scheduler answers by taking blocks from somebody."""


class IntegrityError(AssertionError):
    """The pool's books do not balance: a bug, never a user's mistake."""


class BlockPool:
    """`size` blocks with a reference count each; the last one freed is the first one reused."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._references = [0] * size
        self._free = list(range(size - 1, -1, -1))

    @property
    def free(self) -> int:
        """Number of blocks nobody uses."""
        return len(self._free)

    def references(self, block: int) -> int:
        """How many tables hold this block."""
        return self._references[block]

    def allocate(self) -> int:
        """A block with one reference; raises `OutOfBlocks`."""
        if not self._free:
            raise OutOfBlocks(f"all {self.size} cache blocks are in use")
        block = self._free.pop()
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more reader of a block that is in use."""
        if self._references[block] < 1:
            raise IntegrityError(f"block {block} is shared but not in use")
        self._references[block] += 1

    def release(self, block: int) -> None:
        """One reader less; the last one frees the block."""
        if self._references[block] < 1:
            raise IntegrityError(f"block {block} is released but not in use")
        self._references[block] -= 1
        if not self._references[block]:
            self._free.append(block)

    def check_integrity(self, tables: Iterable[BlockTable] = ()) -> None:
        """Raise `IntegrityError` unless these tables account for every reference.

        tables: all tables of this pool that hold blocks.
        """
        if len(set(self._free)) != len(self._free):
            raise IntegrityError("a block is in the free list twice")
        for block in self._free:
            if self._references[block]:
                raise IntegrityError(f"free block {block} has readers")
        held = Counter(block for table in tables for block in table.held())
        for block, count in enumerate(self._references):
            if count != held[block]:
                raise IntegrityError(
                    f"block {block} counts {count} readers, tables hold it {held[block]} times"
                )
        if len(self._free) + len(held) != self.size:
            raise IntegrityError(f"{self.size - len(self._free) - len(held)} blocks are lost")


class BlockTable:
    """The blocks of one sequence in one cache group, by position.

    blocks[i] holds positions i * block_size up to (i + 1) * block_size. Entries below `first` were
    given back (they lie outside the window) and keep a stale number that nobody reads.
    `changed_from` is the first entry the device's copy of the table has not seen.
    """

    __slots__ = ("block_size", "blocks", "changed_from", "first", "pool", "window")

    def __init__(self, pool: BlockPool, block_size: int, window: int = 0) -> None:
        self.pool = pool
        self.block_size = block_size
        self.window = window
        self.blocks: list[int] = []
        self.first = 0
        self.changed_from = 0

    def held(self) -> list[int]:
        """The blocks this table has a reference to."""
        return self.blocks[self.first :]

    def missing(self, tokens: int) -> int:
        """How many blocks must be added to hold positions below `tokens`."""
        return max(0, -(-tokens // self.block_size) - len(self.blocks))

    def grow(self, tokens: int) -> None:
        """Hold positions below `tokens`; raises `OutOfBlocks` with what it got so far kept."""
        for _ in range(self.missing(tokens)):
            self.blocks.append(self.pool.allocate())

    def slide(self, computed: int) -> None:
        """Give back blocks that no query from position `computed` on can see."""
        if not self.window:
            return
        last = min((computed - self.window + 1) // self.block_size, len(self.blocks))
        while self.first < last:
            self.pool.release(self.blocks[self.first])
            self.first += 1

    def resumable(self, tokens: int) -> bool:
        """Whether a query at position `tokens` finds all it may see still in the cache."""
        if tokens > len(self.blocks) * self.block_size:
            return False
        seen_from = max(0, tokens - self.window + 1) if self.window else 0
        return self.first * self.block_size <= seen_from

    def truncate(self, tokens: int) -> None:
        """Forget positions from `tokens` on; call it only where `resumable(tokens)`."""
        keep = max(-(-tokens // self.block_size), self.first)
        while len(self.blocks) > keep:
            self.pool.release(self.blocks.pop())
        self.changed_from = min(self.changed_from, keep)

    def clear(self) -> None:
        """Give everything back and start again at position 0."""
        for block in self.held():
            self.pool.release(block)
        self.blocks = []
        self.first = 0
        self.changed_from = 0


class PagedMemory:
    """The pools of all cache groups: one `BlockTable` a group makes a sequence's tables.

    windows: one a group, 0 for full attention. Every group has `blocks` blocks of its own,
    because each layer's cache tensor has that many.
    """

    def __init__(self, blocks: int, block_size: int, windows: Sequence[int]) -> None:
        self.block_size = block_size
        self.windows = tuple(windows)
        self.pools = [BlockPool(blocks) for _ in self.windows]

    @property
    def capacity(self) -> int:
        """Tokens that one sequence alone can hold."""
        return min(pool.size for pool in self.pools) * self.block_size

    @property
    def free(self) -> int:
        """Blocks free in the fullest pool."""
        return min(pool.free for pool in self.pools)

    def new_tables(self) -> list[BlockTable]:
        pairs = zip(self.pools, self.windows, strict=True)
        return [BlockTable(pool, self.block_size, window) for pool, window in pairs]

    def room(self, tables: Sequence[BlockTable]) -> int:
        """Tokens (counted from position 0) that these tables can hold with what is free now."""
        return min((len(t.blocks) + t.pool.free) * self.block_size for t in tables)

    def grow(self, tables: Sequence[BlockTable], tokens: int) -> bool:
        """Hold positions below `tokens` in every group, or change nothing and return False."""
        for table in tables:
            if table.missing(tokens) > table.pool.free:
                return False
        for table in tables:
            table.grow(tokens)
        return True

    def check_integrity(self, owners: Iterable[Sequence[BlockTable]]) -> None:
        """Check each pool against all tables in use; owners: the tables of each sequence."""
        by_group: list[list[BlockTable]] = [[] for _ in self.pools]
        for tables in owners:
            for group, table in zip(by_group, tables, strict=True):
                group.append(table)
        for pool, group in zip(self.pools, by_group, strict=True):
            pool.check_integrity(group)
