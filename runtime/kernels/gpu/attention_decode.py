"""Attention of sequences that bring few tokens: flash-decoding over the paged cache.

The keys of a sequence are cut into pieces, so that a few long sequences fill the machine as well
(Dao et al. 2023, "Flash-Decoding for long-context inference"). A program attends over one piece for
one kv head: its query heads times the sequence's tokens are the columns of one tile, with the
keys as rows. So tensor cores are given 64 keys by 8 columns and not 8 queries padded to 16 or 64
rows. What a sequence's pieces give, a second kernel combines; where there is only one, it is the
result. How many pieces there are is found on the device from the sequence's length: `splits` is
only the most there can be, and programs past a sequence's last piece return at once.

The softmax is that of FlashAttention-2 (Dao 2023, arXiv:2307.08691), in powers of two.

Arguments of both kernels: query_start int32 [B+1], seq_lens int32 [B], table int32 [B, M], tree
bool [T, W], sinks [H], out [T, H, D]; parts float32 [rows, H, splits, D] and logs float32
[rows, H, splits], the logarithm of the softmax's sum. Their rows are tokens where they are as many
as those, and otherwise MAX_TOKENS for each sequence.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_masks import begun, first_key, own_keys, visible_by_bits
from .cache_tiles import (
    LOG2E,
    capped,
    dequantize,
    feature_of,
    in_order,
    lift,
    load_parameters,
    load_words,
    power,
    prepare_queries,
    product,
    readable,
    scale_of,
    tile_blocks,
    tile_rows,
    unit_of,
    zero_of,
)
from .rounding import narrow, wide


@triton.jit
def pieces_of(
    length,
    count,
    splits,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PIECE: tl.constexpr,
):
    """(first visible key, begin of the first piece, keys of a piece, number of pieces)."""
    low, begin = first_key(length - count, WINDOW, BLOCK_N, BLOCK_SIZE)
    tiles = tl.cdiv(length - begin, BLOCK_N)
    keys = tl.maximum(tl.cdiv(tiles, splits), PIECE // BLOCK_N) * BLOCK_N
    return low, begin, keys, tl.cdiv(length - begin, keys)


@triton.jit
def _softmax(scores, top, unit, ASSEMBLY: tl.constexpr):
    """Powers of the scores [keys, columns]; by what earlier ones shrink; the new largest scores."""
    new = tl.maximum(top, tl.max(scores, 0))
    safe = tl.where(new == float("-inf"), 0.0, new) * unit
    weights = power(scores * unit[None, :] - safe[None, :], ASSEMBLY)
    return weights, power(top * unit - safe, ASSEMBLY), new


@triton.jit
def attend_pieces(
    q,
    cache,
    query_start,
    seq_lens,
    table,
    tree,
    sinks,
    out,
    parts,
    logs,
    q_token,
    q_head,
    table_width,
    tree_width,
    sequences,
    splits,
    tokens,
    part_rows,
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
    MAX_TOKENS: tl.constexpr,
    COMPUTE: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDEN: tl.constexpr,
    NATIVE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Program (kv head, piece, tile of BLOCK_M columns and sequence).

    q [T, H, D] with strides q_token and q_head; cache with rows of ROW elements, or bytes. BLOCK_D:
    SIZE up to a power of two. COMPUTE: of products over an unquantized cache. DTYPE: of out.
    """
    head = tl.program_id(0)
    piece = tl.program_id(1)
    # Second tiles, which most sequences lack, come last: before others they would hold those up.
    b = tl.program_id(2) % sequences
    tile = tl.program_id(2) // sequences
    first = tl.load(query_start + b)
    count = tl.load(query_start + b + 1) - first
    if (count > MAX_TOKENS) | (tile * BLOCK_M >= count * RATIO):
        return
    length = tl.load(seq_lens + b)
    before = length - count
    low, begin, piece_keys, pieces = pieces_of(
        length, count, splits, WINDOW, BLOCK_N, BLOCK_SIZE, PIECE
    )
    if piece >= pieces:
        return
    begin += piece * piece_keys
    high = tl.minimum(begin + piece_keys, length)

    column = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token = column // RATIO
    query_head = head * RATIO + column % RATIO
    valid = token < count
    row = first + token
    bits, positions = own_keys(
        tree, token, (first, count, before, tree_width), MAX_TOKENS, WINDOW, HAS_TREE
    )

    feature = tl.arange(0, BLOCK_D)
    exists = feature < SIZE
    place = feature_of(feature, FORMAT)
    q_at = row.to(tl.int64) * q_token + query_head * q_head
    real = exists[:, None] & valid[None, :]
    queries = tl.load(
        q + q_at[None, :] + place[:, None],
        mask=(place < SIZE)[:, None] & valid[None, :],
        other=0.0,
    )
    table += b.to(tl.int64) * table_width
    cache += head * ROW
    SLOT: tl.constexpr = KV_HEADS * ROW
    VALUES: tl.constexpr = BLOCK_SIZE * SLOT  # from the keys of a block to its values
    offsets = tl.arange(0, BLOCK_N)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    # Summed over keys behind the loop: a sum over a tile's rows crosses threads and warps.
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
    empty = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    unit = tl.full([BLOCK_M], unit_of(SCALE, SOFTCAP), tl.float32)

    blocks = tile_blocks(table, begin, high, BLOCK_N, BLOCK_SIZE)
    if FORMAT == "auto":
        queries = narrow(wide(queries, WIDEN), COMPUTE, WIDEN)
        for start in range(begin, high, BLOCK_N):
            keys = start + offsets
            mask = readable(keys, low, high, WINDOW)
            k_at = cache + tl.reshape(tile_rows(blocks, start, BLOCK_N, BLOCK_SIZE, SLOT), BLOCK_N)
            # One tile ahead, so that the loads of a tile need not wait for the table.
            blocks = tile_blocks(table, start + BLOCK_N, high, BLOCK_N, BLOCK_SIZE)
            k = tl.load(
                k_at[:, None] + feature[None, :], mask=mask[:, None] & exists[None, :], other=0.0
            )
            # Transposed by its addresses: as an operation that would keep it from the pipeline.
            v = tl.load(
                (k_at + VALUES)[None, :] + feature[:, None],
                mask=mask[None, :] & exists[:, None],
                other=0.0,
            )
            if COMPUTE == "fp32":
                k = wide(k, WIDEN)
                v = wide(v, WIDEN)
            scores = capped(product(k, queries, empty, WIDEN), SCALE, SOFTCAP)
            seen = visible_by_bits(start, bits, positions, before, BLOCK_N, WINDOW)
            scores = tl.where(seen & mask[:, None], scores, float("-inf"))
            weights, shrink, top = _softmax(scores, top, unit, ASSEMBLY)
            total = total * shrink[None, :] + weights
            weights = narrow(weights, COMPUTE, WIDEN)
            acc = product(v, weights, acc * shrink[None, :], WIDEN)
    else:
        queries, sums, factor = prepare_queries(queries, 0, WIDEN)
        if SOFTCAP == 0:
            unit = unit * factor
        zeros = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        values = cache + VALUES
        # Rows are in registers one tile ahead: shared memory has enough to do with the products.
        at = tile_rows(blocks, begin, BLOCK_N, BLOCK_SIZE, SLOT)
        k, k_upper = load_words(cache, at, begin, low, high, WINDOW, SIZE, BLOCK_D, FORMAT)
        v, v_upper = load_words(values, at, begin, low, high, WINDOW, SIZE, BLOCK_D, FORMAT)
        flat = tl.reshape(at, BLOCK_N)
        mask = readable(begin + offsets, low, high, WINDOW)
        k_parameters = load_parameters(cache, flat, mask, SIZE, FORMAT)
        v_parameters = load_parameters(values, flat, mask, SIZE, FORMAT)
        blocks = tile_blocks(table, begin + BLOCK_N, high, BLOCK_N, BLOCK_SIZE)
        for start in range(begin, high, BLOCK_N):
            k_scale, k_zero = scale_of(k_parameters), zero_of(k_parameters, FORMAT)
            v_scale, v_zero = scale_of(v_parameters), zero_of(v_parameters, FORMAT)
            half = dequantize(k, k_upper, FORMAT, NATIVE, ASSEMBLY)
            # The registers of the keys are free again: for the next tile.
            later = start + BLOCK_N
            at = tile_rows(blocks, later, BLOCK_N, BLOCK_SIZE, SLOT)
            k, k_upper = load_words(cache, at, later, low, high, WINDOW, SIZE, BLOCK_D, FORMAT)
            flat = tl.reshape(at, BLOCK_N)
            mask = readable(later + offsets, low, high, WINDOW)
            k_parameters = load_parameters(cache, flat, mask, SIZE, FORMAT)
            v_parameters = load_parameters(values, flat, mask, SIZE, FORMAT)
            blocks = tile_blocks(table, later + BLOCK_N, high, BLOCK_N, BLOCK_SIZE)

            scores = product(half, queries, empty, WIDEN) * k_scale[:, None]
            scores = scores + k_zero[:, None] * sums[None, :]
            if SOFTCAP > 0:
                scores = capped(scores * factor[None, :], SCALE, SOFTCAP)
            seen = visible_by_bits(start, bits, positions, before, BLOCK_N, WINDOW)
            seen = seen & readable(start + offsets, low, high, WINDOW)[:, None]
            scores = tl.where(seen, scores, float("-inf"))
            weights, shrink, top = _softmax(scores, top, unit, ASSEMBLY)
            total = total * shrink[None, :] + weights
            zeros = zeros * shrink[None, :] + weights * v_zero[:, None]
            half = tl.trans(dequantize(v, v_upper, FORMAT, NATIVE, ASSEMBLY))
            v, v_upper = load_words(values, at, later, low, high, WINDOW, SIZE, BLOCK_D, FORMAT)
            weights = (weights * (v_scale * lift(FORMAT))[:, None]).to(tl.float16)
            acc = product(half, weights, acc * shrink[None, :], WIDEN)
        acc = acc * (1.0 / lift(FORMAT)) + tl.sum(zeros, 0)[None, :]
        acc = in_order(acc, 0, FORMAT)

    total = tl.sum(total, 0)
    top *= unit
    HEADS: tl.constexpr = RATIO * KV_HEADS
    if pieces == 1:
        if HAS_SINKS:
            sink = wide(tl.load(sinks + query_head), WIDEN) * LOG2E
            new = tl.maximum(top, sink)
            total = total * tl.exp2(top - new) + tl.exp2(sink - new)
            acc *= tl.exp2(top - new)[None, :]
        out_at = (row.to(tl.int64) * HEADS + query_head) * SIZE
        some = tl.where(total == 0.0, 1.0, total)
        result = narrow(acc / some[None, :], DTYPE, WIDEN)
        tl.store(out + out_at[None, :] + feature[:, None], result, mask=real)
    else:
        part = tl.where(part_rows == tokens, first, b * MAX_TOKENS) + token
        part_at = (part.to(tl.int64) * HEADS + query_head) * splits + piece
        # Where a row sees none of a piece's keys `top` is -inf: the piece will weigh nothing.
        some = tl.where(total == 0.0, 1.0, total)
        parts_at = part_at[None, :] * SIZE + feature[:, None]
        tl.store(parts + parts_at, acc / some[None, :], mask=real)
        tl.store(logs + part_at, top + tl.log2(some), mask=valid)


