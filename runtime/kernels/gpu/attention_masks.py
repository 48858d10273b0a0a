"""Which rows and keys a program of the attention kernels has, and which of them see each other.

Row i of a sequence stands at index `before` + i of its cache, where `before` = length - count: the
tokens of earlier steps. Without a tree the index is its position too. In a tree of drafted tokens
(tree bool [T, W], W = 0 where a step has none) a token stands one behind its ancestors, wherever
its slot is, and windows count positions.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def begun(starts, index, sequences, place, ROWS: tl.constexpr, TILE: tl.constexpr):
    """How many of the sequences `index`, whose first tokens are `starts`, begin at token `place` or
    before it; with a TILE, at tile `place` of that many rows, where a token has ROWS.

    Sequence b's tiles begin at number starts[b] * ROWS // TILE + b: none is shared, and no sum over
    sequences is needed. Over sequences 1, 2, ... the sum of this is the number of the sequence that
    holds `place`. Kernels load all starts, 128 at once: that is one wait for memory, where a binary
    search waits at each of its steps. They do it themselves, because Inductor takes a pointer that
    is given to a function for written where the result leads to a store.
    """
    if TILE > 0:
        starts = starts * ROWS // TILE + index
    return tl.sum(((index <= sequences) & (starts <= place)).to(tl.int32), 0)


@triton.jit
def first_key(position, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """(first key that a row at `position` or behind it sees, first key of the page it is on)."""
    PAGE: tl.constexpr = min(BLOCK_N, BLOCK_SIZE)
    low = position * 0
    if WINDOW > 0:
        low = tl.maximum(position - WINDOW + 1, 0)
    return low, low // PAGE * PAGE


@triton.jit
def tree_depths(tree, rows, mask, count, width):
    """How many of their sequence's `count` tokens rows of a tree see, themselves too: int32."""
    depth = tl.zeros(rows.shape, tl.int32)
    for base in range(0, count, 16):
        column = base + tl.arange(0, 16)
        inside = mask[:, None] & (column < count)[None, :]
        at = tree + rows.to(tl.int64)[:, None] * width + column[None, :]
        depth += tl.sum((tl.load(at, mask=inside, other=0) != 0).to(tl.int32), 1)
    return depth


@triton.jit
def own_keys(
    tree, token, step, MAX_TOKENS: tl.constexpr, WINDOW: tl.constexpr, HAS_TREE: tl.constexpr
):
    """Rows that are `token`s of a sequence of at most MAX_TOKENS: the sequence's own tokens they
    see, as bits of an int32, and the rows' positions.

    Found once for a program, so that its loop over keys takes a shift for a tree.
    """
    first, count, before, width = step
    own = tl.arange(0, MAX_TOKENS)
    sees = own[None, :] <= token[:, None]
    stands = own
    if HAS_TREE:  # noqa: SIM102 (a constant: without it the rest is not compiled)
        if width > 0:
            at = tree + (first + token).to(tl.int64)[:, None] * width + own[None, :]
            inside = (token < count)[:, None] & (own < count)[None, :]
            sees = tl.load(at, mask=inside, other=0) != 0
            if WINDOW > 0:
                stands = tree_depths(tree, first + own, own < count, count, width) - 1
    depth = tl.sum(sees.to(tl.int32), 1) - 1
    if WINDOW > 0:
        sees = sees & (depth[:, None] - stands[None, :] < WINDOW)
    return tl.sum(tl.where(sees, 1 << own[None, :], 0), 1), before + depth


@triton.jit
def visible_by_bits(start, bits, positions, before, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr):
    """bool [BLOCK_N, rows]: which keys from `start` on rows see of which `own_keys` tells."""
    keys = start + tl.arange(0, BLOCK_N)
    own = tl.minimum(tl.maximum(keys - before, 0), 31)
    old = (keys < before)[:, None] & (positions >= 0)[None, :]
    if WINDOW > 0:
        old = old & (keys[:, None] > positions[None, :] - WINDOW)
    new = (bits[None, :] >> own[:, None]) & (keys >= before)[:, None].to(tl.int32)
    return old | (new != 0)


@triton.jit
def tree_bits(tree, start, rows, step, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr):
    """Which of the keys from `start` on rows of a step, with a tree or without, see: int32 [rows],
    a bit a key.

    rows: their number in the step's tokens, whether they are there, index and position. step: the
    sequence's first row, its number of rows, the tokens before them, and W. BLOCK_N: at most 32.
    Bits, because the layout that reads a tree well is no product's; eight keys at once, to take few
    registers.
    """
    tl.static_assert(BLOCK_N <= 32)
    number, valid, indices, positions = rows
    first, count, before, width = step
    bits = tl.zeros(number.shape, tl.int32)
    row_at = tree + number.to(tl.int64) * width
    for base in range(0, BLOCK_N, 8):
        place = base + tl.arange(0, 8)
        keys = start + place
        own = keys - before
        sees = keys[None, :] <= indices[:, None]
        stands = keys
        if width > 0:
            mask = (own >= 0) & (own < count)
            at = row_at[:, None] + own[None, :]
            sees = tl.load(at, mask=valid[:, None] & mask[None, :], other=0) != 0
            sees = sees | (own < 0)[None, :]
            if WINDOW > 0:  # noqa: SIM102 (a constant, too)
                # In a step no longer than the window no two of its tokens are too far apart.
                if count > WINDOW:
                    depths = tree_depths(tree, first + own, mask, count, width)
                    stands = tl.where(mask, before + depths - 1, keys)
        if WINDOW > 0:
            sees = sees & (positions[:, None] - stands[None, :] < WINDOW)
        bits += tl.sum(tl.where(sees, 1 << place[None, :], 0), 1)
    return bits
