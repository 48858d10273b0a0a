"""What was computed is kept and found again by its tokens. Plain Python, no torch.

A radix tree over token ids whose edges are cache blocks, as SGLang's RadixAttention (Zheng et al.
2023, arXiv:2312.07104) with vLLM's blocks for nodes: a node stands for all tokens on the way to it,
so equal content is one node whoever computed it. The comparison is of the tokens themselves; a
hash alone would let one tenant's blocks answer for another's. A request finds the longest prefix,
to the token: a block it shares in part is copied when it is first written (`BlockTable.own`). The
least recently used leaf goes first when blocks run out, never one that a running sequence reads.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Hashable, Iterator, Sequence

from .blocks import PagedMemory

Tokens = tuple[int, ...]


class Node:
    """One block of tokens behind its parent's. tokens: at most a block's; fewer only in a leaf.

    blocks: where they are, one a cache group; used: when it was last read or written.
    """

    __slots__ = ("alive", "blocks", "children", "keys", "parent", "tokens", "used")

    def __init__(self, tokens: Tokens, blocks: tuple[int, ...], parent: Node | None) -> None:
        self.tokens = tokens
        self.blocks = blocks
        self.parent = parent
        self.children: dict[Tokens, Node] = {}
        self.keys: list[Tokens] = []  # the children's, sorted: neighbours share most
        self.used = 0
        self.alive = True

    def closest(self, tokens: Tokens) -> tuple[Node | None, int]:
        """The child that shares most with the beginning of `tokens`, and how many tokens."""
        at = bisect_left(self.keys, tokens)
        best, shared = None, 0
        # In sorted order no key shares more with `tokens` than the two around its place.
        for key in self.keys[max(0, at - 1) : at + 1]:
            common = common_prefix(key, tokens)
            if common > shared:
                best, shared = self.children[key], common
        return best, shared


class PrefixCache:
    """The tree, its references into the block pools, and the order of eviction.

    enabled: False keeps and finds nothing, at the same interface.
    """

    def __init__(self, memory: PagedMemory, enabled: bool = True) -> None:
        self.memory = memory
        self.enabled = enabled
        self.evictions = 0
        self.nodes = 0
        self._roots: dict[Hashable, Node] = {}
        self._clock = 0
        self._leaves: list[tuple[int, int, Node]] = []  # a heap; entries may be out of date
        self._entries = 0

    def root(self, salt: Hashable = None) -> Node:
        """The tree of a salt: requests of different salts never share a block."""
        return self._roots.setdefault(salt, Node((), (), None))

    def find(self, tokens: Sequence[int], salt: Hashable = None) -> tuple[list[Node], int]:
        """The longest cached prefix of `tokens`: its nodes, and how many tokens they share.

        All but the last node are shared whole.
        """
        node, nodes, found = self._roots.get(salt), [], 0
        size = self.memory.block_size
        while node is not None and found < len(tokens):
            key = tuple(tokens[found : found + size])
            child = node.children.get(key) if len(key) == size else None
            shared = size
            if child is None:
                child, shared = node.closest(key)
            if child is None:
                break
            nodes.append(child)
            found += shared
            node = child if shared == size else None
        return nodes, found

    def touch(self, nodes: Sequence[Node]) -> None:
        """These were read now; the deepest comes last."""
        self._clock += 1
        for node in nodes:
            node.used = self._clock
            if not node.children:
                self._push(node)

    def add(self, parent: Node, tokens: Tokens, blocks: Sequence[int]) -> Node:
        """Keep `blocks` as the content of `tokens` behind `parent`, which has no such child."""
        for pool, block in zip(self.memory.pools, blocks, strict=True):
            pool.share(block)
        at = bisect_left(parent.keys, tokens)
        before = parent.children[parent.keys[at - 1]] if at else None
        node = Node(tokens, tuple(blocks), parent)
        parent.children[tokens] = node
        parent.keys.insert(at, tokens)
        self.nodes += 1
        self._clock += 1
        node.used = self._clock
        self._push(node)
        if (
            before is not None
            and before.tokens == tokens[: len(before.tokens)]
            and not before.children
            and self._idle(before)
        ):
            # The beginning of what is kept now. Not sooner: a root without children is dropped.
            self._remove(before)
        return node

    def reclaim(self) -> bool:
        """Free the least recently used leaf that nobody reads; False if there is none."""
        pinned = []
        found = False
        while self._leaves and not found:
            entry = heapq.heappop(self._leaves)
            used, _, node = entry
            if not node.alive or node.children or node.used != used:
                continue
            if not self._idle(node):
                pinned.append(entry)
                continue
            self._remove(node)
            self.evictions += 1
            found = True
        for entry in pinned:
            heapq.heappush(self._leaves, entry)
        return found

    def forget(self, node: Node) -> None:
        """Drop a node, and those before it, as far as nobody else needs them: it may be wrong."""
        while node.parent is not None and node.alive and not node.children and self._idle(node):
            parent = node.parent
            self._remove(node)
            node = parent

    def clear(self) -> None:
        """Forget everything that nobody reads."""
        while self.reclaim():
            pass

    def blocks(self) -> list[tuple[int, ...]]:
        """The blocks of every node, for integrity checks."""
        return [node.blocks for node in self]

    def __iter__(self) -> Iterator[Node]:
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            stack += node.children.values()
            if node.parent is not None:
                yield node

    def _idle(self, node: Node) -> bool:
        """Whether the tree alone holds the node's blocks."""
        pairs = zip(self.memory.pools, node.blocks, strict=True)
        return all(pool.references(block) == 1 for pool, block in pairs)

    def _push(self, leaf: Node) -> None:
        # A leaf read often leaves entries behind; the heap is made anew when they prevail.
        self._entries += 1
        heapq.heappush(self._leaves, (leaf.used, self._entries, leaf))
        if len(self._leaves) > 64 + 4 * self.memory.pools[0].size:
            self._leaves = [e for e in self._leaves if e[2].alive and e[2].used == e[0]]
            heapq.heapify(self._leaves)

    def _remove(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        node.alive = False
        self.nodes -= 1
        del parent.children[node.tokens]
        del parent.keys[bisect_left(parent.keys, node.tokens)]
        for pool, block in zip(self.memory.pools, node.blocks, strict=True):
            pool.release(block)
        if parent.parent is not None and not parent.children:
            self._push(parent)
        elif not parent.children:
            self._drop_root(parent)

    def _drop_root(self, root: Node) -> None:
        """Salts come and go; a sequence that still holds this root keeps nothing behind it."""
        for salt, other in list(self._roots.items()):
            if other is root and salt is not None:
                root.alive = False
                del self._roots[salt]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return next(i for i in range(length) if a[i] != b[i])
