"""The block pool under random use: nothing lost, nothing shared by mistake."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from smelt.runtime.blocks import BlockPool, BlockTable, IntegrityError, OutOfBlocks, PagedMemory


def test_pool_counts_references() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    pool.share(block)
    pool.release(block)
    assert pool.references(block) == 1
    pool.allocate()
    with pytest.raises(OutOfBlocks):
        pool.allocate()
    pool.release(block)
    assert pool.free == 1
    with pytest.raises(IntegrityError):
        pool.release(block)
    with pytest.raises(IntegrityError):
        pool.share(block)


def test_integrity_finds_a_lost_block() -> None:
    pool = BlockPool(3)
    table = BlockTable(pool, 4)
    table.grow(8)
    pool.check_integrity([table])
    with pytest.raises(IntegrityError):
        pool.check_integrity([])
    with pytest.raises(IntegrityError):
        pool.check_integrity([table, table])


def test_window_frees_what_no_query_sees() -> None:
    table = BlockTable(BlockPool(10), 4, window=6)
    table.grow(20)
    table.slide(9)  # the query at 9 sees 4 to 9
    assert table.first == 1
    table.slide(20)  # sees 15 to 20
    assert table.first == 3
    assert table.resumable(20)
    assert table.resumable(17)
    assert not table.resumable(16)  # would see position 11
    table.truncate(17)
    assert len(table.blocks) == 5


class Tables(RuleBasedStateMachine):
    """Sequences of two groups (full, window 5) over a pool of 12 blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = PagedMemory(12, 3, [0, 5])
        self.sequences: list[tuple[list[BlockTable], list[int]]] = []

    @rule()
    def start(self) -> None:
        if len(self.sequences) < 5:
            self.sequences.append((self.memory.new_tables(), [0]))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), more=st.integers(1, 9))
    def advance(self, data: st.DataObject, more: int) -> None:
        tables, computed = data.draw(st.sampled_from(self.sequences))
        room = self.memory.room(tables)
        target = computed[0] + more
        assert self.memory.grow(tables, target) == (target <= room)
        if target <= room:
            computed[0] = target
            for table in tables:
                table.slide(target)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        tables, computed = data.draw(st.sampled_from(self.sequences))
        target = data.draw(st.integers(0, computed[0]))
        if all(table.resumable(target) for table in tables):
            for table in tables:
                table.truncate(target)
            computed[0] = target

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.sequences))
        self.sequences.remove(entry)
        for table in entry[0]:
            table.clear()

    @invariant()
    def books_balance(self) -> None:
        self.memory.check_integrity([tables for tables, _ in self.sequences])

    @invariant()
    def visible_positions_are_held(self) -> None:
        for tables, computed in self.sequences:
            for table in tables:
                seen = max(0, computed[0] - table.window + 1) if table.window else 0
                assert table.first * table.block_size <= seen
                assert len(table.blocks) * table.block_size >= computed[0]

    def teardown(self) -> None:
        for tables, _ in self.sequences:
            for table in tables:
                table.clear()
        assert self.memory.free == 12


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
