"""The paged cache's bookkeeping: which block holds which tokens. Plain Python, no tensors.

A pool counts the users of each block; a `BlockTable` lists the blocks of one sequence in one cache
group. Blocks are counted and not merely owned, because several sequences may read one block (a
shared prompt). A group with a window gives back the blocks its layers no longer see.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

# What must be copied before a step writes: (cache group, from block, to block), in order.
Copies = list[tuple[int, int, int]]


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

    def check_integrity(
        self, tables: Iterable[BlockTable] = (), cached: Iterable[int] = ()
    ) -> None:
        """Raise `IntegrityError` unless tables and prefix cache account for every reference.

        tables: all tables of this pool that hold blocks; cached: blocks of the prefix cache.
        """
        if len(set(self._free)) != len(self._free):
            raise IntegrityError("a block is in the free list twice")
        for block in self._free:
            if self._references[block]:
                raise IntegrityError(f"free block {block} has readers")
        held = Counter(block for table in tables for block in table.held())
        held.update(cached)
        for block, count in enumerate(self._references):
            if count != held[block]:
                raise IntegrityError(
                    f"block {block} counts {count} readers and is held {held[block]} times"
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

    def shared(self, position: int) -> bool:
        """Whether somebody else reads the block that `position` would be written to."""
        index = position // self.block_size
        return index < len(self.blocks) and self.pool.references(self.blocks[index]) > 1

    def own(self, position: int) -> tuple[int, int] | None:
        """Make the block of `position` writable: (block to copy from, block to copy to) if shared.

        Raises `OutOfBlocks`.
        """
        if not self.shared(position):
            return None
        index = position // self.block_size
        old, new = self.blocks[index], self.pool.allocate()
        self.replace(index, new)
        return old, new

    def replace(self, index: int, block: int) -> None:
        """Hold `block`, whose reference the caller made, in the place of entry `index`."""
        self.pool.release(self.blocks[index])
        self.blocks[index] = block
        self.changed_from = min(self.changed_from, index)

    def adopt(self, blocks: Sequence[int], tokens: int) -> None:
        """Begin an empty table with blocks of others that hold the first `tokens` positions."""
        self.blocks = list(blocks)
        seen_from = max(0, tokens - self.window + 1) if self.window else 0
        self.first = min(seen_from // self.block_size, len(self.blocks))
        for block in self.held():
            self.pool.share(block)
        self.changed_from = 0

    def fork(self) -> BlockTable:
        """A second table of the same blocks; whoever writes first copies (`own`)."""
        table = BlockTable(self.pool, self.block_size, self.window)
        table.blocks, table.first = list(self.blocks), self.first
        for block in table.held():
            self.pool.share(block)
        return table

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

    def room(self, tables: Sequence[BlockTable], computed: int) -> int:
        """Tokens (counted from position 0) that these tables can hold with what is free now.

        computed: the first position to be written, whose block may have to be copied.
        """
        return min(
            (len(t.blocks) + t.pool.free - t.shared(computed)) * self.block_size for t in tables
        )

    def grow(self, tables: Sequence[BlockTable], computed: int, tokens: int) -> Copies | None:
        """Make positions `computed` up to `tokens` writable in every group.

        Returns the blocks to copy before the next step writes, in order; None, with nothing
        changed, where too few blocks are free.
        """
        for table in tables:
            if table.missing(tokens) + table.shared(computed) > table.pool.free:
                return None
        copies = []
        for group, table in enumerate(tables):
            table.grow(tokens)
            pair = table.own(computed)
            if pair:
                copies.append((group, *pair))
        return copies

    def check_integrity(
        self,
        owners: Iterable[Sequence[BlockTable]],
        cached: Iterable[Sequence[int]] = (),
    ) -> None:
        """Check each pool. owners: the tables of each sequence; cached: blocks of each node."""
        by_group: list[list[BlockTable]] = [[] for _ in self.pools]
        for tables in owners:
            for group, table in zip(by_group, tables, strict=False):
                group.append(table)
        nodes = list(cached)
        for i, (pool, group) in enumerate(zip(self.pools, by_group, strict=True)):
            pool.check_integrity(group, (blocks[i] for blocks in nodes))
