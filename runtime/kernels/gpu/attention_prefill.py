"""Attention of sequences that bring many tokens: packed ragged queries over the paged cache.

FlashAttention-2 (Dao 2023, arXiv:2307.08691) with paged keys. A tile holds BLOCK_M rows of one
sequence and one kv head, a row being a token's query head, so that keys are read once for all query
heads that share them and no row is lost whatever their number. Which sequence a tile belongs to is
found on the device. Tiles of keys before the first row's window and behind the last row are
skipped; those that every row sees are taken without a mask first, and then the rest with one.

Behind the last sequence the tiles are those of the padding rows: they become zeros. Arguments are
those of attention_decode.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_masks import begun, first_key, tree_bits, tree_depths
from .cache_tiles import (
    LOG2E,
    capped,
    dequantize_rows,
    feature_of,
    in_order,
    load_parameters,
    load_words,
    power,
    product,
    readable,
    tile_blocks,
    tile_keys,
    tile_rows,
    unit_of,
)
from .rounding import narrow, wide


@triton.jit
def _softmax(total, top, scores, UNIT: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Powers of the scores [rows, keys]; by what earlier ones shrink; new sums and maxima."""
    new = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(new == float("-inf"), 0.0, new) * UNIT
    weights = power(scores * UNIT - safe[:, None], ASSEMBLY)
    shrink = power(top * UNIT - safe, ASSEMBLY)
    return weights, shrink, total * shrink + tl.sum(weights, 1), new