@triton.jit
def combine_pieces(
    query_start,
    seq_lens,
    sinks,
    out,
    parts,
    logs,
    sequences,
    splits,
    tokens,
    part_rows,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    MAX_TOKENS: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program (row of parts, head): the softmax over pieces, BLOCK_S of them at once. Rows behind
    all sequences become zeros."""
    part = tl.program_id(0)
    head = tl.program_id(1)
    feature = tl.arange(0, BLOCK_D)
    exists = feature < SIZE
    token = part
    if part_rows == tokens:
        padding = token >= tl.load(query_start + sequences)
        if padding:
            at = (token.to(tl.int64) * HEADS + head) * SIZE
            nothing = narrow(tl.zeros([BLOCK_D], tl.float32), DTYPE, WIDEN)
            tl.store(out + at + feature, nothing, mask=exists)
        if padding | (splits == 1):
            return
        b = 0
        for base in range(1, sequences + 1, 128):
            index = base + tl.arange(0, 128)
            starts = tl.load(query_start + index, mask=index <= sequences, other=0)
            b += begun(starts, index, sequences, token, 1, 0)
    else:
        b = part // MAX_TOKENS
        token = tl.load(query_start + b) + part % MAX_TOKENS
    last = tl.load(query_start + b + 1)
    count = last - tl.load(query_start + b)
    if (count > MAX_TOKENS) | (token >= last):
        return
    _, _, _, pieces = pieces_of(
        tl.load(seq_lens + b), count, splits, WINDOW, BLOCK_N, BLOCK_SIZE, PIECE
    )
    if pieces == 1:
        return
    first = (part.to(tl.int64) * HEADS + head) * splits
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for base in range(0, pieces, BLOCK_S):
        piece = base + tl.arange(0, BLOCK_S)
        mask = piece < pieces
        log = tl.load(logs + first + piece, mask=mask, other=float("-inf"))
        part_acc = tl.load(
            parts + ((first + piece) * SIZE)[:, None] + feature[None, :],
            mask=mask[:, None] & exists[None, :],
            other=0.0,
        )
        new = tl.maximum(top, tl.max(log, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        shrink = tl.exp2(top - safe)
        weights = tl.exp2(log - safe)
        acc = acc * shrink + tl.sum(part_acc * weights[:, None], 0)
        total = total * shrink + tl.sum(weights, 0)
        top = new
    if HAS_SINKS:
        sink = wide(tl.load(sinks + head), WIDEN) * LOG2E
        new = tl.maximum(top, sink)
        total = total * tl.exp2(top - new) + tl.exp2(sink - new)
        acc *= tl.exp2(top - new)
    at = (token.to(tl.int64) * HEADS + head) * SIZE
    tl.store(out + at + feature, narrow(acc / total, DTYPE, WIDEN), mask=exists)
