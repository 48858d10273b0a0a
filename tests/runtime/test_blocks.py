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
    assert len(table.held()) == 2


def test_a_shared_block_is_copied_before_it_is_written() -> None:
    memory = PagedMemory(8, 4, [0])
    tables = memory.new_tables()
    assert memory.grow(tables, 0, 6) == []
    forked = [table.fork() for table in tables]
    assert forked[0].blocks == tables[0].blocks
    assert memory.pools[0].free == 6
    copies = memory.grow(forked, 6, 7)
    assert copies == [(0, tables[0].blocks[1], forked[0].blocks[1])]
    assert forked[0].blocks[0] == tables[0].blocks[0]
    assert memory.grow(tables, 6, 7) == []  # alone again
    memory.check_integrity([tables, forked])


def test_adopted_blocks_are_those_a_window_still_sees() -> None:
    pool = BlockPool(10)
    owner = BlockTable(pool, 4)
    owner.grow(20)
    table = BlockTable(pool, 4, window=6)
    table.adopt(owner.blocks, 18)  # sees 13 to 18
    assert table.first == 3
    assert [pool.references(b) for b in owner.blocks] == [1, 1, 1, 2, 2]


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
        room = self.memory.room(tables, computed[0])
        target = computed[0] + more
        copies = self.memory.grow(tables, computed[0], target)
        assert (copies is not None) == (target <= room)
        if target <= room:
            computed[0] = target
            for table in tables:
                table.slide(target)

    @precondition(lambda self: 0 < len(self.sequences) < 5)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        tables, computed = data.draw(st.sampled_from(self.sequences))
        self.sequences.append(([table.fork() for table in tables], list(computed)))

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