@triton.jit
def _masked(
    scores,
    start,
    rows,
    bits,
    WINDOW: tl.constexpr,
    HAS_TREE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Scores of the keys from `start` on that a row does not see become -inf."""
    _, _, indices, positions = rows
    place = tl.arange(0, scores.shape[1])
    keys = start + place
    if MASKED:
        if HAS_TREE:
            seen = (bits[:, None] >> place[None, :]) & 1 != 0
        else:
            seen = keys[None, :] <= indices[:, None]
        scores = tl.where(seen, scores, float("-inf"))
    if WINDOW > 0 and not (MASKED and HAS_TREE):
        near = keys[None, :] > positions[:, None] - WINDOW
        scores = tl.where(near, scores, float("-inf"))
    return scores


@triton.jit
def _attend_keys(
    cache,
    values,
    table,
    tree,
    queries,
    rows,
    step,
    state,
    begin,
    end,
    low,
    high,
    BLOCK_SIZE: tl.constexpr,
    SIZE: tl.constexpr,
    SLOT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    WIDEN: tl.constexpr,
    NATIVE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    HAS_TREE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """`state` after the keys begin .. end, of which those from `high` on are not there.

    Where they are not MASKED every row sees them all, but for a window.
    """
    acc, total, top = state
    UNIT: tl.constexpr = unit_of(SCALE, SOFTCAP)
    offsets = tl.arange(0, BLOCK_N)
    empty = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    bits = tl.zeros([BLOCK_M], tl.int32)
    blocks = tile_blocks(table, begin, high, BLOCK_N, BLOCK_SIZE)
    if FORMAT == "auto":
        feature = tl.arange(0, BLOCK_D)
        exists = feature < SIZE
        for start in range(begin, end, BLOCK_N):
            if MASKED and HAS_TREE:
                bits = tree_bits(tree, start, rows, step, BLOCK_N, WINDOW)
            mask = readable(start + offsets, low, high, WINDOW)
            at = tl.reshape(tile_rows(blocks, start, BLOCK_N, BLOCK_SIZE, SLOT), BLOCK_N)
            # One tile ahead, so that the loads of a tile need not wait for the table.
            blocks = tile_blocks(table, start + BLOCK_N, high, BLOCK_N, BLOCK_SIZE)
            # Transposed by its addresses: as an operation that would keep it from the pipeline.
            k = tl.load(
                cache + at[None, :] + feature[:, None],
                mask=mask[None, :] & exists[:, None],
                other=0.0,
            )
            v = tl.load(
                values + at[:, None] + feature[None, :],
                mask=mask[:, None] & exists[None, :],
                other=0.0,
            )
            if COMPUTE == "fp32":
                k = wide(k, WIDEN)
                v = wide(v, WIDEN)
            scores = capped(product(queries, k, empty, WIDEN), SCALE, SOFTCAP)
            scores = _masked(scores, start, rows, bits, WINDOW, HAS_TREE, MASKED)
            weights, shrink, total, top = _softmax(total, top, scores, UNIT, ASSEMBLY)
            weights = narrow(weights, COMPUTE, WIDEN)
            acc = product(weights, v, acc * shrink[:, None], WIDEN)
    else:
        at = tile_rows(blocks, begin, BLOCK_N, BLOCK_SIZE, SLOT)
        mask = readable(tile_keys(begin, BLOCK_N, BLOCK_SIZE), low, high, WINDOW)
        k, k_upper = load_words(cache, at, begin, low, high, WINDOW, SIZE, BLOCK_D, FORMAT)
        v, v_upper = load_words(values, at, begin, low, high, WINDOW, SIZE, BLOCK_D, FORMAT)
        k_parameters = load_parameters(cache, at, mask, SIZE, FORMAT)
        v_parameters = load_parameters(values, at, mask, SIZE, FORMAT)
        blocks = tile_blocks(table, begin + BLOCK_N, high, BLOCK_N, BLOCK_SIZE)
        for start in range(begin, end, BLOCK_N):
            if MASKED and HAS_TREE:
                bits = tree_bits(tree, start, rows, step, BLOCK_N, WINDOW)
            half = dequantize_rows(
                k, k_upper, k_parameters, COMPUTE, FORMAT, NATIVE, ASSEMBLY, WIDEN
            )
            later = start + BLOCK_N
            at = tile_rows(blocks, later, BLOCK_N, BLOCK_SIZE, SLOT)
            mask = readable(tile_keys(later, BLOCK_N, BLOCK_SIZE), low, high, WINDOW)
            k, k_upper = load_words(cache, at, later, low, high, WINDOW, SIZE, BLOCK_D, FORMAT)
            k_parameters = load_parameters(cache, at, mask, SIZE, FORMAT)
            blocks = tile_blocks(table, later + BLOCK_N, high, BLOCK_N, BLOCK_SIZE)
            scores = capped(product(queries, tl.trans(half), empty, WIDEN), SCALE, SOFTCAP)
            scores = _masked(scores, start, rows, bits, WINDOW, HAS_TREE, MASKED)
            weights, shrink, total, top = _softmax(total, top, scores, UNIT, ASSEMBLY)
            half = dequantize_rows(
                v, v_upper, v_parameters, COMPUTE, FORMAT, NATIVE, ASSEMBLY, WIDEN
            )
            v, v_upper = load_words(values, at, later, low, high, WINDOW, SIZE, BLOCK_D, FORMAT)
            v_parameters = load_parameters(values, at, mask, SIZE, FORMAT)
            weights = narrow(weights, COMPUTE, WIDEN)
            acc = product(weights, half, acc * shrink[:, None], WIDEN)
    return acc, total, top


@triton.jit
def attend_rows(
    q,
    cache,
    query_start,
    seq_lens,
    table,
    tree,
    sinks,
    out,
    q_token,
    q_head,
    table_width,
    tree_width,
    sequences,
    tokens,
    RATIO: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SIZE: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_TREE: tl.constexpr,
    SHARED: tl.constexpr,
    MAX_TOKENS: tl.constexpr,
    COMPUTE: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDEN: tl.constexpr,
    NATIVE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (tile of rows, kv head). The last tiles, whose rows see most keys, start first.

    HAS_TREE: for steps with a tree, too. SHARED: there is a kernel for those without, because trees
    are rare and what they take costs registers; each leaves the other's steps alone.
    """
    if SHARED:  # noqa: SIM102 (a constant: without it the rest is not compiled)
        if (tree_width > 0) != HAS_TREE:
            return
    head = tl.program_id(1)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b = 0
    for base in range(1, sequences + 1, 128):
        index = base + tl.arange(0, 128)
        starts = tl.load(query_start + index, mask=index <= sequences, other=0)
        b += begun(starts, index, sequences, tile, RATIO, BLOCK_M)
    first = tl.load(query_start + b)
    last = tokens
    if b < sequences:
        last = tl.load(query_start + b + 1)
    count = last - first
    tile -= first * RATIO // BLOCK_M + b
    if tile * BLOCK_M >= count * RATIO:
        return
    number = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token = number // RATIO
    query_head = head * RATIO + number % RATIO
    valid = token < count
    row = first + token
    feature = tl.arange(0, BLOCK_D)
    real = valid[:, None] & (feature < SIZE)[None, :]
    HEADS: tl.constexpr = RATIO * KV_HEADS
    out_at = ((row.to(tl.int64) * HEADS + query_head) * SIZE)[:, None] + feature[None, :]
    if b == sequences:
        nothing = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        tl.store(out + out_at, narrow(nothing, DTYPE, WIDEN), mask=real)
        return
    if count <= MAX_TOKENS:
        return
    length = tl.load(seq_lens + b)
    before = length - count
    step = (first, count, before, tree_width)
    positions = before + token
    lowest = before + tile * BLOCK_M // RATIO
    high = tl.minimum(before + (tile * BLOCK_M + BLOCK_M - 1) // RATIO + 1, length)
    whole = lowest + 1
    if HAS_TREE:  # noqa: SIM102 (a constant: without it the rest is not compiled)
        if tree_width > 0:
            lowest = before
            high = length
            whole = before
            if WINDOW > 0:
                depths = tree_depths(tree, row, valid, count, tree_width)
                positions = before + depths - 1
    rows = (row, valid, before + token, positions)
    low, begin = first_key(lowest, WINDOW, BLOCK_N, BLOCK_SIZE)
    whole = begin + tl.maximum(whole - begin, 0) // BLOCK_N * BLOCK_N

    q_at = row.to(tl.int64) * q_token + query_head * q_head
    column = feature_of(feature, FORMAT)
    queries = tl.load(
        q + q_at[:, None] + column[None, :],
        mask=valid[:, None] & (column < SIZE)[None, :],
        other=0.0,
    )
    queries = narrow(wide(queries, WIDEN), COMPUTE, WIDEN)
    table += tl.cast(b, tl.int64) * table_width
    cache += head * ROW
    SLOT: tl.constexpr = KV_HEADS * ROW
    values = cache + BLOCK_SIZE * SLOT
    state = (
        tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.full([BLOCK_M], float("-inf"), tl.float32),
    )
    for MASKED in tl.static_range(2):
        if MASKED == 0:
            start = begin
            end = whole
        else:
            start = whole
            end = high
        state = _attend_keys(
            cache,
            values,
            table,
            tree,
            queries,
            rows,
            step,
            state,
            start,
            end,
            low,
            high,
            BLOCK_SIZE,
            SIZE,
            SLOT,
            BLOCK_D,
            FORMAT,
            SCALE,
            WINDOW,
            SOFTCAP,
            COMPUTE,
            WIDEN,
            NATIVE,
            ASSEMBLY,
            HAS_TREE,
            BLOCK_M,
            BLOCK_N,
            MASKED,
        )
    acc, total, top = state
    top *= unit_of(SCALE, SOFTCAP)
    if HAS_SINKS:
        sink = wide(tl.load(sinks + query_head), WIDEN) * LOG2E
        new = tl.maximum(top, sink)
        total = total * tl.exp2(top - new) + tl.exp2(sink - new)
        acc *= tl.exp2(top - new)[:, None]
    some = tl.where(total == 0.0, 1.0, total)
    result = in_order(narrow(acc / some[:, None], DTYPE, WIDEN), 1, FORMAT)
    tl.store(out + out_at, result, mask=real)
