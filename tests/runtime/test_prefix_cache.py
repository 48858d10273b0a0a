"""The prefix cache against plain lists: it finds the longest prefix, and never what is gone."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.runtime.blocks import BlockTable, PagedMemory
from smelt.runtime.prefix_cache import PrefixCache, common_prefix


def keep(cache: PrefixCache, tokens: list[int], salt: object = None) -> bool:
    """Compute `tokens` in fresh blocks, as a request would; False if none are left."""
    memory, size = cache.memory, cache.memory.block_size
    tables = memory.new_tables()
    while memory.grow(tables, 0, len(tokens)) is None:
        if not cache.reclaim():
            return False
    node = cache.root(salt)
    for start in range(0, len(tokens), size):
        key = tuple(tokens[start : start + size])
        blocks = [table.blocks[start // size] for table in tables]
        child = node.children.get(key)
        if child is None and len(key) < size and node.closest(key)[1] == len(key):
            break
        node = child or cache.add(node, key, blocks)
    for table in tables:
        table.clear()
    memory.check_integrity([], cache.blocks())
    assert cache.nodes == len(cache.blocks())
    return True


def test_the_longest_prefix_is_found_to_the_token() -> None:
    cache = PrefixCache(PagedMemory(32, 4, [0, 5]))
    keep(cache, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    keep(cache, [1, 2, 3, 4, 5, 6, 9, 9, 9])
    for tokens, expected in (
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], 10),
        ([1, 2, 3, 4, 5, 6, 9, 9, 9, 9], 9),
        ([1, 2, 3, 4, 5, 6], 6),
        ([1, 2, 3, 4, 5, 6, 8], 6),
        ([1, 2, 9], 2),
        ([2], 0),
        ([], 0),
    ):
        nodes, found = cache.find(tokens)
        assert found == expected
        assert len(nodes) == -(-found // 4)
        held = [token for node in nodes for token in node.tokens]
        assert held[:found] == tokens[:found]


def test_salts_share_nothing() -> None:
    cache = PrefixCache(PagedMemory(32, 4, [0]))
    keep(cache, list(range(8)), salt="a")
    assert cache.find(list(range(8)), "a")[1] == 8
    assert cache.find(list(range(8)), "b")[1] == 0
    assert cache.find(list(range(8)))[1] == 0


def test_a_tenants_only_block_may_be_replaced_by_a_longer_one() -> None:
    cache = PrefixCache(PagedMemory(8, 4, [0]))
    for tokens in ([1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5]):
        assert keep(cache, tokens, salt="a")  # which checks that no block is lost
        assert cache.find(tokens, "a")[1] == len(tokens)


def test_the_least_recently_used_leaf_goes_first_and_a_read_one_never() -> None:
    memory = PagedMemory(4, 2, [0])
    cache = PrefixCache(memory)
    for tokens in ([1, 1], [2, 2], [3, 3]):
        keep(cache, tokens)
    cache.touch(cache.find([1, 1])[0])
    reader = BlockTable(memory.pools[0], 2)
    reader.adopt([node.blocks[0] for node in cache.find([2, 2])[0]], 2)
    assert cache.reclaim()  # 2 is read, 1 was used last
    assert [cache.find([i, i])[1] for i in (1, 2, 3)] == [2, 2, 0]
    assert cache.reclaim()
    assert not cache.reclaim()
    assert [cache.find([i, i])[1] for i in (1, 2)] == [0, 2]
    reader.clear()
    assert cache.reclaim()
    assert memory.free == 4


def test_a_parent_outlives_its_children() -> None:
    cache = PrefixCache(PagedMemory(8, 2, [0]))
    keep(cache, [1, 2, 3, 4, 5, 6])
    assert cache.reclaim()
    assert cache.find([1, 2, 3, 4, 5, 6])[1] == 4


def test_what_may_be_wrong_is_forgotten() -> None:
    cache = PrefixCache(PagedMemory(8, 2, [0]))
    keep(cache, [1, 2, 3, 4])
    keep(cache, [1, 2, 9, 9])
    cache.forget(cache.find([1, 2, 3, 4])[0][-1])
    assert cache.find([1, 2, 3, 4])[1] == 2
    assert cache.find([1, 2, 9, 9])[1] == 4


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=12),
    st.lists(st.integers(0, 2), max_size=14),
    st.integers(1, 4),
)
def test_finds_what_an_oracle_finds(
    kept: list[list[int]], asked: list[int], block_size: int
) -> None:
    cache = PrefixCache(PagedMemory(200, block_size, [0]))
    for tokens in kept:
        assert keep(cache, tokens)
    longest = max(common_prefix(tokens, asked) for tokens in kept)
    assert cache.find(asked)[1] == longest


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 3))
def test_a_small_pool_never_leaks_and_never_invents(
    seed: int, blocks: int, block_size: int
) -> None:
    rng = random.Random(seed)
    memory = PagedMemory(blocks, block_size, [0, 3])
    cache = PrefixCache(memory)
    seen: list[list[int]] = []
    for _ in range(40):
        tokens = [rng.randrange(3) for _ in range(rng.randint(1, blocks * block_size))]
        assert keep(cache, tokens)
        seen.append(tokens)
        asked = [rng.randrange(3) for _ in range(8)]
        nodes, found = cache.find(asked)
        assert found <= max(common_prefix(each, asked) for each in seen)
        assert [t for node in nodes for t in node.tokens][:found] == asked[:found]
    cache.clear()
    assert memory.free == blocks
    assert not cache.blocks()
