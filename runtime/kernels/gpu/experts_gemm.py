"""Grouped matrix products over experts: each program takes one block of choices of one expert.

Blocks and the order of choices come from routing.py. The first product gives act(gate) * up in the
order of the sorted choices, the second reads that order and writes to a choice's own place, so that
nothing is added between programs. The products are counted as in MegaBlocks (Gale et al. 2022,
arXiv:2211.15841), with blocks short enough that a step of a few tokens wastes little.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rounding import narrow, wide
from .tiles import activate, dot


@triton.jit
def tile_of(TILES_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(block of choices, tile of output features) of this program.

    GROUP_M blocks pass over the features side by side: those of one expert then find its weights
    in the L2 cache, and their inputs stay there.
    """
    program = tl.program_id(0)
    blocks = tl.num_programs(0) // TILES_N
    group = program // (GROUP_M * TILES_N)
    within = program % (GROUP_M * TILES_N)
    members = tl.minimum(blocks - group * GROUP_M, GROUP_M)
    return group * GROUP_M + within % members, within // members


@triton.jit
def load_rows(pointers, rows, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows of a matrix at features k .. k + BLOCK_K; zeros where `rows` is false or beyond K."""
    if K % BLOCK_K:
        rows = rows & (k + tl.arange(0, BLOCK_K) < K)[None, :]
    return tl.load(pointers + k, mask=rows, other=0.0)


@triton.jit
def load_weights(pointers, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_K, BLOCK_N] of a matrix whose rows are outputs; zeros beyond K."""
    if K % BLOCK_K:
        mask = (k + tl.arange(0, BLOCK_K) < K)[:, None]
        return tl.load(pointers + k, mask=mask, other=0.0)
    return tl.load(pointers + k)


@triton.jit
def gate_up_dense(
    x,
    gate_up,
    order,
    blocks,
    hidden,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """hidden [choices in order, I] = act(x gate^T) * (x up^T); x [T, K], gate_up [E, 2I, K]."""
    m, n = tile_of((WIDTH + BLOCK_N - 1) // BLOCK_N, GROUP_M)
    places = tl.load(blocks + m * 3 + 2)
    if places == 0:
        return
    expert = tl.load(blocks + m * 3).to(tl.int64)
    place = tl.load(blocks + m * 3 + 1) + tl.arange(0, BLOCK_M)
    used = tl.arange(0, BLOCK_M) < places
    token = tl.load(order + place, mask=used, other=0).to(tl.int64) // TOP_K
    k = tl.arange(0, BLOCK_K)
    n = n * BLOCK_N + tl.arange(0, BLOCK_N)
    inputs = x + token[:, None] * K + k[None, :]
    gates = gate_up + expert * 2 * WIDTH * K + tl.minimum(n, WIDTH - 1)[None, :] * K + k[:, None]
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        a = load_rows(inputs, used[:, None], start, K, BLOCK_K)
        gate = dot(a, load_weights(gates, start, K, BLOCK_K), gate, WIDEN)
        up = dot(a, load_weights(gates + WIDTH * K, start, K, BLOCK_K), up, WIDEN)
    value = narrow(activate(gate, KIND) * up, DTYPE, WIDEN)
    out = hidden + place.to(tl.int64)[:, None] * WIDTH + n[None, :]
    tl.store(out, value, mask=used[:, None] & (n < WIDTH)[None, :])


@triton.jit
def down_dense(
    hidden,
    down,
    weight,
    order,
    blocks,
    parts,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """parts [T * top_k, K] = weight * (hidden down^T), by number of choice; down [E, K, I]."""
    m, n = tile_of((K + BLOCK_N - 1) // BLOCK_N, GROUP_M)
    places = tl.load(blocks + m * 3 + 2)
    if places == 0:
        return
    expert = tl.load(blocks + m * 3).to(tl.int64)
    place = tl.load(blocks + m * 3 + 1) + tl.arange(0, BLOCK_M)
    used = tl.arange(0, BLOCK_M) < places
    k = tl.arange(0, BLOCK_K)
    n = n * BLOCK_N + tl.arange(0, BLOCK_N)
    inputs = hidden + place.to(tl.int64)[:, None] * WIDTH + k[None, :]
    matrix = down + expert * K * WIDTH + tl.minimum(n, K - 1)[None, :] * WIDTH + k[:, None]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        a = load_rows(inputs, used[:, None], start, WIDTH, BLOCK_K)
        sums = dot(a, load_weights(matrix, start, WIDTH, BLOCK_K), sums, WIDEN)
    choice = tl.load(order + place, mask=used, other=0).to(tl.int64)
    factor = wide(tl.load(weight + choice, mask=used, other=0.0), WIDEN)
    value = narrow(sums * factor[:, None], DTYPE, WIDEN)
    tl.store(parts + choice[:, None] * K + n[None, :], value, mask=used[:, None] & (n < K)[None, :])
